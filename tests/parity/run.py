"""Runs every live comparison on the given models: what `make parity` calls.

    python tests/parity/run.py MODEL... --programs target/release --out out/parity

For each model: `ng-train reference` against diffusers, `ng-export` against onnx, onnxruntime and
Optimum, every target and precision of the small ones, images from equal noise; on one, LoRA of every
kind and the gradients of a reward. Then an iteration of `ng-train align`: its
last update recomputed, its checkpoint loaded by diffusers, images of that checkpoint compared like
those of the model. The embedded model is also scored by the example reward server, and served to the OpenAI
client. At last, NCCL is asked for an id, and the networks of rewards are held against the packages that
define them. Every script runs even after one failed; the exit code is 1 if any did.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Sizes that are no square where the model allows it: a swapped axis must show.
SIZES = {"signs": (32, 32)}
# Two tiles in each direction, none of them square; one model is enough.
TILED = {"tiny-flux": (1040, 1056)}
# A short run of two rewards with different scales, weights and directions.
ALIGN = {
    "validate_every": 0,
    "iterations": 1,
    "prompts_per_iteration": 2,
    # Algorithm 1: after the first step weights have moved since the rollout.
    "updates": 4,
    "rewards": """[
      {name = "ocr", kind = "ocr", model = ".runtime/models/ocr-v6.onnx", weight = 1.0,
       std_floor = 0.01},
      {name = "jpeg", kind = "jpeg", prefer = "small", weight = 0.5},
    ]""",
    "judges": "[]",
    # Several files a component.
    "shard_gb": 0.0002,
}


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
        shown = [Path(command[1]).name, *command[2:]] if command[0] == sys.executable else command
        print("\n$", shlex.join(shown), flush=True)
        if subprocess.run(command, env=environment).returncode != 0:
            self.failed.append(shlex.join(shown))
            return False
        return True

    def script(self, name, *arguments, extra_path=None):
        return self.step([sys.executable, HERE / name, *arguments], extra_path)

    def program(self, name, *arguments):
        return self.step([self.programs / name, *arguments])

    def model(self, source, name, out):
        """All comparisons of one model; a copy of it gets the reference tensors."""
        model = out / "model"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, model)
        size = SIZES.get(name, (96, 64))
        if self.program("ng-train", "reference", model):
            self.script("reference.py", model)
        narrow = shutil.copytree(source, out / "model-bf16")
        if self.program("ng-train", "reference", narrow, "--precision", "bf16"):
            self.script("reference.py", narrow, "--bf16")
        if self.program("ng-export", model, "--out", out / "export", "--verify"):
            self.script("export.py", model, out / "export")
            self.images(model, out / "export", out / "images", size)
            self.images(model, out / "export", out / "images-bf16", size, "--bf16")
            if tiled := TILED.get(name):
                self.images(model, out / "export", out / "tiled", tiled, "--tiled", "--steps", 1)
            optimum = Path(sys.prefix).parent / "optimum"
            self.script("ort_pipeline.py", out / "export", out / "images", extra_path=optimum)
            if self.program("ng-export", model, "--out", out / "export-f16", "--precision", "f16",
                            "--vae", "f16"):
                self.script("ort_pipeline.py", out / "export-f16", out / "images", extra_path=optimum)
        if name == "signs":
            self.script("server.py", model, "--programs", self.programs, "--out", out / "server")
            self.script("bits.py", model, out / "export", "--programs", self.programs,
                        "--out", out / "bits")
            self.script("openai_client.py", out / "export", "--programs", self.programs,
                        "--out", out / "openai", extra_path=Path(sys.prefix).parent / "openai")
        if name != "signs":
            self.script("targets.py", model, "--programs", self.programs, "--out", out / "targets")
        if name == "tiny-flux":
            self.script("loras.py", model, "--programs", self.programs, "--out", out / "loras")
            self.script("gradient.py", model, "--programs", self.programs, "--out", out / "gradient")
        self.alignment(model, out / "run", size)
        self.adapters(model, out / "lora", size)
        self.single_file(model, out / "single-file")

    def images(self, model, export, out, size, *more):
        width, height = size
        self.script("image.py", model, export, "--programs", self.programs, "--out", out,
                    "--width", width, "--height", height, *more)

    def alignment(self, model, run, size):
        """A short run from `model`: one update, and the checkpoint at the end."""
        record, aligned = run / "update.safetensors", run / "aligned"
        settings = {"model": model, "output": run, "rollout.size": list(size), **ALIGN}
        settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        run.mkdir()
        if self.program("ng-train", "align", "--preset", "signs", *settings,
                        "--record-update", record):
            self.script("update.py", record)
            self.script("checkpoint.py", aligned, "--base", model)
            if self.program("ng-export", aligned, "--out", run / "export", "--verify"):
                self.images(aligned, run / "export", run / "images", size)

    def adapters(self, model, run, size):
        """A short run that trains adapters: diffusers loads them, and the export has them merged."""
        aligned, export = run / "aligned", run / "export"
        settings = {"model": model, "output": run, "rollout.size": list(size), **ALIGN,
                    "lora.rank": 4, "lora.alpha": 8, "optimizer.learning_rate": 1e-2, "stream": "true"}
        settings = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        if self.program("ng-train", "align", "--preset", "signs", *settings) and self.program(
                "ng-export", model, "--lora", aligned, "--out", export, "--verify"):
            self.images(model, export, run / "images", size, "--lora", aligned)

    def single_file(self, model, out):
        """The transformer as one file, against diffusers' own loader, and the way back."""
        self.script("single_file.py", model, "--programs", self.programs, "--out", out)

    def rewards(self, out):
        """Networks of rewards against the packages that define them."""
        runtime = Path(sys.prefix).parent
        newest, older = runtime / "rewards", runtime / "image-reward"
        for part, packages in (("clip", [newest]), ("image-reward", [older, newest])):
            self.script("rewards.py", part, "--programs", self.programs, "--out", out / part,
                        extra_path=os.pathsep.join(str(folder) for folder in packages))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    for source in args.models:
        if not (source / "model_index.json").is_file():
            parser.error(f"{source} is no pipeline folder: it has no model_index.json")
    comparisons = Comparisons(args.programs)
    for source in args.models:
        name = source.parent.name if source.name == "pipeline" else source.name
        comparisons.model(source, name, args.out / name)
    comparisons.program("cluster-rank", "nccl")
    comparisons.rewards(args.out / "rewards")
    if comparisons.failed:
        sys.exit("error: these comparisons failed:\n  " + "\n  ".join(comparisons.failed))
    print("\nall comparisons passed")


if __name__ == "__main__":
    main()
