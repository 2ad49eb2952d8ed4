"""What an image's bits depend on: the same seeds alone, in company, on other threads, from the server under
load, in other files and at other precisions, against each seed alone.

    python tests/parity/bits.py MODEL EXPORT --programs target/release --out out/parity/signs/bits

Prints the table of docs/sample.md: equal to the bit, or how far apart in steps of 255.
"""

import argparse
import base64
import json
import re
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import report

PROMPT, SEEDS = 'red "HAT"', range(7, 14)
# Steps of 255 that a picture may be off at the most where it is close.
CLOSE = {"f16": 12, "int8": 64, "low": 1, "jpeg": 24}


def pixels(files):
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.int16) for file in files])


class Maker:
    def __init__(self, args):
        self.args = args
        self.out = args.out
        self.out.mkdir(parents=True, exist_ok=True)

    def export(self, precision):
        folder = self.out / precision
        report.run(self.args.programs / "ng-export", self.args.model, "--out", folder,
                   "--precision", precision)
        return folder

    def files(self, export, name, *more, seed=SEEDS[0], n=1, suffix="png"):
        folder = self.out / "images" / name
        out = folder.with_suffix(f".{suffix}") if n == 1 else folder
        folder.parent.mkdir(exist_ok=True)
        report.run(self.args.programs / "ng-sample", "--model", export, "--prompt", PROMPT, "-n", n,
                   "--seed", seed, "-o", out, *more)
        return [out] if n == 1 else sorted(folder.iterdir())

    def alone(self, export, name):
        return pixels([file for seed in SEEDS for file in self.files(
            export, f"{name}-{seed}", "--threads", 1, seed=seed)])

    def served(self, export, *more):
        """Images of the seeds asked for three times over at once, and images a call of the network."""
        command = [self.args.programs / "ng-sample", "serve", "--model", export, "--listen",
                   "127.0.0.1:0", *more]
        server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
        address = server.stdout.readline().strip()

        def ask(seed):
            body = json.dumps({"prompt": PROMPT, "seed": seed}).encode()
            request = urllib.request.Request(f"{address}/v1/images/generations", body,
                                             {"content-type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                image = json.load(answer)["data"][0]["b64_json"]
            path = self.out / f"served-{seed}-{len(answers)}.png"
            path.write_bytes(base64.b64decode(image))
            return path

        answers = []
        try:
            with ThreadPoolExecutor(21) as clients:
                answers = list(clients.map(ask, [*SEEDS] * 3))
            with urllib.request.urlopen(f"{address}/metrics") as answer:
                text = answer.read().decode()
        finally:
            server.terminate()
            server.wait(30)
        number = lambda name: float(re.search(rf"^ng_sample_batch_images_{name} (\S+)$", text, re.M)[1])
        return pixels(answers), number("sum") / number("count")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    maker, table = Maker(args), report.Report("the same seeds against each alone on one thread, of 255")
    n = len(SEEDS)
    alone = maker.alone(args.export, "alone")

    def of(name, *more, **keywords):
        return pixels(maker.files(args.export, name, *more, n=n, **keywords))

    table.absolute("seven in one run", of("seven", "--threads", 1), alone, 0)
    table.absolute("on 2 threads", of("threads", "--threads", 2), alone, 0)
    table.absolute("--memory keep", of("keep", "--memory", "keep"), alone, 0)
    served, company = maker.served(args.export)
    table.absolute(f"server under load, {company:.1f} a call", served, np.tile(alone, (3, 1, 1, 1)), 0)
    table.equal("images share calls", company > 1.5, True)
    webp = maker.files(args.export, "webp", suffix="webp")
    table.absolute("WebP", pixels(webp), alone[:1], 0)
    jpeg = maker.files(args.export, "jpeg", suffix="jpg")
    table.absolute("JPEG", pixels(jpeg), alone[:1], CLOSE["jpeg"])
    table.absolute("--memory low", of("low", "--memory", "low"), alone, CLOSE["low"])
    for precision in ("f16", "int8"):
        export = maker.export(precision)
        narrow = maker.alone(export, precision)
        table.absolute(f"weights in {precision}", narrow, alone, CLOSE[precision])
        served, company = maker.served(export)
        table.equal(f"{precision}: images a call by default", company, 1.0)
        table.absolute(f"{precision}: server under load", served, np.tile(narrow, (3, 1, 1, 1)), 0)
        served, company = maker.served(export, "--batch", 4)
        table.absolute(f"{precision}: --batch 4, {company:.1f} a call", served,
                       np.tile(narrow, (3, 1, 1, 1)), CLOSE[precision])
    table.finish()


if __name__ == "__main__":
    main()
