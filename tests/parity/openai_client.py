"""The OpenAI client, as it comes from PyPI, against `ng-sample serve`.

    python tests/parity/openai_client.py EXPORT --programs target/release --out out/parity/signs/openai

It lists models, generates, streams partial images, and turns every refusal into the exception that its
users catch; images have the bits that `ng-sample generate` gives the same seed.
"""

import argparse
import base64
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import openai
from PIL import Image

import report

PROMPT, SEED = 'red "HAT"', 7


def pixels(file):
    """A digest of a picture's pixels."""
    with Image.open(io.BytesIO(file)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def of_program(args, seed):
    png = args.out / f"alone-{seed}.png"
    report.run(args.programs / "ng-sample", "--model", args.export, "--prompt", PROMPT, "--seed", seed,
               "-o", png)
    return pixels(png.read_bytes())


def refused(kind, call):
    """The exception of the client's for `call`, which must be a `kind`."""
    try:
        call()
    except openai.APIError as error:
        assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
        return error
    raise AssertionError(f"no {kind.__name__}")


def generates(client, args, table):
    models = [model.id for model in client.models.list()]
    table.equal("models", models, [args.export.name])
    table.equal("model", client.models.retrieve(models[0]).object, "model")
    response = client.images.generate(prompt=PROMPT, n=2, size="auto", extra_body={"seed": SEED})
    drawn = [pixels(base64.b64decode(image.b64_json)) for image in response.data]
    table.equal("images", drawn, [of_program(args, SEED), of_program(args, SEED + 1)])
    table.equal("format", response.output_format, "png")
    table.equal("usage", response.usage.total_tokens, 0)
    everything = client.images.generate(
        prompt=PROMPT, model=models[0], n=1, size="32x32", quality="high", background="opaque",
        moderation="low", output_format="png", response_format="b64_json", style="vivid", user="u",
        extra_body={"num_inference_steps": 8, "seed": SEED, "solver": "dpmpp-2m",
                    "negative_prompt": "", "true_cfg_scale": 1.0, "generator_device": "cpu"})
    table.equal("every field", pixels(base64.b64decode(everything.data[0].b64_json)), drawn[0])
    return drawn[0]


def streams(client, image, table):
    stream = client.images.generate(prompt=PROMPT, size="32x32", stream=True, partial_images=2,
                                    extra_body={"seed": SEED})
    events = list(stream)
    table.equal("events", [event.type for event in events],
                ["image_generation.partial_image"] * 2 + ["image_generation.completed"])
    table.equal("indices", [event.partial_image_index for event in events[:2]], [0, 1])
    table.equal("streamed", pixels(base64.b64decode(events[-1].b64_json)), image)
    table.equal("usage in the stream", events[-1].usage.total_tokens, 0)


def refuses(client, address, table):
    bad = openai.BadRequestError
    for param, fields in [
        ("prompt", {"prompt": "x" * 9000}),
        ("n", {"n": 11}),
        ("size", {"size": "33x32"}),
        ("response_format", {"response_format": "url"}),
        ("background", {"background": "transparent"}),
        ("negative_prompt", {"extra_body": {"negative_prompt": "blur"}}),
        ("colour", {"extra_body": {"colour": "red"}}),
    ]:
        error = refused(bad, lambda: client.images.generate(**{"prompt": PROMPT, **fields}))
        table.equal(f"param of {param}", error.param, param)
    missing = refused(openai.NotFoundError,
                      lambda: client.images.generate(prompt=PROMPT, model="gpt-image-9"))
    table.equal("unknown model", missing.code, "model_not_found")
    nobody = client.with_options(api_key="wrong", base_url=f"{address}/v1")
    error = refused(openai.AuthenticationError, lambda: nobody.models.list())
    table.equal("wrong token", error.code, "invalid_api_key")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    token = "a-token-for-this-test"
    with open(args.out / "server.log", "w") as log:
        server = subprocess.Popen(
            [args.programs / "ng-sample", "serve", "--model", args.export, "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "NG_SAMPLE_TOKEN": token})
    table = report.Report("the OpenAI client")
    try:
        address = server.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0, timeout=60)
        image = generates(client, args, table)
        streams(client, image, table)
        refuses(client, address, table)
    finally:
        server.terminate()
        status = server.wait(30)
    table.equal("the server's end", status, 0)
    table.finish()


if __name__ == "__main__":
    sys.exit(main())
