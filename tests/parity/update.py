"""Recomputes one Neighbor GRPO update that `ng-train align --record-update FILE` stored.

    python tests/parity/update.py FILE

Everything is computed again in f64, the gradient by torch's autograd. Tensors of FILE (K transitions
of one anchor, G candidates, … the latent's axes; f32):

    x_in, v_old, v_theta, gradient [K, …]    t_in, t_next [K]    candidates [K, G, …]
    advantages [G]    log_rho [K, G]    objective [K]

`gradient` is that of objective k with respect to v_theta k: not negated, not divided by K. A file of
a single transition may leave the axis K out. Metadata: `tau`, `distance` (`mean` or `sum` over the
latent's dimensions), `clip`; the defaults are those of the preset `neighbor`. With rewards [G] of a
single reward in the file, the advantages too are computed again: z = (r − mean)/std with the unbiased
std and, if the metadata name `p`, √G · z/‖z‖_p.
"""

import argparse
from pathlib import Path

import torch
from report import Report, tensors
from safetensors import safe_open

# f32 sums over some thousand dimensions against f64.
LOG_RHO, OBJECTIVE, GRADIENT, ADVANTAGE = 2e-6, 2e-6, 1e-4, 1e-5
GUARD = 10.0


def objective(x_in, v_old, v_theta, dt, candidates, advantages, tau, clip):
    """log ρ [G] and J of one transition; x_in, v_old, v_theta [D], candidates [G, D]."""
    x_old, x_theta = x_in + dt * v_old, x_in + dt * v_theta
    offset = candidates - x_old
    tilt = 2 / tau * offset @ (x_theta - x_old)
    q = torch.log_softmax(-offset.square().sum(dim=1) / tau, dim=0).detach()
    log_rho = tilt - torch.logsumexp(q + tilt, dim=0)
    rho = log_rho.clamp(-GUARD, GUARD).exp()
    clipped = rho.clamp(1 - clip, 1 + clip)
    return log_rho, torch.minimum(advantages * rho, advantages * clipped).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    path = parser.parse_args().record

    record = {name: torch.from_numpy(value).double() for name, value in tensors(path).items()}
    with safe_open(path, "np") as file:
        settings = file.metadata() or {}
    if record["t_in"].ndim == 0:
        axis = {"x_in", "v_old", "v_theta", "gradient", "t_in", "t_next", "candidates", "log_rho",
                "objective"}
        record = {n: v[None] if n in axis else v for n, v in record.items()}

    k, g = record["candidates"].shape[:2]
    flat = {name: record[name].reshape(k, -1) for name in ("x_in", "v_old", "v_theta", "gradient")}
    candidates = record["candidates"].reshape(k, g, -1)
    clip = float(settings.get("clip", 1e-4))
    tau = float(settings.get("tau", 1.0))
    if settings.get("distance", "mean") == "mean":
        tau *= flat["x_in"].shape[1]

    report = Report(f"one update in f64, {path}: K {k}, G {g}, {flat['x_in'].shape[1]} dimensions")
    if "rewards" in record:
        rewards = record["rewards"].reshape(-1)
        normal = (rewards - rewards.mean()) / rewards.std()
        if "p" in settings:
            norm = torch.linalg.vector_norm(normal, float(settings["p"]))
            normal = normal / norm * len(normal) ** 0.5
        report.absolute("advantages", record["advantages"], normal, ADVANTAGE)
    report.equal("advantages are not all zero", bool(record["advantages"].abs().max() > 0), True)
    for i in range(k):
        v_theta = flat["v_theta"][i].clone().requires_grad_()
        dt = record["t_next"][i] - record["t_in"][i]
        log_rho, value = objective(
            flat["x_in"][i], flat["v_old"][i], v_theta, dt, candidates[i], record["advantages"],
            tau, clip,
        )
        (gradient,) = torch.autograd.grad(value, v_theta)
        step = f"t {record['t_in'][i]:.4f} → {record['t_next'][i]:.4f}"
        report.absolute(f"{step} log ρ", record["log_rho"][i], log_rho.detach(), LOG_RHO)
        report.absolute(f"{step} objective", record["objective"][i], value.detach(), OBJECTIVE)
        report.relative(f"{step} gradient", flat["gradient"][i], gradient, GRADIENT)
    report.finish()


if __name__ == "__main__":
    main()
