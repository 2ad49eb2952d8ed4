"""What a part of gpu.sh has shown, from the files its programs wrote, as one JSON object.

    curves.py signs CPU.jsonl GPU.jsonl
    curves.py nccl FOLDER
    curves.py determinism FOLDER BATCH...
    curves.py export|sample FOLDER
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


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


def sample(folder):
    return network("sample", folder, "ours") | {"peer": peer("sample", folder)}


def peer(kind, folder):
    return json.loads((Path(folder) / f"{kind}-peer.json").read_text())


def export(folder):
    """Both forms of attention and the kernels that they reach; what empty slots cost and change."""
    folder, forms = Path(folder), ("multi-head", "standard")
    found = network("export", folder, *forms, *(f"{form}-without-cudnn" for form in forms),
                    *(f"slots-{rank}" for rank in ("none", 0, 1)))
    for form in forms:
        said = re.findall(r"SdpaKernel=(\w+)", (folder / f"export-{form}.kernels").read_text())
        found[f"{form} kernels"] = ", ".join(sorted(set(said))) or "not told"
    latents = {rank: load_file(folder / f"export-slots-{rank}.safetensors")["latents"]
               for rank in ("none", 0, 1)}
    for rank in (0, 1):
        difference = np.abs(latents[rank] - latents["none"]).max()
        found[f"slots of rank {rank}, largest difference"] = float(difference)
        if not difference <= 0.01 * np.abs(latents["none"]).max():
            found["error"] = f"empty slots of rank {rank} change the image"
    return found | {"peer": peer("export", folder)}


PARTS = {"signs": signs, "nccl": nccl, "determinism": determinism,
         "export": export, "sample": sample}
print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
