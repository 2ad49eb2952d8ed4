"""What the comparisons share: reading tensors, running our programs, one table, one verdict."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def tensors(path):
    """The tensors of a safetensors file as a dict of arrays; bf16, which NumPy does not have, as f32."""
    if not Path(path).is_file():
        sys.exit(f"error: {path} is missing")
    found = load_file(path)
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in found.items()}


def begun(about):
    """What a comparison was asked for: a model, our programs, and `out`, a folder that is now there and empty."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--programs", type=Path, default=Path("target/release"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    return args


def run(*command):
    """Runs one of our programs; a failure ends the comparison with what the program said."""
    command = [str(part) for part in command]
    print("$", shlex.join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        sys.exit(f"error: {command[0]} ended with {done.returncode}")
    return done.stdout


def difference(ours, theirs):
    """max |a − b| and that over max |b|; infinite where shapes differ or a value is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all() or ours.size == 0:
        return np.inf, np.inf
    absolute = np.abs(ours - theirs).max()
    scale = np.abs(theirs).max()
    if absolute == 0:
        return 0.0, 0.0
    return absolute, absolute / scale if scale > 0 else np.inf


class Report:
    """Rows of a comparison; `finish` prints them and ends the script with 1 if one failed."""

    def __init__(self, title):
        self.title, self.rows, self.failed = title, [], []

    def _add(self, name, value, limit, passed):
        self.rows.append((name, value, limit, "ok" if passed else "FAILED"))
        if not passed:
            self.failed.append(name)

    def relative(self, name, ours, theirs, limit=1e-5):
        """Passes if max |a − b| ≤ limit · max |b|."""
        absolute, relative = difference(ours, theirs)
        value = f"max abs {absolute:.2e}  relative {relative:.2e}"
        if np.shape(ours) != np.shape(theirs):
            value = f"shape {np.shape(ours)}, expected {np.shape(theirs)}"
        self._add(name, value, f"{limit:.0e}", relative <= limit)

    def narrow(self, name, ours, theirs, exact, limit):
        """For a type so narrow that both stray from `exact`: passes if the root mean square of our
        difference from theirs is at most `limit` times that of the values, or if we stray less."""
        if difference(ours, theirs)[0] == np.inf:
            self._add(name, "not comparable", f"{limit:.0e}", False)
            return
        ours, theirs, exact = (np.asarray(x, np.float64) for x in (ours, theirs, exact))
        rms = lambda x: np.sqrt((x**2).mean() / (exact**2).mean())
        apart, our_error, their_error = rms(ours - theirs), rms(ours - exact), rms(theirs - exact)
        value = f"rms {apart:.2e}  from f32 {our_error:.2e}, theirs {their_error:.2e}"
        self._add(name, value, f"{limit:.0e}", apart <= limit or our_error <= their_error)

    def absolute(self, name, ours, theirs, limit):
        """Passes if max |a − b| ≤ limit."""
        absolute, _ = difference(ours, theirs)
        value = f"max abs {absolute:.2e}"
        if np.shape(ours) != np.shape(theirs):
            value = f"shape {np.shape(ours)}, expected {np.shape(theirs)}"
        self._add(name, value, f"{limit:.2g}", absolute <= limit)

    def at_most(self, name, value, limit):
        """Passes if `value` ≤ `limit`."""
        self._add(name, f"{value:.2e}", f"{limit:.0e}", value <= limit)

    def equal(self, name, ours, theirs):
        """Passes if both are the same; strings, numbers or lists."""
        if ours != theirs:
            value = f"{ours}, expected {theirs}"
        elif isinstance(ours, list):
            value = f"{len(ours)} the same" if ours else "no difference"
        else:
            value = str(ours)
        self._add(name, value, "equal", ours == theirs)

    def finish(self):
        widths = [max(len(str(row[i])) for row in self.rows) for i in range(3)]
        print(f"\n{self.title}")
        for name, value, limit, verdict in self.rows:
            print(f"  {name:{widths[0]}}  {value:{widths[1]}}  {limit:>{widths[2]}}  {verdict}")
        if self.failed:
            sys.exit(f"error: {self.title}: {', '.join(self.failed)} differ")
