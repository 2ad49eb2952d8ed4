"""Compares whole images from given noise: diffusers, `ng-train sample` and `ng-sample`.

    python tests/parity/image.py MODEL EXPORT --programs target/release --out DIR
        [--lora FOLDER] [--tiled] [--bf16]

All three start from the same noise and take the same Euler steps with the model's own schedule.
With --lora, diffusers loads the adapters onto the model, `ng-train sample` too, and EXPORT has them
merged. With --tiled, diffusers decodes in tiles of 1024 pixels, as we do by ourselves. Latents may
differ by 1e-4 of their largest value, pixels by 2 of 255. With --bf16, diffusers and `ng-train` compute
in bf16, whose latents may differ by 2e-2. The images stay in DIR.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pipeline import load
from report import Report, run, tensors
from safetensors.numpy import save_file

LATENTS, LATENTS_BF16, PIXELS = 1e-4, 2e-2, 2 / 255


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--programs", type=Path, default=Path("target/release"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--tiled", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--prompt", default='a red "HAT"')
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=64)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    pipe, length = load(args.model)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    factor = pipe.vae_scale_factor
    if args.tiled:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 1024, 1024 // factor
    kind = torch.bfloat16 if args.bf16 else torch.float32
    pipe.to(kind)
    shape = (1, 16, args.height // factor, args.width // factor)
    noise = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    save_file({"latents": noise}, args.out / "noise.safetensors")

    settings = {
        "prompt": args.prompt, "height": args.height, "width": args.width,
        "num_inference_steps": args.steps, "guidance_scale": 3.5, "max_sequence_length": length,
        "latents": pipe._pack_latents(torch.from_numpy(noise).to(kind), *shape),
    }
    packed = pipe(**settings, output_type="latent").images
    latents = pipe._unpack_latents(packed, args.height, args.width, factor).float().numpy()
    image = pipe(**settings, output_type="np").images[0]
    # save_file writes memory as it lies; the image is a transposed view.
    stored = {"latents": np.ascontiguousarray(latents), "image": np.ascontiguousarray(image)}
    save_file(stored, args.out / "diffusers.safetensors")
    Image.fromarray((image * 255).round().astype(np.uint8)).save(args.out / "diffusers.png")

    guidance = ["--guidance", 3.5] if pipe.transformer.config.guidance_embeds else []
    lora = ["--lora", args.lora] if args.lora else []
    named = [name for name in ("lora", "tiled", "bf16") if getattr(args, name)]
    report = Report(", ".join(["images against diffusers", str(args.model), *named]))
    programs = [(["ng-train", "sample", *lora], args.model), (["ng-sample"], args.export)]
    if args.bf16:
        programs = [(["ng-train", "sample", "--precision", "bf16"], args.model)]
    for program, model in programs:
        name = program[0]
        png, stored = args.out / f"{name}.png", args.out / f"{name}.safetensors"
        run(
            args.programs / name, *program[1:], "--model", model, "--prompt", args.prompt,
            "--steps", args.steps, "--solver", "euler", *guidance,
            "--width", args.width, "--height", args.height,
            "--noise", args.out / "noise.safetensors", "--latents-out", stored, "-o", png,
        )
        report.relative(f"{name} latents", tensors(stored)["latents"], latents, LATENTS_BF16 if args.bf16 else LATENTS)
        if args.bf16:
            continue
        pixels = np.asarray(Image.open(png).convert("RGB"), np.float32) / 255
        report.absolute(f"{name} pixels", pixels, image, PIXELS)
    report.finish()


if __name__ == "__main__":
    main()
