"""The peer of `ng-sample`: images from a pipeline folder by diffusers, one after another.

    python benches/peers/diffusers_sample.py MODEL --prompt TEXT --side 32 --steps 8 -o a.png

Prints one JSON object an image: {"milliseconds": {"load": …, "image": …}}, where `image` is text,
steps, decoder and PNG. Imports only what it needs, so that a cold start is a fair one.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--side", type=int, required=True, help="pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-n", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    start = time.perf_counter()
    pipe = FluxPipeline.from_pretrained(
        args.model, torch_dtype=torch.float32, local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    load = time.perf_counter() - start
    length = min(pipe.tokenizer_2.model_max_length, 512)
    for seed in range(args.n):
        start = time.perf_counter()
        image = pipe(
            prompt=args.prompt, height=args.side, width=args.side,
            num_inference_steps=args.steps, max_sequence_length=length,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        image.save(args.out.with_stem(f"{args.out.stem}-{seed:03}"))
        milliseconds = {"load": load * 1e3, "image": (time.perf_counter() - start) * 1e3}
        print(json.dumps({"milliseconds": milliseconds}), flush=True)


if __name__ == "__main__":
    main()
