"""Recomputes the gradients of rewards that ReFL and DRaFT-LV follow, with diffusers' decoder and transformers' CLIP.

    python tests/parity/gradient.py MODEL --programs target/release --out DIR

A random CLIP scores; `ng-train align --record-update` stores the states x_in [M, S, C], times t_in [M], velocities
v_theta [M, S, C], and what it made of them: objective [M] and gradient [M, S, C], that of the mean objective with
respect to the velocities. Everything is computed again by torch's autograd, in f64 but for the resizing, from
x_in - t·v: decode, cut to an image's range, resize, score.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from report import Report, begun, run, tensors
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests/fixtures/tokenizers/pipeline/tokenizer"
PROMPT = "a red cat on a green sofa"
WIDTH, HEIGHT, SIDE = 96, 64, 32
WEIGHT = -2.5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# f32 through two networks and back against f64.
OBJECTIVE, GRADIENT = 1e-5, 1e-5


def clip(folder):
    """A small random CLIP whose score depends on what it sees."""
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPModel(CLIPConfig(vision_config=tower | {"image_size": SIDE, "patch_size": 8},
                                 text_config=tower, projection_dim=32)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(std=value[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model


def resized(image):
    """The shorter side of [1, 3, H, W] becomes SIDE, the middle stays."""
    scale = SIDE / min(image.shape[2:])
    height, width = (int(n * scale) for n in image.shape[2:])
    image = torch.nn.functional.interpolate(
        image.float(), (height, width), mode="bicubic", antialias=True).double()
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return image[:, :, top:top + SIDE, left:left + SIDE]


def main():
    args = begun(__doc__)
    model = clip(args.out).double()
    ids = CLIPTokenizer.from_pretrained(TOKENIZER)(
        [PROMPT], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").double()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    statistics = [torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in (MEAN, STD)]
    prompts = args.out / "prompts.txt"
    prompts.write_text(PROMPT + "\n")

    def score(x0):
        latents = FluxPipeline._unpack_latents(x0[None], HEIGHT, WIDTH, factor)
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        image = resized((pixels / 2 + 0.5).clamp(0, 1))
        seen = model(pixel_values=(image - statistics[0]) / statistics[1], **ids)
        return WEIGHT * (seen.image_embeds * seen.text_embeds).sum()

    report = Report("gradients of a reward")
    for algorithm in ("refl", "draft-lv"):
        record = args.out / f"{algorithm}.safetensors"
        reward = {"name": "clip", "kind": "clip", "weight": WEIGHT, "weights": str(args.out / "model.safetensors"),
                  "tokenizer": str(TOKENIZER)}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in reward.items())
        settings = {
            "model": args.model, "output": args.out / algorithm, "prompts": prompts, "algorithm": algorithm,
            "rollout.size": [WIDTH, HEIGHT], "rewards": f"[{{{table}}}]", "judges": "[]", "group_size": 3,
            "prompts_per_iteration": 1, "iterations": 1, "validate_every": 0, "sheet_prompts": prompts,
        }
        settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        run(args.programs / "ng-train", "align", "--preset", "signs", *settings, "--record-update", record)
        found = {name: torch.from_numpy(value).double() for name, value in tensors(record).items()}
        v = found["v_theta"].clone().requires_grad_()
        values = torch.stack([score(x) for x in found["x_in"] - found["t_in"].reshape(-1, 1, 1) * v])
        (gradient,) = torch.autograd.grad(values.mean(), v)
        n = {"refl": 3, "draft-lv": 6}[algorithm]
        report.equal(f"{algorithm}, images", len(values), n)
        report.equal(f"{algorithm}, states that differ", len(found["x_in"].flatten(1).unique(dim=0)), n)
        report.absolute(f"{algorithm}, objective", found["objective"], values.detach(), OBJECTIVE)
        report.relative(f"{algorithm}, gradient", found["gradient"], gradient, GRADIENT)
    report.finish()


if __name__ == "__main__":
    main()
