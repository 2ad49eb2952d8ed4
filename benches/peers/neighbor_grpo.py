"""The peer of `ng-train align`: iterations of Neighbor GRPO in plain PyTorch with diffusers.

    python benches/peers/neighbor_grpo.py MODEL --prompts FILE --size 32 --prompts-per-iteration 4
        --group 12 --steps 8 --anchors 4 --updates 1 --train-steps 4 --sigma 0.5 --shift 3 --learning-rate 5e-5

Whole groups are rolled out by DPM-Solver++ 2M and decoded in one batch each, scored by their size as JPEG,
and each update is a batch of its anchors' trained steps of all groups: forward, surrogate policy (paper
Eq. 8 to 10), backward, AdamW. Everything is f32 on the CPU. Prints one JSON object: medians of the seconds
of rollout, decode and update over the iterations after the first, and of their sum, without the reward; the
network passes an image; and the number of parameters that train.
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, FluxPipeline
from diffusers.utils import logging

QUASI_NORM = 0.8
CLIP = 1e-4


def velocity(transformer, x_t, t, condition):
    return transformer(hidden_states=x_t, timestep=t, return_dict=False, **condition)[0]


def rows(condition, index):
    """The condition of prompts `index`; position ids are the same for all."""
    per_prompt = ("encoder_hidden_states", "pooled_projections")
    return {k: v[index] if k in per_prompt else v for k, v in condition.items()}


@torch.no_grad()
def encode(pipe, prompts, side):
    text, pooled, text_ids = pipe.encode_prompt(
        prompt=prompts, prompt_2=None, max_sequence_length=min(pipe.tokenizer_2.model_max_length, 512),
    )
    image_ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, text.device, text.dtype)
    return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": text_ids,
            "img_ids": image_ids, "guidance": None}


@torch.no_grad()
def rollout(pipe, scheduler, condition, args, side):
    """States before each step and velocities there, both [P·G, S, C] a step; the states at t = 0 last."""
    n, channels = args.prompts_per_iteration, pipe.vae.config.latent_channels
    shared = torch.randn(n, 1, channels, side, side)
    spread = torch.randn(n, args.group, channels, side, side)
    eps = ((1 - args.sigma**2) ** 0.5 * shared + args.sigma * spread).flatten(0, 1)
    x_t = pipe._pack_latents(eps, len(eps), channels, side, side)
    members = rows(condition, torch.arange(n).repeat_interleave(args.group))
    scheduler.set_timesteps(args.steps)
    states, velocities = [x_t], []
    for t in scheduler.timesteps:
        v = velocity(pipe.transformer, x_t, (t / 1000).expand(len(x_t)), members)
        x_t = scheduler.step(v, t, x_t, return_dict=False)[0]
        states.append(x_t)
        velocities.append(v)
    return torch.stack(states), torch.stack(velocities)


@torch.no_grad()
def decode(pipe, x0, side):
    pixels = side * pipe.vae_scale_factor
    latents = pipe._unpack_latents(x0, pixels, pixels, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])


def reward(images):
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        sizes.append(-file.tell() / 1000)
    return torch.tensor(sizes)


def advantages(rewards):
    """[P, G], standardised within each group, with the quasi-norm of Eq. 11."""
    a = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    return a * rewards.shape[1] ** 0.5 / a.norm(QUASI_NORM, dim=1, keepdim=True)


def log_policy(candidates, x):
    """[M, G] from candidates [M, G, S, C] and arrivals [M, S, C]."""
    return torch.log_softmax(-(candidates - x[:, None]).square().mean((2, 3)), 1)


def updates(transformer, optimizer, scheduler, condition, states, velocities, a, args):
    """Optimiser steps, each for its part of B anchors, over their K trained steps of every group."""
    n, group, k = args.prompts_per_iteration, args.group, args.train_steps
    states, velocities = (x.unflatten(1, (n, group)) for x in (states, velocities))
    anchors = torch.stack([torch.randperm(group)[:args.anchors] for _ in range(n)])
    steps = torch.stack([torch.randperm(args.steps - 1)[:k] for _ in range(n)]).flatten()
    of_item = torch.arange(n).repeat_interleave(k)
    for slots in torch.arange(args.anchors).chunk(args.updates):
        item = torch.arange(n * k).repeat(len(slots))
        prompt, step = of_item[item], steps[item]
        member = anchors[prompt, slots.repeat_interleave(n * k)]
        t = scheduler.timesteps[step] / 1000
        dt = (scheduler.sigmas[step + 1] - scheduler.sigmas[step])[:, None, None]
        candidates, of_group, given = states[step + 1, prompt], a[prompt], rows(condition, prompt)
        x_t, v_old = states[step, prompt, member], velocities[step, prompt, member]
        old = log_policy(candidates, x_t + v_old * dt)
        new = log_policy(candidates, x_t + velocity(transformer, x_t, t, given) * dt)
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(of_group * ratio, of_group * clipped).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return n * k * args.anchors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="width and height in pixels")
    parser.add_argument("--prompts-per-iteration", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--anchors", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--train-steps", type=int, required=True)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--shift", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--iterations", type=int, default=5, help="after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    pipe = FluxPipeline.from_pretrained(
        args.model, torch_dtype=torch.float32, local_files_only=True,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=args.shift,
    )
    transformer = pipe.transformer.train()
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.learning_rate, eps=1e-12, weight_decay=1e-4, fused=True,
    )
    prompts = args.prompts.read_text().splitlines()
    side = args.size // pipe.vae_scale_factor
    seconds = {"rollout": [], "decode": [], "update": [], "iteration": []}
    for iteration in range(args.iterations + 1):
        first = iteration * args.prompts_per_iteration
        batch = prompts[first:first + args.prompts_per_iteration]
        start = time.perf_counter()
        condition = encode(pipe, batch, side)
        states, velocities = rollout(pipe, scheduler, condition, args, side)
        rolled = time.perf_counter()
        images = decode(pipe, states[-1], side)
        decoded = time.perf_counter()
        a = advantages(reward(images).reshape(len(batch), args.group))
        scored = time.perf_counter()
        n_passes = updates(
            transformer, optimizer, scheduler, condition, states, velocities, a, args,
        )
        updated = time.perf_counter()
        times = {"rollout": rolled - start, "decode": decoded - rolled, "update": updated - scored}
        for name, value in (times | {"iteration": sum(times.values())}).items():
            seconds[name].append(value)
    print(json.dumps({
        "seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "nfe": {"rollout": len(velocities), "update": n_passes / len(images)},
        "parameters": sum(p.numel() for p in transformer.parameters() if p.requires_grad),
    }))


if __name__ == "__main__":
    main()
