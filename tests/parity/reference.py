"""Compares the reference tensors that `ng-train reference` wrote with diffusers and transformers.

    python tests/parity/reference.py MODEL [--bf16]

MODEL is a pipeline folder holding `reference.safetensors`: for each network the inputs that our
libtorch interpreter was given and what it computed. The same inputs go through the Python networks
in f32; the largest difference may be 1e-5 of the largest value. With --bf16 both compute transformer
and text encoders in bf16, and may differ by 2e-2 in root mean square, unless ours is nearer to f32.
Both stray far from it where times and guidance, a thousandfold, are rounded to bf16 first.
"""

import argparse
from pathlib import Path

import torch
from pipeline import load
from report import Report, tensors


def part(case, folder):
    """The tensors `folder.name` of `case` as torch tensors under their names."""
    prefix = f"{folder}."
    return {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in case.items() if name.startswith(prefix)
    }


def outputs(pipe, case, kind):
    """What transformer and text encoders compute in `kind` from the case's inputs."""
    inputs = part(case, "transformer")
    del inputs["out_hidden_states"]
    ids = {name: inputs.pop(name) for name in ("img_ids", "txt_ids")}
    inputs = {name: value.to(kind) for name, value in inputs.items()}
    velocity = pipe.transformer.to(kind)(**inputs, **ids, return_dict=False)[0]
    text = pipe.text_encoder.to(kind)(part(case, "text_encoder")["input_ids"])
    tokens = pipe.text_encoder_2.to(kind)(part(case, "text_encoder_2")["input_ids"])
    return {
        "transformer.out_hidden_states": velocity.float(),
        "text_encoder.last_hidden_state": text.last_hidden_state.float(),
        "text_encoder.pooler_output": text.pooler_output.float(),
        "text_encoder_2.last_hidden_state": tokens.last_hidden_state.float(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    case = tensors(args.model / "reference.safetensors")
    pipe, _ = load(args.model)
    report = Report(f"ng-train against diffusers, {args.model}{', bf16' if args.bf16 else ''}")
    with torch.no_grad():
        exact = outputs(pipe, case, torch.float32)
        if args.bf16:
            for name, theirs in outputs(pipe, case, torch.bfloat16).items():
                report.narrow(name, case[name], theirs, exact[name], 2e-2)
        else:
            for name, theirs in exact.items():
                report.relative(name, case[name], theirs)

        ours = part(case, "vae_decoder")
        pixels = pipe.vae.decode(ours["latent_sample"]).sample
        report.relative("vae_decoder", ours["sample"], pixels)

        ours = part(case, "vae_encoder")
        moments = pipe.vae.encoder(ours["sample"])
        report.relative("vae_encoder", ours["latent_parameters"], moments)
    report.finish()


if __name__ == "__main__":
    main()
