"""Compares the reference tensors that `ng-train reference` wrote with diffusers and transformers.

    python tests/parity/reference.py MODEL

MODEL is a pipeline folder holding `reference.safetensors`: for each network the inputs that our
libtorch interpreter was given and what it computed. The same inputs go through the Python networks
in f32; the largest difference may be 1e-5 of the largest value.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model

    case = tensors(model / "reference.safetensors")
    pipe, _ = load(model)
    report = Report(f"ng-train against diffusers, {model}")

    with torch.no_grad():
        ours = part(case, "transformer")
        velocity = ours.pop("out_hidden_states")
        theirs = pipe.transformer(**ours, return_dict=False)[0]
        report.relative("transformer velocity", velocity, theirs)

        ours = part(case, "text_encoder")
        theirs = pipe.text_encoder(ours["input_ids"].long())
        for name in ("last_hidden_state", "pooler_output"):
            report.relative(f"text_encoder {name}", ours[name], theirs[name])

        ours = part(case, "text_encoder_2")
        theirs = pipe.text_encoder_2(ours["input_ids"].long())
        report.relative(
            "text_encoder_2 last_hidden_state", ours["last_hidden_state"], theirs.last_hidden_state,
        )

        ours = part(case, "vae_decoder")
        pixels = pipe.vae.decode(ours["latent_sample"]).sample
        report.relative("vae_decoder", ours["sample"], pixels)

        ours = part(case, "vae_encoder")
        moments = pipe.vae.encoder(ours["sample"])
        report.relative("vae_encoder", ours["latent_parameters"], moments)
    report.finish()


if __name__ == "__main__":
    main()
