"""Checks an export outside our own code: onnx.checker and Python's onnxruntime.

    python tests/parity/export.py MODEL EXPORT

Every graph must pass the full check (types and shapes inferred and compared), have the inputs and
outputs that Optimum gives the same network, and compute from the inputs in
MODEL/reference.safetensors what libtorch computed, within 1e-5 of the largest value.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from report import Report, tensors

# Folder: inputs, then outputs.
GRAPHS = {
    "transformer": (
        {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids",
         "txt_ids", "guidance"},
        {"out_hidden_states"},
    ),
    "text_encoder": ({"input_ids"}, {"last_hidden_state", "pooler_output"}),
    "text_encoder_2": ({"input_ids"}, {"last_hidden_state"}),
    "vae_decoder": ({"latent_sample"}, {"sample"}),
    "vae_encoder": ({"sample"}, {"latent_parameters"}),
}
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    args = parser.parse_args()
    case = tensors(args.model / "reference.safetensors")
    report = Report(f"export, {args.export}")

    for folder, (inputs, outputs) in GRAPHS.items():
        path = args.export / folder / "model.onnx"
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False)
        opset = {entry.domain: entry.version for entry in graph.opset_import}[""]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = {port.name for port in session.get_inputs()}
        if f"{folder}.guidance" not in case:
            inputs = inputs - {"guidance"}
        title = f"{folder} (opset {opset}, ir {graph.ir_version})"
        report.equal(f"{title} inputs", sorted(found), sorted(inputs))
        report.equal(f"{title} outputs", sorted(p.name for p in session.get_outputs()),
                     sorted(outputs))
        feed = {
            port.name: case[f"{folder}.{port.name}"].astype(KINDS[port.type])
            for port in session.get_inputs()
        }
        names = sorted(outputs)
        for name, value in zip(names, session.run(names, feed)):
            report.relative(f"{title} {name}", value, case[f"{folder}.{name}"])
    report.finish()


if __name__ == "__main__":
    main()
