"""Trains a small CLIP on the captioned emoji, as a reward or its judge.

    emoji_clip.py PICTURES TOKENIZER OUT reward|judge [--passes 200000] [--threads 1]

PICTURES: the folder that setup/emoji.py makes; TOKENIZER: its blank's `tokenizer`. OUT becomes a CLIPModel folder
of transformers with the tokenizer beside the weights, which `kind = "clip"` reads.

Reward and judge see the same pictures, but differ in architecture, seed and in what disturbs a picture, so that
what deceives one need not deceive the other. Every caption of a batch that is a
picture's own counts as right, whatever row it came with.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

SIZE = 32
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
BATCH = 256

# Patch, width, layers, heads of the image tower; seed; strongest noise and blur.
KINDS = {
    "reward": {"vision": (8, 160, 5, 4), "seed": 1, "noise": 0.15, "blur": 0.5},
    "judge": {"vision": (4, 96, 4, 3), "seed": 2, "noise": 0.05, "blur": 0.8},
}


def read(pictures):
    """Pixels `[N, 3, 32, 32]` in 0 to 1, and each picture's captions."""
    captions = {}
    for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        captions.setdefault(row["file_name"], []).append(row["text"])
    images = [np.asarray(Image.open(pictures / name).convert("RGB")) for name in captions]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return pixels, list(captions.values())


def model_of(kind, tokenizer, length):
    patch, width, layers, heads = KINDS[kind]["vision"]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = CLIPConfig(
        projection_dim=128,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": length,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|startoftext|>"),
            "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            "image_size": SIZE, "patch_size": patch, "hidden_size": width,
            "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        },
    )
    return CLIPModel(config)


def disturbed(pixels, noise, blur):
    """Shifted, tinted, blurred, noisy: what a generator's pictures may be."""
    n = len(pixels)
    padded = functional.pad(pixels, (3, 3, 3, 3), value=1.0)
    dx, dy = torch.randint(0, 7, (2, n)).tolist()
    moved = torch.stack([p[:, y:y + SIZE, x:x + SIZE] for p, x, y in zip(padded, dx, dy)])
    soft = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1) * blur
    moved = moved + (soft - moved) * share
    tint = 1 + 0.1 * torch.randn(n, 3, 1, 1)
    moved = moved * tint + noise * torch.rand(n, 1, 1, 1) * torch.randn_like(moved)
    return (moved.clamp(0, 1) - MEAN) / STD


def surprise(logits, right):
    """Cross entropy of rows of `logits` with all that is `right` there, in equal shares."""
    return -(logits.log_softmax(1) * right / right.sum(1, keepdim=True)).sum(1).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--passes", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kind = KINDS[args.kind]
    torch.manual_seed(kind["seed"])
    pixels, captions = read(args.pictures)
    length = json.loads((args.tokenizer / "tokenizer_config.json").read_text())["model_max_length"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.tokenizer / "tokenizer.json"), pad_token="<|endoftext|>",
    )
    texts = sorted({text for own in captions for text in own})
    number = {text: i for i, text in enumerate(texts)}
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt",
    )["input_ids"]
    rows = [[number[text] for text in own] for own in captions]
    width = max(map(len, rows))
    # Shorter rows repeat what they have.
    table = torch.tensor([(own * width)[:width] for own in rows])
    model = model_of(args.kind, tokenizer, length).train()
    n_numbers = sum(p.numel() for p in model.parameters())
    print(f"{len(pixels)} pictures, {len(texts)} captions, {n_numbers:,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    n_steps, recent = args.passes // BATCH, None
    for step in range(n_steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        picked = torch.randint(len(pixels), (BATCH,))
        texts_of = table[picked, torch.randint(width, (BATCH,))]
        seen = disturbed(pixels[picked], kind["noise"], kind["blur"])
        answer = model(input_ids=ids[texts_of], pixel_values=seen)
        right = (table[picked][:, None, :] == texts_of[None, :, None]).any(2).float()
        loss = (surprise(answer.logits_per_image, right) + surprise(answer.logits_per_text, right.T)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        if step % 20 == 19:
            print(f"step {step + 1}/{n_steps}  loss {recent:.3f}", flush=True)
    measure(model.eval(), pixels, ids, table)
    staged = args.out.with_name(args.out.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    model.half().save_pretrained(staged)
    for file in args.tokenizer.iterdir():
        shutil.copy(file, staged / file.name)
    shutil.rmtree(args.out, ignore_errors=True)
    staged.rename(args.out)


@torch.no_grad()
def measure(model, pixels, ids, table):
    """How often a picture's own caption by name is the nearest of all names."""
    names = table[:, 0].unique()
    texts = functional.normalize(model.get_text_features(input_ids=ids[names]).pooler_output, dim=1)
    seen = (pixels - MEAN) / STD
    images = [model.get_image_features(pixel_values=part).pooler_output for part in seen.split(256)]
    nearest = names[(functional.normalize(torch.cat(images), dim=1) @ texts.T).argmax(1)]
    print(f"own name the nearest of {len(names)}: {(nearest == table[:, 0]).float().mean():.1%}")


if __name__ == "__main__":
    main()
