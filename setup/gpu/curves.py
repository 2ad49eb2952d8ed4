"""What a part of gpu.sh has shown, from the files its programs wrote, as one JSON object.

    curves.py signs CPU.jsonl GPU.jsonl
    curves.py nccl FOLDER
    curves.py determinism FOLDER BATCH...
    curves.py export|sample FOLDER NAME...
"""

import hashlib
import json
import sys
from pathlib import Path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def signs(cpu, gpu):
    """Rewards of the first and last tenth of the iterations that both have made."""
    cpu, gpu = lines(cpu), lines(gpu)
    n = min(len(cpu), len(gpu))
    tenth = max(n // 10, 1)
    found = {"iterations": n, "cpu s": mean(x["seconds/iteration"] for x in cpu[-tenth:]),
             "gpu s": mean(x["seconds/iteration"] for x in gpu[-tenth:]),
             "gpu largest first |log ratio|": max(x["policy/log_ratio_first"] for x in gpu[:n])}
    for name in sorted(cpu[0]):
        if name.startswith("reward/"):
            for who, curve in (("cpu", cpu), ("gpu", gpu)):
                found[f"{name} {who} first"] = mean(x[name] for x in curve[:tenth])
                found[f"{name} {who} last"] = mean(x[name] for x in curve[n - tenth:n])
    return found


def nccl(folder):
    """What each process said last; two ranks on one GPU must have been refused."""
    said = lambda name: (Path(folder) / f"nccl-{name}.txt").read_text().splitlines()
    found = {"about": said("collectives")[0], "collectives": said("collectives")[-1],
             "abort": said("abort")[-1], "two ranks on one GPU": said("two-a")[-1]}
    found |= dict(line.split(": ", 1) for line in said("bandwidth") if ": " in line and "MiB" in line)
    if found["collectives"] != "ok":
        found["error"] = found["collectives"]
    elif "the reward server refused" not in found["abort"]:
        found["error"] = f"abort: {found['abort']}"
    elif "Cuda" in found["about"] and "error: " not in found["two ranks on one GPU"]:
        found["error"] = "two ranks on one GPU were not refused"
    return found


def determinism(folder, *batches):
    folder = Path(folder)
    runs = [lines(folder / f"signs-{name}" / "metrics.jsonl") for name in ("once", "again")]
    values = [[{k: v for k, v in x.items() if not k.startswith(("seconds/", "wall"))}
               for x in run] for run in runs]
    weights = [hashlib.sha256(b"".join(
        path.read_bytes() for path in sorted((folder / f"signs-{name}" / "aligned").rglob("*.safetensors"))
    )).hexdigest() for name in ("once", "again")]
    differ = {k for a, b in zip(*values) for k in a if a[k] != b.get(k)}
    found = {"same metrics": values[0] == values[1], "same weights": weights[0] == weights[1],
             "metrics that differ": sorted(differ)}
    for batch in batches:
        text = (folder / f"determinism-{batch}.json").read_text()
        said = (folder / f"determinism-{batch}.txt").read_text().strip()
        found[f"first |log ratio|, batch {batch}"] = (
            json.loads(text)["rows"][0]["log_ratio_first"] if text else said
        )
    return found


def network(kind, folder, *names):
    """Seconds of each stage by ng-sample."""
    found = {}
    for name in names:
        measured = json.loads((Path(folder) / f"{kind}-{name}.json").read_text())
        found |= {f"{name} {key}": measured[key] for key in ("device", "provider", "precision", "load")}
        for stage in ("text", "step", "decode", "image"):
            found[f"{name} {stage} s"] = measured[stage]["median"]
    return found


def of_part(kind):
    """With PyTorch's passes of the same network in the same call, and their seconds over ours."""
    def found(folder, *names):
        peer = json.loads((Path(folder) / f"{kind}-peer.json").read_text())
        row, measured = peer["rows"][0], network(kind, folder, *names)
        for name in names:
            for how in ("eager", "compiled"):
                if f"velocity {how} ms" in row:
                    seconds = row[f"velocity {how} ms"] / 1e3
                    measured[f"{name} step, {how} ratio"] = seconds / measured[f"{name} step s"]
        return measured | {"peer": peer}

    return found


PARTS = {"signs": signs, "nccl": nccl, "determinism": determinism,
         "export": of_part("export"), "sample": of_part("sample")}
print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
