"""Runs every live comparison on the given models: what `make parity` calls.

    python tests/parity/run.py MODEL... --programs target/release --out out/parity

For each model: `ng-train reference` against diffusers, `ng-export` against onnx, onnxruntime and
Optimum, images from equal noise. Then, on the last model, a checkpoint and an update of
`ng-train align`. Every script runs even after one failed; the exit code is 1 if any did.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Sizes that are no square where the model allows it: a swapped axis must show.
SIZES = {"signs": (32, 32)}
# One short run of two iterations; OUT, MODEL and RECORD are put in.
ALIGN = [
    "align", "--model", "MODEL", "--out", "OUT", "--record-update", "RECORD",
    "--set", "iterations=2",
]


class Comparisons:
    def __init__(self, programs):
        self.programs, self.failed = programs, []

    def step(self, command, extra_path=None):
        """Runs one command; remembers a failure and says whether it worked."""
        command = [str(part) for part in command]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
                       "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                       "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        if extra_path:
            environment["PYTHONPATH"] = str(extra_path)
        print("\n$", " ".join(command), flush=True)
        if subprocess.run(command, env=environment).returncode != 0:
            self.failed.append(" ".join(command))
            return False
        return True

    def script(self, name, *arguments, extra_path=None):
        return self.step([sys.executable, HERE / name, *arguments], extra_path)

    def program(self, name, *arguments):
        return self.step([self.programs / name, *arguments])

    def model(self, source, name, out):
        """All comparisons of one model; a copy of it gets the reference tensors."""
        model, export, images = out / "model", out / "export", out / "images"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, model)
        width, height = SIZES.get(name, (96, 64))
        self.program("ng-train", "reference", model) and self.script("reference.py", model)
        if not self.program("ng-export", model, "--out", export, "--verify"):
            return
        self.script("export.py", model, export)
        size = ["--width", width, "--height", height]
        self.script("image.py", model, export, "--programs", self.programs, "--out", images, *size)
        optimum = Path(sys.prefix).parent / "optimum"
        self.script("ort_pipeline.py", export, images, extra_path=optimum)

    def alignment(self, model, out):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        record = out / "update.safetensors"
        values = {"MODEL": model, "OUT": out / "checkpoint", "RECORD": record}
        if self.program("ng-train", *(values.get(part, part) for part in ALIGN)):
            self.script("checkpoint.py", out / "checkpoint", "--base", model)
            self.script("update.py", record)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    comparisons = Comparisons(args.programs)
    for source in args.models:
        name = source.parent.name if source.name == "pipeline" else source.name
        comparisons.model(source, name, args.out / name)
    comparisons.alignment(args.models[-1], args.out / "align")
    if comparisons.failed:
        sys.exit("error: these comparisons failed:\n  " + "\n  ".join(comparisons.failed))
    print("\nall comparisons passed")


if __name__ == "__main__":
    main()
