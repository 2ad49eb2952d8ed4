"""The table of gpu.sh: table.py FOLDER DEVICE PART... Writes results.json, and ends with 1 where a part
failed or, on DEVICE cuda, missed what a GPU has to show (docs/cluster.md)."""

import json
import sys
from pathlib import Path

# Seconds on an H100, of FLUX.1-dev's size in bf16.
VELOCITY = ("1024x1024", 0.165)
ITERATION = 45


def flat(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{name} {index + 1}".strip())
    else:
        yield name, value


def shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def missed(part, result):
    """What `result` of `part` should have shown and did not; only a GPU has to."""
    said = []
    peer = result.get("peer", {}).get("rows", [])
    if part == "sample":
        ours, theirs = result["ours step s"], peer[0]["velocity eager ms"] / 1000
        if ours > theirs:
            said.append(f"a step of ng-sample takes {ours:.3f} s, of eager PyTorch {theirs:.3f}")
    for row in [*result.get("rows", [result]), *peer]:
        size = row.get("size", "")
        for name, value in row.items():
            if name.endswith("ratio") and "compiled" not in name and value < 1:
                said.append(f"{size} {name} {value:.3f}: slower than eager PyTorch")
        milliseconds = row.get("velocity ms")
        if size == VELOCITY[0] and milliseconds is not None and milliseconds > 1000 * VELOCITY[1]:
            said.append(f"{size} velocity {milliseconds / 1000:.3f} s: above {VELOCITY[1]}")
    if part == "iteration":
        seconds = sum(result[f"{stage} s"] for stage in ("rollout", "decode", "update"))
        if seconds > ITERATION:
            said.append(f"{seconds:.1f} s an iteration: above {ITERATION}")
    return said


def main():
    folder, on_gpu = Path(sys.argv[1]), sys.argv[2] == "cuda"
    results = []
    for part in sys.argv[3:]:
        end = json.loads((folder / f"{part}.end").read_text())
        text = (folder / f"{part}.out").read_text().strip()
        end["result"] = json.loads(text.splitlines()[-1]) if end["code"] == 0 and text else None
        result = end["result"] or {}
        if end["code"] != 0:
            errors = (folder / f"{part}.err").read_text().strip().splitlines()
            end["error"] = "above the limit of time" if end["code"] == 124 else (errors or ["no reason given"])[-1]
        elif result.get("error"):
            end["error"] = result["error"]
        elif on_gpu and (said := missed(part, result)):
            end["error"] = "; ".join(said)
        results.append(end)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    for end in results:
        print(f"\n{end['part']}  {end['seconds']} s  {'failed: ' + end['error'] if 'error' in end else 'done'}")
        for name, value in flat(end["result"] or {}):
            print(f"  {name:<48} {shown(value)}")
    sys.exit(any("error" in end for end in results))


if __name__ == "__main__":
    main()
