"""Gives a pipeline folder other numbers of blocks: blocks.py FOLDER [DOUBLE,SINGLE [T5]]."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def edit(component, **changes):
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


if len(sys.argv) > 2 and sys.argv[2]:
    double, single = map(int, sys.argv[2].split(","))
    edit("transformer", num_layers=double, num_single_layers=single)
if len(sys.argv) > 3:
    edit("text_encoder_2", num_layers=int(sys.argv[3]))
