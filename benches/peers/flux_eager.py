"""The peer of `ng-train bench`: eager PyTorch with diffusers, and compiled by it where asked for.

    ng-train bench --model NAME --size 1024x1024 --json > passes.json
    python benches/peers/flux_eager.py flow/src/known/flux.1-dev/transformer/config.json passes.json [--compile]
    ng-train bench --model FOLDER --iteration neighbor … --json > iteration.json
    python benches/peers/flux_eager.py FOLDER/transformer/config.json --iteration iteration.json [--whole]

A transformer of the config with random weights, and adapters of the same rank on the same layers, does
the same passes on the same kind of device in the same type: a velocity, and forward with backward with
each block checkpointed. With --compile, once more with each kind of block compiled. Of an iteration it does
the rollout and the updates of one group, against the last that `ng-train bench` measured. Ratios are its
seconds over ours.
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
    if rank is not None:
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
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def rollout():
        for _ in range(args.steps):
            velocity(model, given(args.group))

    def updates():
        for _ in range(args.anchors):
            training(model, given(args.train_steps))
            optimizer.step()
            optimizer.zero_grad()

    return [milliseconds(part, device, 1) / 1e3 for part in (rollout, updates)]


def of_passes(model, ours, args, device, kind):
    """A row a size: milliseconds of ours and theirs, eager and compiled."""
    rows = [{"size": f"{row['width']}x{row['height']}"} for row in ours["rows"]]
    for how in ("eager", "compiled") if args.compile else ("eager",):
        try:
            if how == "compiled":
                model.compile_repeated_blocks(fullgraph=True, dynamic=False)
            for found, row in zip(rows, ours["rows"]):
                given = inputs(model, ours["batch"], row["tokens"], ours["text_tokens"], device, kind)
                # Peers compile what has no gradients and what is checkpointed apart: the first alone is compared.
                names = (("velocity", velocity), ("training", training))
                for name, once in names if how == "eager" else names[:1]:
                    mine = row[f"{name}_ms"]
                    theirs = milliseconds(lambda: once(model, given), device, args.repeats)
                    found |= {f"{name} ms": mine, f"{name} {how} ms": theirs,
                              f"{name} {how} ratio": theirs / mine}
                    model.zero_grad()
        except Exception as error:  # what a compiler may throw is its own affair, and is told
            if how == "eager":
                raise
            rows[0]["compiled failed"] = str(error).strip().splitlines()[0][:200]
    return {"matmul TFLOP/s": ours["matmul_tflops"], "rows": rows}


def of_iteration(model, ours, args, device, kind):
    last = ours["rows"][-1]
    given = lambda n: inputs(model, n, ours["tokens"], args.text_tokens, device, kind)
    theirs = iteration(model, given, args, device)
    found = {"size": f"{ours['width']}x{ours['height']}", "peak GB": ours["peak_gb"],
             "M numbers that train": ours["trained"] / 1e6, "decode s": last["decode_s"],
             "first |log ratio|": last["log_ratio_first"]}
    for name, seconds in zip(("rollout", "update"), theirs):
        mine = last[f"{name}_s"]
        found |= {f"{name} s": mine, f"{name} eager s": seconds, f"{name} ratio": seconds / mine}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("passes", type=Path, nargs="?")
    parser.add_argument("--iteration", type=Path)
    parser.add_argument("--whole", action="store_true", help="all weights train")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--group", type=int, default=12)
    parser.add_argument("--anchors", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=4)
    parser.add_argument("--text-tokens", type=int, default=512)
    args = parser.parse_args()

    ours = json.loads((args.iteration or args.passes).read_text())
    device = "cuda" if ours["device"].startswith("Cuda") else "cpu"
    kind = torch.bfloat16 if ours["precision"] == "bf16" else torch.float32
    model = build(args.config, None if args.whole else args.rank, device, kind)
    of = of_iteration if args.iteration else of_passes
    found = of(model, ours, args, device, kind)
    if args.json:
        print(json.dumps(found))
        return
    for row in found.pop("rows", [found]):
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))


if __name__ == "__main__":
    main()
