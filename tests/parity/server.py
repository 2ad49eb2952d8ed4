"""The reward protocol against the example server: prompts, pictures and scores arrive as they were sent.

    python tests/parity/server.py MODEL --programs target/release --out out/parity/signs/server

`ng-train eval` asks `tests/servers/png_size.py`, which runs in this process: every prompt comes once
with its own fields, every picture opens in Pillow with the pixels' size, and eval.json has the scores
that were given, to the bit.
"""

import argparse
import io
import json
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from PIL import Image

import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "servers"))
import png_size  # noqa: E402

PROMPTS = [{"prompt": f'{colour} "{word}"', "tag": n} for n, (colour, word) in enumerate(
    [("red", "CAT"), ("green", "SUN"), ("blue", "MAP"), ("black", "365"), ("red", "EGG")])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    given, scored, lock = {}, png_size.score, threading.Lock()

    def score(prompt, png, metadata):
        with Image.open(io.BytesIO(png)) as image:
            shape = (image.format, image.mode, *image.size)
        with lock:
            given[prompt] = (scored(prompt, png, metadata), metadata, shape)
        return given[prompt][0]

    png_size.score = score
    server = ThreadingHTTPServer(("127.0.0.1", 0), png_size.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/score"

    args.out.mkdir(parents=True, exist_ok=True)
    prompts = args.out / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    reward = f"{{name = 'png', kind = 'server', url = '{url}', batch = 2, weight = 1.0}}"
    report.run(args.programs / "ng-train", "eval", "--preset", "signs", "--model", args.model,
               "--prompts", prompts, "--out", args.out, "--set", f"rewards=[{reward}]",
               "--set", "judges=[]")
    server.shutdown()

    [column] = json.loads((args.out / "eval.json").read_text())
    table = report.Report("eval by a reward server")
    table.relative("scores", [row[0] for row in column["per_prompt"]],
                   [given[prompt["prompt"]][0] for prompt in PROMPTS], limit=0)
    table.equal("metadata", [given[prompt["prompt"]][1] for prompt in PROMPTS], PROMPTS)
    table.equal("pictures", {shape for _, _, shape in given.values()}, {("PNG", "RGB", 32, 32)})
    table.finish()


if __name__ == "__main__":
    main()
