"""Loads a checkpoint folder that `ng-train` wrote with diffusers and compares every tensor.

    python tests/parity/checkpoint.py CHECKPOINT [--base MODEL]

Each component must load without a missing or an unexpected tensor, hold exactly the numbers in the
files, and the pipeline must make a finite image. With --base, says how far the transformer moved.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pipeline import load
from report import Report, tensors

# Tied to shared.weight; folders may hold it or not.
TIED = "encoder.embed_tokens.weight"


def stored(folder):
    """All tensors of a component folder, sharded or not, CLIP's without its old prefix."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted({folder / file for file in weight_map.values()})
    found = {}
    for file in files:
        found |= tensors(file)
    found.pop(TIED, None)
    return {name.removeprefix("text_model."): value for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()

    pipe, length = load(args.checkpoint)
    report = Report(f"FluxPipeline.from_pretrained, {args.checkpoint}")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, name)
        state = {
            key.removeprefix("text_model."): value.float().numpy()
            for key, value in module.state_dict().items()
            if key != TIED and not key.endswith("position_ids")
        }
        files = stored(args.checkpoint / name)
        title = f"{name} {type(module).__name__}"
        report.equal(f"{title} names", sorted(set(state) ^ set(files)), [])
        worst = max(
            np.abs(state[key] - files[key].astype(np.float32)).max()
            for key in state.keys() & files.keys()
        )
        report.absolute(f"{title}, {len(files)} tensors", worst, 0.0, 0.0)

    side = 4 * pipe.vae_scale_factor
    image = pipe(
        prompt="a red sign", height=side, width=side, num_inference_steps=1, output_type="np",
        max_sequence_length=length,
    ).images
    report.equal("image is finite", bool(np.isfinite(image).all()), True)
    if args.base:
        before, after = stored(args.base / "transformer"), stored(args.checkpoint / "transformer")
        moved = sum(not np.array_equal(before[key], after[key]) for key in after)
        report.equal("transformer tensors that moved", moved > 0, True)
    report.finish()


if __name__ == "__main__":
    main()
