"""The peer of `ng-export`: Optimum's exporter, by its own function, on a pipeline folder.

    PYTHONPATH=.runtime/optimum python benches/peers/optimum_export.py CHECKPOINT OUT

Tokenizers are given to it, because its transformers is older than the folders. What it validates after the
export is left out: `ng-export` is measured without --verify, too.
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline
from optimum.exporters.onnx import onnx_export_from_model
from optimum_tokenizer import tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(
        args.checkpoint, torch_dtype=torch.float32, local_files_only=True, tokenizer=None,
        tokenizer_2=None,
    )
    for name in ("tokenizer", "tokenizer_2"):
        setattr(pipe, name, tokenizer(args.checkpoint / name))
    onnx_export_from_model(
        pipe, args.out, task="text-to-image", do_validation=False, no_dynamic_axes=False,
    )


if __name__ == "__main__":
    main()
