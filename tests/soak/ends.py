"""A run ended in each of its stages, many times: `make soak`.

    python3 tests/soak/ends.py --programs target/release --out out/soak/ends [--each 20] [KIND ...]

Kinds: `interrupt` (one of SIGINT, SIGTERM, SIGHUP, SIGUSR1), `twice` (SIGINT, and again), `kill` (SIGKILL), `fail`
(no memory can be had from the stage on; in the rewards, a server refuses). Each is done in each stage, at a random
moment of it, so many times, to a small random model. Every start goes on from what the last left, and counts: after a
signal the answer came and the code is 130; after it and after a reward that failed, the last whole iteration is saved;
and every run that was ended so is, at its end, that of an undisturbed run, to the byte. Control: a run from another
seed ends elsewhere.

Exit code 1 when a count is not n of n. The seed is fixed; moments are the machine's.
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"rollout": "the rollout of", "decoding": "the decoding of", "rewards": "the rewards of",
          "update": "the update of", "validation": "the validation after", "saving": "saving iteration",
          "sheet": "the sheet after"}
COMPUTED = ("the rollout of", "the decoding of", "the rewards of", "the update of")
KINDS = ["interrupt", "twice", "kill", "fail"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
ITERATIONS = 8
# Most starts for one end: a moment may come too late.
TRIES = 20
STATE = "training_state.safetensors"
MODEL = ROOT / "tests/fixtures/tiny-flux/pipeline"
ENV = dict(os.environ, OMP_NUM_THREADS="1")
# Every block comes from the system and goes back, so that a limit is felt at once.
WITHOUT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "0"}
rng = random.Random(11)
counts = {}


class Server(BaseHTTPRequestHandler):
    """Scores by the length of the picture, unless it should fail."""
    fails = False

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [len(image) / 1000 for image in request["images"]]}).encode()
        self.send_response(400 if Server.fails else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def command(folder, *more):
    url = f"http://127.0.0.1:{server.server_port}/"
    sets = {"output": folder, "model": MODEL, "rollout.size": "[32, 32]", "iterations": ITERATIONS, "save_every": 2,
            "prompts_per_iteration": 2, "group_size": 6, "anchors": 2, "updates": 2, "rollout.steps": 6,
            "sheet_prompts": args.out / "one.txt", "validate_every": 1, "validation": "{count=1, best='far'}", "judges": "[]", "optimizer.learning_rate": 1e-4,
            "rewards": f"[{{name='far', kind='server', url='{url}', weight=1, retries=0, patience=0}}]"}
    line = [args.programs / "ng-train", "align", "--preset", "signs", "--threads", "1", "--resume", "-v", *more]
    for key, value in sets.items():
        line += ["--set", f"{key}={value}"]
    return [str(part) for part in line]


def count(name, good, example=""):
    n, of = counts.get(name, (0, 0))
    counts[name] = (n + bool(good), of + 1)
    if not good:
        print(f"    {name}: {example[-400:]}", flush=True)


def ending(folder):
    """What a finished run must have made."""
    data = (sorted((folder / "checkpoints").glob("iteration-*"))[-1] / STATE).read_bytes()
    numbers = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    held_out = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    held_out = [(line["step"], line["validation/far"]) for line in held_out]
    return (folder / "aligned/SHA256SUMS").read_text(), numbers, held_out, os.readlink(folder / "best")


def start(folder, *more, env=ENV):
    return subprocess.Popen(command(folder, *more), cwd=ROOT, env=env, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder, *more):
    Server.fails = False
    child = start(folder, *more)
    said = child.communicate(timeout=600)[1]
    return child.returncode, said


def same(kind, folder, right):
    """Finishes the run, and counts whether that is the undisturbed one's end."""
    code, said = finish(folder)
    other = [(a, b) for a, b in zip(ending(folder), right) if a != b] if code == 0 else said
    count(f"{kind}: goes on to the same end", not other, str(other))


def saved(folder):
    """The newest checkpoint, as a number."""
    names = sorted((folder / "checkpoints").glob("iteration-*")) if (folder / "checkpoints").exists() else []
    return int(names[-1].name.split("-")[1]) if names else 0


def end(folder, kind, stage):
    """Ends the run once in the stage; whether it was there."""
    before, is_starved = saved(folder), kind == "fail" and stage != "rewards"
    child = start(folder, env=dict(ENV, **WITHOUT_HEAP) if is_starved else ENV)
    said, begun, wanted = [], 0, rng.choice([1, 2])
    for line in child.stderr:
        said.append(line)
        begun += line.startswith(STAGES[stage])
        if begun == wanted:
            break
    if begun < wanted:
        child.wait()
        return False
    time.sleep(rng.choice([0, rng.uniform(0, 0.02)]))
    what = None
    if kind == "kill":
        child.kill()
    elif is_starved:
        resource.prlimit(child.pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    elif kind == "fail":
        Server.fails = True
    else:
        what = rng.choice(SIGNALS) if kind == "interrupt" else signal.SIGINT
        child.send_signal(what)
        if kind == "twice":
            time.sleep(rng.uniform(0, 0.02))
            child.send_signal(what)
    said += list(child.stderr)
    code, text = child.wait(), "".join(said)
    Server.fails = False
    if code == 0 or (folder / "aligned").exists():
        return False  # it was over before
    if what:
        count(f"{kind}: answered and ended as asked", code == 130 and "stopping: waits for" in text
              and ("stopped after iteration" in text or "nothing is saved" in text), text)
    count(f"{kind}: nothing saved is lost", saved(folder) >= before, f"{before} {saved(folder)}")
    if kind != "kill" and not is_starved:
        begun = [re.search(r"iteration (\d+)$", line) for line in said if line.startswith(tuple(STAGES.values()))]
        # What is under way is not whole; what is validated, drawn or saved is.
        whole = max(int(found[1]) - found.string.startswith(COMPUTED) for found in begun if found)
        count(f"{kind}: the last whole iteration is saved", saved(folder) >= whole, f"{whole} {saved(folder)} {text}")
    if kind == "fail":
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        count("fail: said in one line", len(lines) == 1, f"{code} {text}")
    return True


def main():
    global args, server
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("kinds", nargs="*", help="KIND, all of them unless given")
    args = parser.parse_args()
    args.programs, args.out = args.programs.resolve(), args.out.resolve()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    (args.out / "one.txt").write_text('red "ANT"\n')
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code, said = finish(args.out / "whole")
    assert code == 0, said
    right = ending(args.out / "whole")
    began = time.time()
    for kind in args.kinds or KINDS:
        done, tries = dict.fromkeys(STAGES, 0), 0
        folder = args.out / kind
        while min(done.values()) < args.each:
            stage, tries = min(done, key=done.get), tries + 1
            if tries > TRIES:
                sys.exit(f"{kind}: {stage} could not be hit in {TRIES} starts")
            if saved(folder) < ITERATIONS - 2 and end(folder, kind, stage):
                done[stage], tries = done[stage] + 1, 0
                continue
            same(kind, folder, right)
            shutil.rmtree(folder)
        if folder.exists():
            same(kind, folder, right)
        print(f"{kind}: {', '.join(f'{stage} {n}' for stage, n in done.items())}; {time.time() - began:.0f} s", flush=True)
    code, said = finish(args.out / "other", "--set", "seed=1")
    other = ending(args.out / "other") == right
    for name, (n, of) in counts.items():
        print(f"{name}: {n} of {of}")
    print(f"control: another seed ends {'ALIKE' if other else 'elsewhere'}")
    shutil.rmtree(args.out, ignore_errors=True)
    if other or any(n != of for n, of in counts.values()):
        sys.exit("not n of n")


main()
