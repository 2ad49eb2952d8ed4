"""Checks every target and precision of `ng-export` outside our own code, on one model.

    python tests/parity/targets.py MODEL --programs target/release --out DIR

MODEL holds `reference.safetensors`, whose inputs go through diffusers and transformers in f32. Each graph of
each export must pass onnx.checker's full check with strict shape inference, and Python's onnxruntime must
compute what they compute, wherever its processor has the kernels: it may lack those of bf16 and of fp8
matrices, and no others. Then LoRA slots: empty they change no bit, filled they are the merged export's. At
last, two exports of the same are the same bytes.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from pipeline import load
from reference import outputs, part
from report import Report, begun, run, tensors
from safetensors.numpy import save_file

TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx", "portable")
# Largest error as a share of the largest value.
LIMITS = {"f32": 1e-5, "f16": 1e-2, "bf16": 4e-2, "int8": 0.1, "int4": 0.25, "fp8": 0.1}
GRAPHS = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder")
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
# What onnxruntime's processor has no kernels for.
BF16, FP8 = onnx.TensorProto.BFLOAT16, "MatMulBlockQuantizedFp8Weight"


def expected(model, case):
    """What diffusers and transformers compute from the case's inputs."""
    pipe, _ = load(model)
    with torch.no_grad():
        values = outputs(pipe, case, torch.float32)
        latents, pixels = part(case, "vae_decoder"), part(case, "vae_encoder")
        values["vae_decoder.sample"] = pipe.vae.decode(latents["latent_sample"]).sample
        values["vae_encoder.latent_parameters"] = pipe.vae.encoder(pixels["sample"])
    return {name: value.numpy() for name, value in values.items()}


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def lacks_kernels(path):
    """Whether the graph has what the processor's provider does not."""
    graph = onnx.load(path, load_external_data=False).graph
    casts = (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute)
    return (BF16 in {tensor.data_type for tensor in graph.initializer} | set(casts)
            or any(node.op_type == FP8 for node in graph.node))


def compute(path, case, folder, more=()):
    """Outputs of a graph by `folder.name` from the case's inputs, and `more` of its own."""
    opened = session(path)
    feed = {port.name: case[f"{folder}.{port.name}"].astype(KINDS[port.type])
            for port in opened.get_inputs()}
    names = [port.name for port in opened.get_outputs()]
    found = opened.run(names, {**feed, **dict(more)})
    return {f"{folder}.{name}": value for name, value in zip(names, found)}


def variants():
    """Targets, precisions and flags: what each target does by itself, and quantised matrices once more in f16
    where its own arithmetic is bf16, which onnxruntime's processor lacks."""
    for target in TARGETS:
        for precision in LIMITS:
            if (target, precision) != ("cpu", "fp8"):
                yield target, precision, ()
        if target in ("cuda", "tensorrt", "tensorrt-rtx"):
            # CUDA's operator of fp8 exists on CUDA alone.
            for precision in ("int8", "int4") if target == "cuda" else ("int8", "int4", "fp8"):
                yield target, precision, ("--activations", "f16")


def matrix(args, case, right, report):
    n_runs = 0
    for target, precision, flags in variants():
        export = args.out / "-".join((target, precision, *flags))
        run(args.programs / "ng-export", args.model, "--out", export, "--target", target,
            "--precision", precision, *flags)
        worst, n_found = 0.0, 0
        for folder in GRAPHS:
            path = export / folder / "model.onnx"
            onnx.checker.check_model(path, full_check=True)
            onnx.shape_inference.infer_shapes_path(path, export / "inferred.onnx", check_type=True,
                                                   strict_mode=True, data_prop=True)
            try:
                found = compute(path, case, folder)
            except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
                if not lacks_kernels(path):
                    raise
                continue
            for name, value in found.items():
                error = np.abs(value - right[name]).max() / np.abs(right[name]).max()
                worst, n_found = max(worst, float(error)), n_found + 1
        n_runs += n_found
        title = " ".join((target, precision, *flags)) + f": 5 graphs checked, {n_found} of 6 outputs"
        report.at_most(title, worst, LIMITS[precision])
        shutil.rmtree(export)
    report.equal("outputs that onnxruntime computed", n_runs > 120, True)


def slots(args, case, report):
    """Empty and filled slots against a plain and a merged export."""
    rng, layers = np.random.default_rng(5), {}
    plain, slotted, merged = (args.out / name for name in ("plain", "slots", "merged"))
    export = args.programs / "ng-export"
    run(export, args.model, "--out", plain, "--only", "transformer")
    run(export, args.model, "--out", slotted, "--only", "transformer", "--lora-slots")
    description = json.loads((slotted / "export.json").read_text())["lora_slots"]
    for index, (layer, (n_out, n_in)) in enumerate(description["layers"].items()):
        rank = 1 + index % 5
        layers[f"{layer}.{description['a']}"] = rng.standard_normal((rank, n_in), np.float32) * 0.1
        layers[f"{layer}.{description['b']}"] = rng.standard_normal((n_out, rank), np.float32) * 0.1
    save_file({f"transformer.{name}": value for name, value in layers.items()},
              args.out / "lora.safetensors")
    run(export, args.model, "--out", merged, "--only", "transformer", "--lora",
        args.out / "lora.safetensors")
    path = Path("transformer") / "model.onnx"
    name = "transformer.out_hidden_states"
    base, empty, whole = (compute(folder / path, case, "transformer")[name]
                          for folder in (plain, slotted, merged))
    filled = compute(slotted / path, case, "transformer", layers.items())[name]
    report.equal("empty slots change no bit", bool((base == empty).all()), True)
    report.relative("filled slots are the merged export", filled, whole)
    report.equal("and not the plain one", bool(np.abs(whole - base).max() > 1e-2), True)


def identity(args, report):
    for precision in ("f16", "int4"):
        sums = []
        for name in ("once", "again"):
            folder = args.out / f"{name}-{precision}"
            run(args.programs / "ng-export", args.model, "--out", folder, "--precision", precision)
            sums.append((folder / "SHA256SUMS").read_text())
        report.equal(f"{precision} twice, files", sums[0].splitlines(), sums[1].splitlines())


def main():
    args = begun(__doc__)
    case = tensors(args.model / "reference.safetensors")
    report = Report(f"targets and precisions of {args.model}")
    matrix(args, case, expected(args.model, case), report)
    slots(args, case, report)
    identity(args, report)
    report.finish()


if __name__ == "__main__":
    main()
