"""Recomputes one Neighbor GRPO update that `ng-train align --record-update FILE` stored.

    python tests/parity/update.py FILE

Everything is computed again in f64, the gradient by torch's autograd. Tensors of FILE (f32; M
transitions, R rewards, G members, S tokens of C numbers):

    x_in, v_old, v_theta, gradient [M, S, C]    t_in, t_next, objective [M]
    candidates [M, G, S, C]    rewards [M, R, G]    advantages, log_rho [M, G]

`gradient` is that of the mean objective with respect to v_theta. The metadata's `config` is the
run's configuration as JSON.
"""

import argparse
import json
from pathlib import Path

import torch
from report import Report, tensors
from safetensors import safe_open

# f32 sums over some thousand numbers against f64; advantages come from rewards stored as f32.
LOG_RHO, OBJECTIVE, GRADIENT, ADVANTAGE = 1e-6, 2e-6, 1e-4, 1e-4
GUARD = 10.0


def advantages(scores, rewards, config):
    """Advantages [G] of one group from scores [R, G] of the rewards configured."""
    total = torch.zeros_like(scores[0])
    for row, reward in zip(scores, rewards, strict=True):
        std = row.std(correction=1)
        if std >= reward["std_floor"]:
            total += reward["weight"] * (row - row.mean()) / std
    norm = torch.linalg.vector_norm(total, config["quasi_norm"])
    if norm == 0:
        return total
    values = total * len(total) ** 0.5 / norm
    if config["limit"] is not None:
        values = values.clamp(-config["limit"], config["limit"])
        values -= values.mean()
    return values


def temperature(config, dt, n):
    """τ_eff of a transition over `dt` of latents of `n` numbers."""
    match config["distance"]:
        case "mean":
            return config["tau"] * n
        case "sum":
            return config["tau"]
        case "sde-matched":
            return 2 * config["tau"] ** 2 * abs(dt) * n
    raise ValueError(f"unknown distance {config['distance']}")


def objective(x_in, v_old, v_theta, dt, candidates, advantage, tau, clip):
    """log ρ [G] and J of one transition; x_in, v_old, v_theta [N], candidates [G, N]."""
    x_old, x_theta = x_in + dt * v_old, x_in + dt * v_theta
    offset = candidates - x_old
    tilt = 2 / tau * offset @ (x_theta - x_old)
    q = torch.log_softmax(-offset.square().sum(dim=1) / tau, dim=0).detach()
    log_rho = tilt - torch.logsumexp(q + tilt, dim=0)
    rho = log_rho.clamp(-GUARD, GUARD).exp()
    clipped = rho.clamp(1 - clip, 1 + clip)
    return log_rho, torch.minimum(advantage * rho, advantage * clipped).mean()


def recompute(record, config):
    """log ρ [M, G], J [M] and the gradient [M, N] of the mean of J, from the rest of `record`."""
    m = len(record["t_in"])
    clip = config["clip"]
    v_theta = record["v_theta"].reshape(m, -1).clone().requires_grad_()
    flat = {name: record[name].reshape(m, -1) for name in ("x_in", "v_old")}
    log_rho, values = [], []
    for i in range(m):
        dt = record["t_next"][i] - record["t_in"][i]
        ratios, value = objective(
            flat["x_in"][i], flat["v_old"][i], v_theta[i], dt,
            record["candidates"][i].flatten(start_dim=1), record["advantages"][i],
            temperature(config, dt, v_theta.shape[1]), clip,
        )
        log_rho.append(ratios.detach())
        values.append(value)
    values = torch.stack(values)
    (gradient,) = torch.autograd.grad(values.mean(), v_theta)
    return torch.stack(log_rho), values.detach(), gradient


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    path = parser.parse_args().record

    record = {name: torch.from_numpy(value).double() for name, value in tensors(path).items()}
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
    rewards = config["rewards"]
    log_rho, values, gradient = recompute(record, config["neighbor"])
    # Within rounding of the clip's edge a ratio may fall on either side of it, and J has a kink.
    clip = config["neighbor"]["clip"]
    edges = torch.tensor([1 + clip, 1 - clip], dtype=torch.float64).log()
    distance = (log_rho[:, :, None] - edges).abs().amin(dim=(1, 2))
    inside = distance > LOG_RHO
    m, g = log_rho.shape
    n = gradient.shape[1]

    report = Report(f"one update in f64: {m} transitions, {g} members, {n} numbers a latent")
    expected = torch.stack([advantages(scores, rewards, config["advantage"])
                            for scores in record["rewards"]])
    title = f"advantages of {len(rewards)} rewards"
    report.absolute(title, record["advantages"], expected, ADVANTAGE)
    report.equal("groups that are not flat", bool((expected.abs().amax(dim=1) > 0).all()), True)
    report.equal("weights moved since the rollout", bool(log_rho.abs().max() > LOG_RHO), True)
    report.absolute("log ρ", record["log_rho"], log_rho, LOG_RHO)
    report.absolute("objective", record["objective"], values, OBJECTIVE)
    report.equal("half are off the clip's edge", bool(inside.sum() * 2 >= m), True)
    recorded = record["gradient"].reshape(m, -1)
    title = f"gradient of {int(inside.sum())} off the clip's edge"
    report.relative(title, recorded[inside], gradient[inside], GRADIENT)
    report.finish()


if __name__ == "__main__":
    main()
