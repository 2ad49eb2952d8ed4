#!/usr/bin/env python3
"""Long trials of runs shared by several processes: `make soak`.

  equal    every algorithm that compares images, whole and LoRA, on 2, 3 and 4 ranks against one process, states
           divided and weights, too, the latter also on two nodes of two; groups whole on each rank and one group
           spread over all: gradient and loss of the first update
  narrow   the same of all weights in bf16
  killed   a random rank killed at a random time, states or weights divided: the launcher ends with an error that
           names it
  frozen   a random rank stopped: the others end when their time is over, naming it
  saves    all ranks killed at once at random times around saves, and taken up again: whatever shows is whole
  disk     a full disk and a folder that takes nothing any more: all ranks end with the reason, what was saved is whole and goes on
  rotten   a bit turned in each file of a checkpoint: it is passed over, and the run ends with the same bytes
  resumed  20 iterations against 10 and 10 on 1 and 2 ranks: the same bytes of weights, moments and average; what
           2 ranks saved, 1, 3 and 4 take up and end with the same bytes
  restarted  torchrun --max-restarts 3, a rank killed three times: the same bytes as undisturbed
  memory   a rank of 2 while it saves and while it loads, above what it holds before and after: no more than a block, and
           what is sent for it

Prints a line a trial and n of n at the end; ends with 1 if any failed.
"""

import argparse
import array
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Those of [direct] follow the gradients of networks, which JPEG's size has none of.
ALGORITHMS = sorted(path.stem for path in (ROOT / "trainer/algorithms").glob("*.toml") if "[direct]" not in path.read_text())
SETTINGS = {
    "model": "tests/fixtures/tiny-flux/pipeline",
    "rewards": "[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]",
    "group_size": 4,
    "prompts_per_iteration": 12,
    "updates": 2,
    "rollout.steps": 8,
    "rollout.size": "[32, 32]",
    "optimizer.learning_rate": 1e-3,
    "ranks.step_seconds": 120,
}
# Of a latent of those images.
NUMBERS = 256
# Seconds after which a rank that is frozen is given up.
PATIENCE = 5
# Seconds within which a save here is over.
SAVE_SECONDS = 0.1


def command(out, ranks, more=(), **settings):
    line = [PROGRAM, "align", "--preset", "signs", "--device", "cpu", "--threads", "1", *more]
    for key, value in {**SETTINGS, "output": out, **settings}.items():
        line += ["--set", f"{key.replace('__', '.')}={value}"]
    return line + (["--processes", str(ranks)] if ranks > 1 else [])


def run(out, ranks, *args, nodes=1, **kwargs):
    """Nodes are launchers that meet as those of two machines do."""
    line, places = command(out, ranks // nodes, *args, **kwargs), [{}]
    if nodes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared = {"NUM_MACHINES": str(nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        places = [{**shared, "MACHINE_RANK": str(node)} for node in range(nodes)]
    start = lambda place: subprocess.Popen(
        line, cwd=ROOT, env={**os.environ, **place}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    launchers = [start(place) for place in places]
    said = [launcher.communicate()[1].strip() for launcher in launchers]
    if any(launcher.returncode for launcher in launchers):
        raise RuntimeError("\n".join(said))


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    files = sorted((Path(out) / "aligned/transformer").glob("*.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def gradient(out):
    """AdamW's first moments after one update, which are the gradient but for a factor: a list a segment."""
    segments = {}
    for path in sorted((Path(out) / "checkpoints/iteration-000001").glob("training_state*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if key.startswith("m."):
                begin, end = entry["data_offsets"]
                segments.setdefault(key, array.array("f")).frombytes(data[start + begin:start + end])
    return segments


def away(one, several):
    """Of the gradient, as a share of its length; behind what ranks divide lie zeros that make it even."""
    between = math.hypot(*(math.dist(one[key], several[key][: len(one[key])]) for key in one))
    return between / math.hypot(*(math.hypot(*values) for values in one.values()))


def compared(home, title, more, shard, worlds, settings):
    """The largest differences of gradient and loss; J is of the size of advantages, which is 1."""
    for seed in range(8):
        found = {}
        for ranks in (1, *worlds):
            out = home / "run"
            shutil.rmtree(out, ignore_errors=True)
            nodes = 2 if shard == "node" and ranks > 1 else 1
            run(out, ranks, more, nodes=nodes, iterations=1, updates=1, seed=seed, ranks__shard=shard, **settings)
            found[ranks] = metrics(out)[0], gradient(out)
        one, of_one = found[1]
        # A pixel that a rounding moved is another reward: there is nothing to compare.
        if all(found[n][0]["reward_std/jpeg"] == one["reward_std/jpeg"] for n in worlds):
            break
    else:
        return None, f"{title}: no seed with equal rewards"
    loss = "policy/objective"
    of_gradient = max(away(of_one, found[n][1]) for n in worlds)
    of_loss = max(abs(found[n][0][loss] - one[loss]) / max(1, abs(one[loss])) for n in worlds)
    return max(of_gradient, of_loss), f"{title}, seed {seed}: gradient {of_gradient:.1e}, loss {of_loss:.1e}"


def divisions(algorithm):
    one = {"prompts_per_iteration": 1, "group_size": 4 if algorithm == "branch-grpo" else 12}
    for shard, worlds in (("states", (2, 3, 4)), ("all", (2, 3, 4)), ("node", (4,))):
        yield f"{shard} divided, whole groups", shard, worlds, {}
        even = tuple(n for n in worlds if one["group_size"] % n == 0)
        yield f"{shard} divided, one group", shard, even, one


def cases():
    """Every algorithm, all weights and a LoRA, as every division of the work: a title, how to divide, settings."""
    for algorithm in ALGORITHMS:
        for what, lora in (("all weights", {}), ("LoRA", {"lora__rank": 4})):
            for how, shard, worlds, division in divisions(algorithm):
                yield f"{algorithm}, {what}, {how}", shard, worlds, {"algorithm": algorithm, **lora, **division}


def rounding(algorithm):
    """How far the order of additions may lead apart. An SDE of constant noise sees states through (x_next - mean)/std: the
    rounding of numbers below 4 over that noise. A distance that is summed up has log-ratios of N rounded products."""
    settings = tomllib.loads((ROOT / f"trainer/algorithms/{algorithm}.toml").read_text())
    sde, neighbor, unit = settings.get("sde", {}), settings.get("neighbor", {}), 2**-24
    if sde.get("noise") == "constant":
        return max(1e-6, 4 * unit / (sde["level"] / math.sqrt(SETTINGS["rollout.steps"])))
    if neighbor.get("distance") == "sum":
        return max(1e-6, 2 * math.sqrt(NUMBERS) * unit / neighbor.get("tau", 1))
    return 1e-6


def equal(home, _):
    for title, *case in cases():
        off, text = compared(home, title, (), *case)
        yield off is not None and off <= rounding(case[-1]["algorithm"]), text


def narrow(home, _):
    """Where rollout and update batches are rounded apart, a run is refused, as one process would refuse it."""
    for title, *case in cases():
        title = f"bf16, {title}"
        try:
            off, text = compared(home, title, ("--precision", "bf16"), *case)
            yield off is not None and off <= 2e-2, text
        except RuntimeError as error:
            yield "|log ratio| is" in str(error), f"{title}: {str(error).splitlines()[-1]}"


def ranks_of(launcher):
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    rank = lambda pid: next(int(v[5:]) for v in variables[pid] if v.startswith(b"RANK="))
    return [int(pid) for pid in sorted(children, key=rank)]


def disturbed(home, trial, number, limit, expected):
    out, n = home / f"run-{trial}", random.choice((2, 3))
    shared = {"ranks__step_seconds": PATIENCE, "ranks__shard": random.choice(("states", "all"))}
    line = command(out, n, iterations=10**6, save_every=3, prompts_per_iteration=6, **shared)
    launcher = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not has_begun(out):
        if launcher.poll() is not None:
            return False, launcher.stderr.read()
        time.sleep(0.02)
    time.sleep(random.random() * 2)
    pids, victim = ranks_of(launcher), random.randrange(n)
    os.kill(pids[victim], number)
    began = time.monotonic()
    others = [pid for rank, pid in enumerate(pids) if rank != victim]
    while any(alive(pid) for pid in others) and time.monotonic() - began < 60:
        time.sleep(0.005)
    took = time.monotonic() - began
    if number == signal.SIGSTOP:
        os.kill(pids[victim], signal.SIGKILL)
    _, error = launcher.communicate()
    shutil.rmtree(out, ignore_errors=True)
    named = error.count(f"rank {victim} {expected}")
    well = took <= limit and named >= n - 1 and launcher.returncode != 0
    how = shared["ranks__shard"]
    return well, f"rank {victim} of {n}, {how} divided: {took:.2f} s" + ("" if well else f"\n{error}")


def has_begun(out):
    path = out / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def killed(home, n):
    for trial in range(n or 100):
        yield disturbed(home, trial, signal.SIGKILL, 1.0, "has ended")


def frozen(home, n):
    limit = 1.1 * PATIENCE
    for trial in range(n or 100):
        yield disturbed(home, trial, signal.SIGSTOP, limit, "gave no sign of life")


def states(folder, stem="training_state"):
    """The numbers of files, without what a file says of itself, which names its folder."""
    found = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        data = path.read_bytes()
        found[path.name] = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    return found


def resumed(home, _):
    last = "checkpoints/iteration-000020"
    for ranks in (1, 2):
        whole, parts = home / f"whole-{ranks}", home / f"parts-{ranks}"
        run(whole, ranks, iterations=20, optimizer__ema=0.9)
        run(parts, ranks, iterations=10, optimizer__ema=0.9)
        shutil.rmtree(parts / "aligned")
        run(parts, ranks, more=["--resume"], iterations=20, optimizer__ema=0.9)
        same = weights(whole) == weights(parts) and states(whole / last) == states(parts / last) != {}
        yield same, f"{ranks} ranks"
    for ranks in (1, 3, 4):
        other = home / f"on-{ranks}"
        shutil.copytree(home / "whole-2", other)
        shutil.rmtree(other / "aligned")
        run(other, ranks, more=["--resume"], iterations=20, optimizer__ema=0.9)
        same = weights(other) == weights(home / "whole-2")
        # What the weights answer that were taken up.
        same &= states(other / "aligned", "reference") == states(home / "whole-2/aligned", "reference") != {}
        yield same, f"of 2 ranks on {ranks}"


def restarted(home, _):
    calm, out = home / "calm", home / "disturbed"
    run(calm, 2, iterations=30, save_every=2)
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--no-python"]
    line = launcher + command(out, 1, ["--resume"], iterations=30, save_every=2)
    with open(home / "said", "w") as said:
        torchrun = subprocess.Popen(line, cwd=ROOT, stdout=said, stderr=said)
        victims, deadline = set(), time.monotonic() + 600
        while len(victims) < 3 and torchrun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            ready = len(children) == 2 and not victims & set(children)
            saved = list((out / "checkpoints").glob("iteration-*")) if out.exists() else []
            if ready and has_begun(out) and len(saved) > 0:
                time.sleep(random.random() * 2)
                victim = random.choice(children)
                if torchrun.poll() is None and alive(int(victim)):
                    victims.update(children)
                    os.kill(int(victim), signal.SIGKILL)
                    disturbed_times = len(victims) // 2
                    if disturbed_times == 3:
                        break
        code = torchrun.wait()
    n = len(victims) // 2
    well = code == 0 and n > 0 and weights(out) == weights(calm)
    yield well, f"{n} kills" + ("" if well else (home / "said").read_text()[-2000:])


def replaced(home, _):
    """torchruns of one rank each, which count restarts apart."""
    calm = home / "calm"
    run(calm, 2, iterations=30, save_every=2)
    for lost in ("a rank", "a machine"):
        out, said = home / lost.split()[1], open(home / "said", "w")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        launcher = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--no-python"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "ng"]
        launcher += ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=3"]
        env = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(int(lost == "a machine")))
        start = lambda: subprocess.Popen(
            launcher + command(out, 1, ["--resume"], iterations=30, save_every=2), cwd=ROOT, env=env, stdout=said,
            stderr=said)
        # The first one serves torchrun's own store.
        machines = [start()]
        time.sleep(3)
        machines.append(start())
        deadline = time.monotonic() + 300
        while not (out.exists() and has_begun(out) and list((out / "checkpoints").glob("iteration-*"))):
            if time.monotonic() > deadline or any(machine.poll() is not None for machine in machines):
                break
            time.sleep(0.05)
        pid = machines[1].pid
        (rank,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if lost == "a machine":
            machines[1].kill()
        os.kill(int(rank), signal.SIGKILL)
        if lost == "a machine":
            machines[1].wait()
            machines[1] = start()
        codes = []
        for machine in machines:
            try:
                codes.append(machine.wait(max(1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                machine.terminate()
                codes.append(None)
        well = codes == [0, 0] and weights(out) == weights(calm)
        yield well, f"{lost} lost" + ("" if well else f": {codes}\n" + (home / "said").read_text()[-3000:])


def memory(home, _):
    """Of a model of many blocks, so that one is little: anonymous memory by the kernel's account."""
    model = home / "model"
    shutil.copytree(ROOT / SETTINGS["model"], home / "like")
    path = home / "like/transformer/config.json"
    config = json.loads(path.read_text())
    config.update(num_layers=6, num_single_layers=12, num_attention_heads=16)
    path.write_text(json.dumps(config))
    subprocess.run([PROGRAM, "init", "--like", home / "like", "--out", model], check=True, capture_output=True)
    out = home / "run"
    sizes = {"prompts_per_iteration": 2, "updates": 1}
    line = command(out, 2, model=model, iterations=4, save_every=1, keep=1, **sizes)
    # What is let go is seen at once.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    launcher = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held, before, above = {}, {}, {0: 0.0, 1: 0.0}
    while launcher.poll() is None:
        saving = any((out / "checkpoints").glob(".iteration-*")) if out.exists() else False
        try:
            for rank, pid in enumerate(ranks_of(launcher)):
                now = anonymous(pid)
                if saving:
                    above[rank] = max(above[rank], now - before.setdefault(rank, held[rank]))
                else:
                    before.pop(rank, None)
                held[rank] = now
        except (OSError, KeyError, StopIteration):
            pass
        time.sleep(0.001)
    weights_mib = sum(p.stat().st_size for p in (out / "aligned/transformer").glob("*.safetensors")) / 2**20
    for rank, more in above.items():
        yield more < weights_mib / 8, f"saving, rank {rank}: {more:.1f} MiB above; all weights are {weights_mib:.0f}"
    for shard in ("states", "all"):
        yield loading(out, line, env, shard, weights_mib)


def anonymous(pid):
    """MiB of anonymous memory."""
    status = dict(l.split(":", 1) for l in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def loading(out, line, env, shard, weights_mib):
    """The most that a rank holds until its run begins, above what it holds then."""
    said = out / f"said-{shard}"
    shutil.rmtree(out / "aligned", ignore_errors=True)
    line = [*line, "--resume", "--set", f"ranks.shard={shard}", "--set", f"iterations={5 + (shard == 'all')}"]
    with said.open("w") as log:
        launcher = subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=log)
    most, held = 0.0, 0.0
    while launcher.poll() is None:
        try:
            held = anonymous(next(iter(ranks_of(launcher))))
        except (OSError, KeyError, StopIteration):
            continue
        most = max(most, held)
        if "neighbor learns" in said.read_text():
            break
        time.sleep(0.001)
    launcher.wait()
    # A block is put together from as much that is sent.
    well = launcher.returncode == 0 and held > 0 and most - held < weights_mib / 5
    return well, f"loading, shard = {shard}: {most - held:.1f} MiB above the {held:.0f} held; all weights are {weights_mib:.0f}"


def broken(out):
    """Checkpoints that show and are not what their sums say, and the number of those that show."""
    folders = sorted((out / "checkpoints").glob("iteration-*"))
    whole = lambda folder: subprocess.run(
        ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
    return [folder.name for folder in folders if not whole(folder)], len(folders)


def end(launcher):
    """Every process of a run at once, as when a machine loses its power supply."""
    for pid in [launcher.pid, *ranks_of(launcher)]:
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()


def is_saving(out):
    return any((out / "checkpoints").glob(".iteration-*"))


def saves(home, n):
    n, out = n or 300, home / "run"
    line = command(out, 2, more=["--resume"], iterations=10**6, save_every=1, prompts_per_iteration=2, updates=1,
                   stop_after_idle=0)
    seen, visible, trials = 0, 0, 0
    while seen < n and trials < 3 * n:
        trials += 1
        had = visible
        before = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
        launcher = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while launcher.poll() is None and not (has_begun(out) and len(metrics(out)) > before):
            time.sleep(0.01)
        while launcher.poll() is None and not is_saving(out):
            time.sleep(0.001)
        time.sleep(random.random() * SAVE_SECONDS)
        if launcher.poll() is not None:
            yield False, launcher.stderr.read()
            return
        saving = is_saving(out)
        end(launcher)
        seen += saving
        bad, visible = broken(out)
        # The first save of all may be the one that is killed.
        yield not bad and visible >= min(had, 1), f"{'in a save' if saving else 'after one'}, {visible} whole, {seen} in saves so far {bad}"


def disk(home, _):
    """A file system that is full, and a folder in which nothing can be made any more."""
    place = home / "full"
    place.mkdir()
    sized = lambda size, *more: subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([*more, f"size={size}"]), "tmpfs", place], check=True)
    sized("14m")
    try:
        yield failed(place / "run", "No space left", lambda _: None, lambda _: sized("400m", "remount"))
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    turn = lambda how: lambda out: subprocess.run(["chattr", how, out / "checkpoints"], check=True)
    yield failed(home / "closed", "not permitted", turn("+i"), turn("-i"))


def failed(out, error, harm, mend):
    """All ranks end with the reason; what shows is whole, and the run goes on once it can."""
    line = command(out, 2, iterations=10**6, save_every=1, prompts_per_iteration=2, updates=1, keep=4)
    launcher = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while launcher.poll() is None and not any((out / "checkpoints").glob("iteration-*")):
        time.sleep(0.01)
    harm(out)
    _, said = launcher.communicate(timeout=120)
    bad, visible = broken(out)
    well = launcher.returncode != 0 and error in said and not bad
    mend(out)
    newest = max(int(path.name[10:]) for path in (out / "checkpoints").glob("iteration-*"))
    again = [*line, "--resume", "--set", f"iterations={newest + 1}"]
    well &= subprocess.run(again, cwd=ROOT, capture_output=True).returncode == 0
    return well, f"{error}, after iteration {newest}, {visible} whole" + ("" if well else f"\n{said} {bad}")


def rotten(home, _):
    whole = home / "whole"
    settings = {"save_every": 1, "prompts_per_iteration": 2, "updates": 1, "keep": 2}
    run(whole, 2, iterations=3, **settings)
    last = whole / "checkpoints/iteration-000003"
    for name in sorted(str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()):
        out = home / "rotten"
        shutil.copytree(whole, out)
        shutil.rmtree(out / "aligned")
        path = out / "checkpoints/iteration-000003" / name
        data = bytearray(path.read_bytes())
        bit = random.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        line = command(out, 2, more=["--resume"], iterations=3, **settings)
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        well = done.returncode == 0 and "iteration-000003" in done.stderr and weights(out) == weights(whole)
        shutil.rmtree(out)
        yield well, name + ("" if well else f"\n{done.stderr}")


PARTS = {
    "equal": equal, "narrow": narrow, "killed": killed, "frozen": frozen, "saves": saves, "disk": disk, "rotten": rotten,
    "resumed": resumed, "restarted": restarted, "replaced": replaced, "memory": memory,
}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options.add_argument("--program", default=ROOT / "target/release/ng-train", help="ng-train")
    options.add_argument("-n", type=int, help="trials of killed and frozen [100], kills in a save of saves [300]")
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    global PROGRAM
    PROGRAM = str(chosen.program)
    random.seed(chosen.seed)
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        options.error(f"no part {', '.join(sorted(unknown))}: {', '.join(PARTS)} are there")
    summary = []
    for part in chosen.parts or PARTS:
        with tempfile.TemporaryDirectory() as home:
            outcomes = []
            for well, text in PARTS[part](Path(home), chosen.n):
                outcomes.append(well)
                print(f"{part} {'ok' if well else 'FAILED'}: {text}", flush=True)
        summary.append((part, sum(outcomes), len(outcomes)))
    for part, well, n in summary:
        print(f"{part}: {well} of {n}")
    sys.exit(any(well < n for _, well, n in summary))


if __name__ == "__main__":
    main()
