"""The peer of `ng-train bench` and of an iteration of `ng-train align`: eager PyTorch with diffusers.

    ng-train bench --model NAME --size 1024x1024 --json > passes.json
    python benches/peers/flux_eager.py flow/src/known/flux.1-dev/transformer/config.json passes.json
        [--metrics metrics.jsonl --steps 8 --group 12 --anchors 4 --train-steps 4]

A transformer of the config with random weights, and adapters of the same rank on the same layers, does
the same passes on the same kind of device in the same type: a velocity, and forward with backward with
each block checkpointed. Each size of passes.json gets a row with the ratio of their milliseconds to
ours. With --metrics, the rollouts and updates of one group at the last size, against the last iteration
that `ng-train align` logged there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
    "ff_context.net.2",
]


def build(path, rank, device, kind):
    config = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}
    torch.set_default_dtype(kind)
    with torch.device(device):
        model = FluxTransformer2DModel(**config)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    model.enable_gradient_checkpointing()
    return model.train()


def inputs(model, batch, tokens, text_tokens, device, kind):
    config = model.config
    normal = lambda *shape: torch.randn(*shape, device=device, dtype=kind)
    side = int(tokens**0.5)
    assert side * side == tokens, "square images only"
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None, :]
    return {
        "hidden_states": normal(batch, tokens, config.in_channels),
        "encoder_hidden_states": normal(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=kind),
        "guidance": torch.full((batch,), 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
    }


def velocity(model, given):
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def training(model, given):
    v = model(**given, return_dict=False)[0]
    (v.float() * v.detach().float()).sum().backward()


def milliseconds(once, device, repeats):
    def timed():
        start = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    timed()
    return statistics.median(timed() for _ in range(repeats))


def iteration(model, given, args, device):
    """One group: its rollout, all members at a time, and an optimiser step an anchor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def rollout():
        for _ in range(args.steps):
            velocity(model, given(args.group))

    def updates():
        for _ in range(args.anchors):
            training(model, given(args.train_steps))
            optimizer.step()
            optimizer.zero_grad()

    return [milliseconds(part, device, 1) / 1e3 for part in (rollout, updates)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("passes", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--metrics", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--anchors", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=4)
    args = parser.parse_args()

    ours = json.loads(args.passes.read_text())
    device = "cuda" if ours["device"].startswith("Cuda") else "cpu"
    kind = torch.bfloat16 if ours["precision"] == "bf16" else torch.float32
    model = build(args.config, args.rank, device, kind)
    print(f"{'size':>11}{'velocity ms':>14}{'theirs':>10}{'ratio':>7}"
          f"{'training ms':>14}{'theirs':>10}{'ratio':>7}")
    for row in ours["rows"]:
        given = inputs(model, ours["batch"], row["tokens"], ours["text_tokens"], device, kind)
        line = f"{row['width']}x{row['height']}".rjust(11)
        for name, once in (("velocity", velocity), ("training", training)):
            mine = row[f"{name}_ms"]
            theirs = milliseconds(lambda: once(model, given), device, args.repeats)
            line += f"{mine:14.1f}{theirs:10.1f}{theirs / mine:7.2f}"
            model.zero_grad()
        print(line, flush=True)
    if args.metrics:
        logged = json.loads(args.metrics.read_text().splitlines()[-1])
        mine = [logged["seconds/rollout"], logged["seconds/update"]]
        tokens = ours["rows"][-1]["tokens"]
        given = lambda n: inputs(model, n, tokens, ours["text_tokens"], device, kind)
        theirs = iteration(model, given, args, device)
        for name, a, b in zip(("rollout", "update"), mine, theirs):
            print(f"{name} of a group: {a:.2f} s, theirs {b:.2f} s, ratio {b / a:.2f}")


if __name__ == "__main__":
    main()
