"""Compares checkpoints in one file with diffusers: what `ng-train convert` writes and reads.

    python tests/parity/single_file.py MODEL --programs target/release --out out/parity/single-file

The transformer of MODEL as one file in BFL's names must be what diffusers' own single-file loader makes of
it, tensor by tensor, and must come back as the same bytes. With `gguf` installed, the file in
quantised types is also read as that package dequantises it.
"""

import importlib.util
import inspect
import json
import subprocess

import numpy as np
import torch
from diffusers.loaders import single_file_utils
from report import Report, begun, tensors
from safetensors.numpy import save_file
from safetensors.torch import load_file

GGUF = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def run(programs, *words):
    subprocess.run([programs / "ng-train", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def transformer(folder):
    """Its tensors, widened to f32."""
    found = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    return {name: value.float().numpy() for name, value in found.items()}


def by_diffusers(fused, config):
    """What diffusers' loader makes of a file, with the model's width where the loader has FLUX.1-dev's."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(convert)
    assert "inner_dim = 3072" in source, "the loader has changed"
    space = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), space)
    found = space[convert.__name__]({name: torch.from_numpy(value) for name, value in fused.items()})
    return {name: value.numpy() for name, value in found.items()}


def as_gguf(fused, path, kind):
    """Writes the matrices whose rows are whole blocks in `kind`, the rest in f32; returns what they hold."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    writer, values = gguf.GGUFWriter(path, "flux"), {}
    for name, value in fused.items():
        length, _ = gguf.GGML_QUANT_SIZES[kind]
        if value.ndim == 2 and value.shape[1] % length == 0:
            packed = gguf.quants.quantize(value, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values[name] = gguf.quants.dequantize(packed, kind).reshape(value.shape)
        else:
            writer.add_tensor(name, value)
            values[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def main():
    args = begun(__doc__)
    report = Report(f"one file in BFL's names, {args.model}")

    file, back = args.out / "flux.safetensors", args.out / "back"
    run(args.programs, "convert", args.model, file)
    own = transformer(args.model)
    config = json.loads((args.model / "transformer/config.json").read_text())
    loaded = by_diffusers(tensors(file), config)
    report.equal("names of diffusers' loader", sorted(set(loaded) ^ set(own)), [])
    differing = [name for name in own if not np.array_equal(loaded[name], own[name])]
    report.equal(f"tensors of {len(own)} that differ in diffusers", differing, [])

    run(args.programs, "convert", file, back, "--like", args.model)
    again = transformer(back)
    differing = [name for name in own if own[name].tobytes() != again[name].tobytes()]
    report.equal("tensors that differ after the way back", differing, [])

    if importlib.util.find_spec("gguf"):
        fused = tensors(file)
        for kind in GGUF:
            # The same file again in floats is what the package says the blocks hold.
            values = as_gguf(fused, args.out / f"{kind}.gguf", kind)
            save_file(values, args.out / "floats.safetensors")
            for source, target in ((f"{kind}.gguf", kind), ("floats.safetensors", f"{kind}-floats")):
                run(args.programs, "convert", args.out / source, args.out / target, "--like", args.model)
            found, right = transformer(args.out / kind), transformer(args.out / f"{kind}-floats")
            differing = [name for name in right if found[name].tobytes() != right[name].tobytes()]
            report.equal(f"{kind}: tensors that differ from gguf's", differing, [])
    report.finish()


if __name__ == "__main__":
    main()
