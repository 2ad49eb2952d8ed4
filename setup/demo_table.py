"""Prints what a demo came to, from the files in its folder.

    python3 setup/demo_table.py out/demo

Reads eval/eval.json (before, after), metrics.jsonl, export.txt (ng-export's table) and sample.jsonl
(ng-sample --json).
"""

import json
import statistics
import sys
from pathlib import Path

FILES = {
    "before-after.png": "same prompts, same noise: before, after",
    "curve.png": "mean reward of each iteration",
    "samples": "sheets while it learned",
    "aligned": "checkpoint, a diffusers FluxPipeline folder",
    "export": "ONNX folder, for ng-sample and Optimum",
    "cat.png": "one image by ng-sample",
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def scores(folder):
    """Rows `title, before, after` of the evaluation."""
    before, after = (dict(model["means"]) for model in json.loads(
        (folder / "eval/eval.json").read_text()))
    percent = {"exact": "words read exactly by PP-OCRv6, the reward's model",
               "judge_exact": "words read exactly by PP-OCRv4, never trained on",
               "colour": "share of ink in the colour asked for"}
    yield "", "before", "after"
    for name, title in percent.items():
        yield title, f"{before[name]:.1%}", f"{after[name]:.1%}"
    yield "mean reward (log-probability a character)", f"{before['ocr']:.3f}", f"{after['ocr']:.3f}"


def facts(folder):
    """Rows `title, value` of the run, the export and the samples."""
    steps = lines(folder / "metrics.jsonl")
    middle = {name: statistics.median(step[name] for step in steps)
              for name in ("nfe/rollout", "nfe/update", "seconds/iteration", "seconds/reward")}
    yield "iterations", f"{len(steps)}"
    yield ("network passes an image: rollout, update",
           f"{middle['nfe/rollout']:.0f}, {middle['nfe/update']:.2f}")
    yield "seconds an iteration, of it reward", (
        f"{middle['seconds/iteration']:.2f}, {middle['seconds/reward']:.2f}")

    size = sum(file.stat().st_size for file in (folder / "export").rglob("*") if file.is_file())
    yield "export", f"{size / 1e6:.1f} MB"
    header, *rows = (folder / "export.txt").read_text().splitlines()
    if header.split()[-1:] != ["relative"]:
        sys.exit(f"error: {folder / 'export.txt'}: the last column is not `relative`")
    # The row of totals has no differences.
    verified = [row.split() for row in rows if len(row.split()) == len(rows[0].split())]
    worst, name = max((float(row[-1]), row[0]) for row in verified)
    yield "largest difference of a graph from libtorch, relative", f"{worst:.1e} ({name})"

    images = lines(folder / "sample.jsonl")
    # The first image warms ONNX Runtime up.
    warm = statistics.median(
        sum(image["milliseconds"][stage] for stage in ("text", "sample", "decode", "png"))
        for image in images[1:]
    )
    load = images[0]["milliseconds"]["load"]
    yield "ng-sample, one thread: load, then an image", f"{load:.0f} ms, {warm:.1f} ms"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: demo_table.py FOLDER")
    folder = Path(sys.argv[1])
    compared, others = list(scores(folder)), list(facts(folder))
    width = max(len(row[0]) for row in compared + others)
    print()
    for title, before, after in compared:
        print(f"{title:{width}}  {before:>8}  {after:>8}")
    print()
    for title, value in others:
        print(f"{title:{width}}  {value}")
    print()
    for name, what in FILES.items():
        print(f"{str(folder / name):{width}}  {what}")


if __name__ == "__main__":
    main()
