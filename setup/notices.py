"""Writes what the licences of the crates in a program ask to be passed on with it.

    python3 setup/notices.py target/release/THIRD-PARTY.txt

One entry a licence text, over it the crates that carry it; crates without a text of their own are listed by
their licence's name. What is opened at run time (libtorch, ONNX Runtime, OCR models) brings its own.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

NAMES = ("license", "licence", "copying", "notice", "unlicense", "copyright")
PROGRAMS = ("trainer", "exporter", "sampler")


def shipped(metadata):
    """Packages that the programs link, without what only builds or tests them."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    waiting = [id for id, package in packages.items() if package["name"] in PROGRAMS]
    found = set()
    while waiting:
        id = waiting.pop()
        if id in found:
            continue
        found.add(id)
        for dependency in nodes[id]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    return sorted((packages[id] for id in found if packages[id]["source"]), key=lambda p: p["name"])


def texts(package):
    folder = Path(package["manifest_path"]).parent
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.lower().startswith(NAMES):
            yield path.read_text(errors="replace").replace("\r\n", "\n").strip()


def main():
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform",
               "x86_64-unknown-linux-gnu"]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    carriers, bare = defaultdict(list), defaultdict(list)
    packages = shipped(metadata)
    for package in packages:
        name = f"{package['name']} {package['version']}"
        found = list(texts(package))
        for text in found:
            carriers[text].append(name)
        if not found:
            bare[package["license"] or "no licence named"].append(name)
    lines = ["Third-party software in ng-train, ng-export and ng-sample.",
             "This software is based in part on the work of the Independent JPEG Group.", ""]
    lines += [f"{p['name']} {p['version']}: {p['license']}, {p['repository'] or 'crates.io'}"
              for p in packages]
    for licence, names in sorted(bare.items()):
        lines += ["", "=" * 80, f"{licence}, without a text of their own:", ", ".join(names)]
    for text, names in sorted(carriers.items(), key=lambda item: item[1]):
        lines += ["", "=" * 80, ", ".join(names), "-" * 80, text]
    out = Path(sys.argv[1])
    out.with_suffix(".partial").write_text("\n".join(lines) + "\n")
    out.with_suffix(".partial").rename(out)
    print(f"{out}: {len(packages)} crates, {len(carriers)} texts")


main()
