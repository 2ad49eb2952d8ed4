"""The long forms of the attacks that the suite makes in short: `make soak`.

    python3 tests/soak/attacks.py --programs target/release --out out/soak [PART=N ...]

Parts, each with what it counts and its control:

    kills=500   SIGKILL of `align` at random moments, most of them while a checkpoint is written: no checkpoint that
                was visible is lost or broken, the next run goes on, and the end is that of an undisturbed run, to the
                byte. Control: a writer that writes in place, under the same kills.
    power=200   what an ext4 disk holds at random moments without what was never flushed (root: loop mounts): what
                is visible is whole, what was acknowledged is there. Control: without the names' last flush this
                would be the same as `cp` into the mounted folder, whose files are counted under the same cuts.
    rot=100     a bit, a page or the end of a file of the newest checkpoint: said in one line, the checkpoint before
                it is used, and the end is that of an undisturbed run. Control: without damage there is no warning.
    pairs=50    two runs into one folder, up to three seconds apart: one writes. Control: in two folders both do.
    swaps=100   `ng-export --force` while `ng-sample` starts: an image of one model or a refusal. Control: the two
                models' images differ.

Exit code 1 when a count is not n of n. The seed is fixed; moments are the machine's.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = {"kills": 500, "power": 200, "rot": 100, "pairs": 50, "swaps": 100}
ENV = dict(os.environ, OMP_NUM_THREADS="1")
STATE = "training_state.safetensors"
rng = random.Random(5)


def align(folder, *more, resume=True, iterations=6):
    sets = {"output": folder, "iterations": iterations, "prompts_per_iteration": 1, "save_every": 1, "group_size": 4,
            "anchors": 2, "updates": 1, "rollout.steps": 4, "sheet_prompts": args.out / "one.txt"}
    command = [args.programs / "ng-train", "align", "--preset", "signs", "--threads", "1"] + ["--resume"] * resume
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    return [str(part) for part in command + list(more)]


def start(command):
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(command):
    child = start(command)
    out, err = child.communicate(timeout=600)
    return child.returncode, out, err


def broken(folder):
    """Files of a finished folder that are not what it lists, by an implementation of SHA-256 not ours."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return ["SHA256SUMS"]
    bad = []
    for line in sums.read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            bad.append(name)
    return bad


def checkpoints(folder):
    """Visible ones, the newest last."""
    return sorted((folder / "checkpoints").glob("iteration-*")) if (folder / "checkpoints").exists() else []


def numbers(state):
    """A state without what it says of itself, which names its folder."""
    data = state.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()


def ending(folder):
    """What a finished run must have made."""
    return (folder / "aligned/SHA256SUMS").read_text(), numbers(checkpoints(folder)[-1] / STATE)


class Tally:
    def __init__(self, part):
        self.part, self.counts, self.examples = part, {}, []

    def count(self, name, good, example=""):
        n, of = self.counts.get(name, (0, 0))
        self.counts[name] = (n + bool(good), of + 1)
        if not good and example and len(self.examples) < 5:
            self.examples.append(f"{name}: {example}")

    def result(self, control):
        line = ", ".join(f"{name} {n}/{of}" for name, (n, of) in self.counts.items())
        print(f"{self.part}: {line}; control: {control}", flush=True)
        for example in self.examples:
            print("   ", example, flush=True)
        return all(n == of for n, of in self.counts.values())


NAIVE = """
import sys
while True:
    with open(sys.argv[1], "wb") as f:
        for _ in range(64):
            f.write(b"x" * (1 << 16))
"""


def kills(n):
    tally, work = Tally("kills"), args.out / "kills"
    whole, killed = work / "whole", work / "killed"
    code, _, err = run(align(whole))
    assert code == 0, err
    right = ending(whole)
    done, n_saving = 0, 0
    while done < n:
        before = [c.name for c in checkpoints(killed)]
        child = start(align(killed))
        if rng.random() < 0.7:
            partial = lambda: any((killed / "checkpoints").glob(".iteration-*")) if killed.exists() else False
            until = time.time() + 30
            while not partial() and child.poll() is None and time.time() < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            n_saving += partial()
        else:
            time.sleep(rng.uniform(0, 4))
        child.send_signal(signal.SIGKILL)
        _, err = child.communicate()
        if child.returncode != -signal.SIGKILL:
            tally.count("went on", child.returncode == 0, err[-300:])
            if (killed / "aligned").exists():
                tally.count("same end", ending(killed) == right)
                hidden = [p for p in killed.rglob(".*") if p.name != ".lock"]
                tally.count("nothing left behind", not hidden, str(hidden))
                shutil.rmtree(killed)
            continue
        done += 1
        after = checkpoints(killed)
        newest = max(before, default="")
        tally.count("kept", not newest or any(c.name >= newest for c in after), newest)
        for folder in after:
            tally.count("visible is whole", not broken(folder), f"{folder.name}: {broken(folder)}")
    while True:
        code, _, err = run(align(killed))
        tally.count("went on", code == 0, err[-300:])
        break
    tally.count("same end", ending(killed) == right)
    half, target = 0, work / "naive"
    for _ in range(40):
        child = start([sys.executable, "-c", NAIVE, target])
        time.sleep(rng.uniform(0.1, 0.2))
        child.kill()
        child.communicate()
        half += target.stat().st_size != 64 << 16 if target.exists() else 1
    return tally.result(f"a naive writer leaves {half} of 40 half-written ({n_saving} kills were in a save)")


def sh(*command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True)


def power(n):
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        print("power: not run: it needs root and mkfs.ext4", flush=True)
        return True
    tally, work = Tally("power"), args.out / "power"
    work.mkdir(parents=True, exist_ok=True)
    image, copy, again, live, dead = (work / x for x in ("disk", "copy", "again", "live", "dead"))
    live.mkdir(exist_ok=True)
    dead.mkdir(exist_ok=True)
    naive = [0, 0]
    done = 0
    while done < n:
        with open(image, "wb") as f:
            f.truncate(400 << 20)
        sh("mkfs.ext4", "-q", "-F", image)
        sh("mount", "-o", "loop", image, live)
        child = None
        try:
            child = start(align(live / "run"))
            ended = False
            while done < n and not ended:
                time.sleep(rng.uniform(0.02, 0.7))
                ended = child.poll() is not None
                if not ended:
                    child.send_signal(signal.SIGSTOP)
                acknowledged = [c.name for c in checkpoints(live / "run")]
                if not ended:
                    plain = live / f"plain{done}"
                    plain.write_bytes(os.urandom(1 << 16))
                if cut(image, copy, again, dead):
                    done += 1
                    look(tally, dead, acknowledged, ended)
                    if not ended:
                        naive[1] += 1
                        there = dead / plain.name
                        naive[0] += not there.exists() or there.stat().st_size != 1 << 16
                    sh("umount", dead)
                if not ended:
                    child.send_signal(signal.SIGCONT)
        finally:
            if child and child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            if child:
                child.communicate()
            for _ in range(20):
                if subprocess.run(["umount", live], capture_output=True).returncode == 0:
                    break
                time.sleep(0.2)
    for path in (image, copy, again):
        path.unlink()
    return tally.result(f"of files written plainly before the same cuts {naive[0]} of {naive[1]} are lost or empty")


def cut(image, copy, again, dead):
    """Mounts what would be there after a power cut now."""
    for _ in range(8):
        sh("cp", "--sparse=always", image, copy)
        sh("cp", "--sparse=always", image, again)
        if subprocess.run(["cmp", "-s", copy, again]).returncode == 0:
            sh("mount", "-o", "loop", copy, dead)
            return True
    return False


def look(tally, dead, acknowledged, ended):
    found = checkpoints(dead / "run")
    for folder in found:
        tally.count("visible checkpoint is whole", not broken(folder), f"{folder.name}: {broken(folder)[:5]}")
    newest = max((c.name for c in found), default="")
    # What was visible when the programs were stopped may be in the middle of its last flush; the one before is not.
    earlier = acknowledged if ended else acknowledged[:-1]
    tally.count("acknowledged is there", not earlier or newest >= max(earlier), f"{acknowledged}, {newest}")
    aligned = dead / "run/aligned"
    if aligned.exists():
        tally.count("visible model is whole", not broken(aligned), str(broken(aligned)[:5]))
    if ended:
        tally.count("finished model is there", aligned.exists())


def damage(checkpoint):
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.stat().st_size]
    path = rng.choice([checkpoint / STATE, rng.choice(files)])
    kind = rng.choice(["bit", "page", "short", "gone"])
    # A second name of the same file would be damaged with it.
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind == "gone":
        return f"{path.name} gone"
    at = rng.randrange(len(data))
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "page":
        start = at // 4096 * 4096
        if not any(data[start:start + 4096]):
            data[at] ^= 1
        data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    else:
        del data[at:]
    path.write_bytes(data)
    return f"{path.name} {kind} at {at}"


def rot(n):
    tally, work = Tally("rot"), args.out / "rot"
    whole, victim = work / "whole", work / "victim"
    code, _, err = run(align(whole))
    assert code == 0, err
    right = ending(whole)

    def go_on(harm):
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(whole, victim)
        shutil.rmtree(victim / "aligned")
        what = harm(checkpoints(victim)[-1])
        code, _, err = run(align(victim))
        said = [line for line in err.splitlines() if line.startswith("warning:")]
        return what, code, said, err

    for _ in range(n):
        what, code, said, err = go_on(damage)
        name = what.split()[0]
        # Without its list a checkpoint is used, and that it could not be checked is said.
        used = "going on from it" if what == "SHA256SUMS gone" else "iteration-000005"
        tally.count("said in one line", len(said) == 1 and (name in said[0] or "SHA256SUMS" in said[0])
                    and used in said[0], f"{what}: {err[-300:]}")
        tally.count("went on to the same end", code == 0 and ending(victim) == right, f"{what}: {err[-300:]}")
    _, code, said, _ = go_on(lambda _: "nothing")
    return tally.result(f"without damage exit {code} and {len(said)} warnings")


def pairs(n):
    tally, work = Tally("pairs"), args.out / "pairs"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    right = None
    for index in range(n):
        folder = work / "run"
        resume = bool(index % 2)
        first = start(align(folder, resume=resume, iterations=4))
        time.sleep(rng.uniform(0, 3))
        second = start(align(folder, resume=resume, iterations=4))
        errors = [child.communicate(timeout=300)[1] for child in (first, second)]
        codes = [child.returncode for child in (first, second)]
        refused = [e for c, e in zip(codes, errors) if c == 1]
        is_right = 0 in codes and all(
            "another run (process" in e or "holds a run already" in e for e in refused)
        # A second that came after the first had ended is content with --resume.
        is_right = is_right and (len(refused) == 1 or resume and "are done" in "".join(errors))
        tally.count("one writes", is_right, f"{codes} {errors}")
        result = (folder / "aligned/SHA256SUMS").read_text()
        right = right or result
        tally.count("its end is right", result == right and len(
            (folder / "metrics.jsonl").read_text().splitlines()) == 4)
        shutil.rmtree(folder)
    both = [start(align(work / name, iterations=4)) for name in "ab"]
    codes = []
    for child in both:
        child.communicate()
        codes.append(child.returncode)
    return tally.result(f"two folders at once exit {codes}")


def swaps(n):
    tally, work = Tally("swaps"), args.out / "swaps"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    other = work / "trained"
    code, _, err = run(align(other, "--set", "optimizer.learning_rate=1e-3", iterations=4))
    assert code == 0, err
    models = [ROOT / "assets/signs", other / "aligned"]
    image, model = work / "image.png", work / "model"

    def export(which, *more):
        return [args.programs / "ng-export", models[which], "--out", model, "--threads", "1", *more]

    def sample():
        return [args.programs / "ng-sample", "--model", model, "--prompt", 'red "ANT"', "--output", image,
                "--threads", "1"]

    def pixels():
        from zlib import decompress
        data, at, idat = image.read_bytes(), 8, b""
        while at < len(data):
            length = int.from_bytes(data[at:at + 4], "big")
            if data[at + 4:at + 8] == b"IDAT":
                idat += data[at + 8:at + 8 + length]
            at += 12 + length
        return decompress(idat)

    pure = []
    for which in (0, 1):
        code, _, err = run(export(which, "--force"))
        assert code == 0, err
        code, _, err = run(sample())
        assert code == 0, err
        pure.append(pixels())
    refused = 0
    for index in range(n):
        image.unlink(missing_ok=True)
        child = start(export(index % 2, "--force"))
        # So that the exchange falls into the sampler's start.
        time.sleep(rng.uniform(0, 0.6))
        code, _, err = run(sample())
        exported = child.communicate()[1]
        refused += code != 0
        is_right = pixels() in pure if code == 0 else "start again" in err
        tally.count("an image of one model or a refusal", is_right, err[-300:])
        tally.count("exported", child.returncode == 0, exported[-300:])
    return tally.result(f"the models' images {'differ' if pure[0] != pure[1] else 'ARE THE SAME'}; {refused} refusals")


PARTS = {"kills": kills, "power": power, "rot": rot, "pairs": pairs, "swaps": swaps}


def main():
    global args
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("parts", nargs="*", help="PART=N, all of them unless given")
    args = parser.parse_args()
    args.programs, args.out = args.programs.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "one.txt").write_text('red "ANT"\n')
    wanted = dict(part.split("=") for part in args.parts) or DEFAULT
    failed = []
    for part, n in wanted.items():
        began = time.time()
        if not PARTS[part](int(n)):
            failed.append(part)
        print(f"    {time.time() - began:.0f} s", flush=True)
        shutil.rmtree(args.out / part, ignore_errors=True)
    if failed:
        sys.exit(f"not n of n: {', '.join(failed)}")


main()
