"""The table of gpu.sh: table.py FOLDER PART... Writes results.json, and ends with 1 where a part failed."""

import json
import sys
from pathlib import Path


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


folder = Path(sys.argv[1])
results, failed = [], False
for part in sys.argv[2:]:
    end = json.loads((folder / f"{part}.end").read_text())
    text = (folder / f"{part}.out").read_text().strip()
    end["result"] = json.loads(text.splitlines()[-1]) if end["code"] == 0 and text else None
    if end["code"] != 0:
        errors = (folder / f"{part}.err").read_text().strip().splitlines()
        end["error"] = "above the limit of time" if end["code"] == 124 else (errors or ["no reason given"])[-1]
    elif (end["result"] or {}).get("error"):
        end["error"] = end["result"]["error"]
    results.append(end)
    failed |= "error" in end
(folder / "results.json").write_text(json.dumps(results, indent=1))
for end in results:
    print(f"\n{end['part']}  {end['seconds']} s  {'failed: ' + end['error'] if 'error' in end else 'done'}")
    for name, value in flat(end["result"] or {}):
        print(f"  {name:<48} {shown(value)}")
sys.exit(failed)
