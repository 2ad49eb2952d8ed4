"""The peers of `ng-sample`: images by diffusers from a pipeline folder, or by Optimum from an export, one
after another.

    python benches/peers/diffusers_sample.py MODEL --prompt TEXT --side 32 --steps 8 -o a.png
    PYTHONPATH=.runtime/optimum python benches/peers/diffusers_sample.py EXPORT --optimum ...

Prints one JSON object an image: {"milliseconds": {"load": …, "image": …}}, where `image` is text,
steps, decoder and PNG. Imports only what it needs, so that a cold start is a fair one.
With --install-size it prints the bytes of the packages that it needs instead, and with --export FOLDER
Optimum exports the checkpoint MODEL there.
"""

import argparse
import json
import re
import time
from importlib import metadata
from pathlib import Path


def diffusers_pipeline(args):
    import torch
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(
        args.model, torch_dtype=torch.float32, local_files_only=True,
    )


def optimum_pipeline(args):
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTFluxPipeline
    from optimum_tokenizer import tokenizer

    options = SessionOptions()
    options.intra_op_num_threads = args.threads
    return ORTFluxPipeline.from_pretrained(
        args.model, provider="CPUExecutionProvider", local_files_only=True, session_options=options,
        tokenizer=tokenizer(args.model / "tokenizer"),
        tokenizer_2=tokenizer(args.model / "tokenizer_2"),
    )


def export(checkpoint, folder):
    """As Optimum's command line would, but for the tokenizers, which its transformers cannot read."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum_tokenizer import tokenizer
    from transformers import CLIPTextModel, T5EncoderModel

    def part(kind, name):
        return kind.from_pretrained(checkpoint / name, torch_dtype=torch.float32)

    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler"),
        vae=part(AutoencoderKL, "vae"),
        text_encoder=part(CLIPTextModel, "text_encoder"), tokenizer=tokenizer(checkpoint / "tokenizer"),
        text_encoder_2=part(T5EncoderModel, "text_encoder_2"), tokenizer_2=tokenizer(checkpoint / "tokenizer_2"),
        transformer=part(FluxTransformer2DModel, "transformer"),
    )
    onnx_export_from_model(
        model=pipe, output=folder, opset=18, task="text-to-image", do_validation=False,
    )


def install_size(roots):
    """Bytes of `roots` and of all they require without extras, as installed here."""
    waiting, seen, size = list(roots), set(), 0
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        files = [package.locate_file(file) for file in package.files or []]
        size += sum(Path(file).stat().st_size for file in files if Path(file).is_file())
        for requirement in package.requires or []:
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--optimum", action="store_true")
    parser.add_argument("--install-size", action="store_true")
    parser.add_argument("--export", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-n", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("image.png"))
    args = parser.parse_args()
    if args.install_size:
        more = ["optimum-onnx", "onnxruntime"] if args.optimum else []
        print(install_size(["torch", "diffusers", "transformers", *more]))
        return

    if args.export:
        export(args.model, args.export)
        return

    import torch
    from diffusers.utils import logging

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    start = time.perf_counter()
    pipe = optimum_pipeline(args) if args.optimum else diffusers_pipeline(args)
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
