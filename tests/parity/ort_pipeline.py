"""Runs an export in Hugging Face Optimum and compares its image with the one from diffusers.

    PYTHONPATH=.runtime/optimum python tests/parity/ort_pipeline.py EXPORT DIR

DIR is the folder that image.py filled for the same export, with noise.safetensors and
diffusers.safetensors in it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTFluxPipeline
from report import Report, tensors

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches/peers"))
from optimum_tokenizer import tokenizer  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default='a red "HAT"')
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    noise = torch.from_numpy(tensors(args.out / "noise.safetensors")["latents"])
    expected = tensors(args.out / "diffusers.safetensors")
    pipe = ORTFluxPipeline.from_pretrained(
        args.export, provider="CPUExecutionProvider", local_files_only=True,
        tokenizer=tokenizer(args.export / "tokenizer"),
        tokenizer_2=tokenizer(args.export / "tokenizer_2"),
    )
    pipe.set_progress_bar_config(disable=True)
    height, width, _ = expected["image"].shape
    image = pipe(
        prompt=args.prompt, height=height, width=width, num_inference_steps=args.steps,
        guidance_scale=3.5, max_sequence_length=min(pipe.tokenizer_2.model_max_length, 512),
        latents=pipe._pack_latents(noise, *noise.shape), output_type="np",
    ).images[0]
    report = Report(f"Optimum's ORTFluxPipeline on {args.export}")
    report.equal("class", type(pipe).__name__, "ORTFluxPipeline")
    report.absolute("pixels", np.asarray(image), expected["image"], 2 / 255)
    report.finish()


if __name__ == "__main__":
    main()
