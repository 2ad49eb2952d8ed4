"""Compares LoRA of every kind that diffusers or PEFT read: `ng-export --lora` and `ng-train sample`.

    python tests/parity/loras.py MODEL --programs target/release --out DIR

Each file is made here from random numbers, loaded by `FluxPipeline.load_lora_weights` and fused, or made
and merged by PEFT. Every weight of the export's transformer must be theirs within 1e-6 of the
largest; then images from one noise must agree: latents within 1e-4 of the largest value, pixels within
half a step of 255, which rounding takes. What diffusers is known to read wrongly or not at all (a single
block's `linear1` at another width than FLUX's, layers outside the blocks, text encoders) is left to our own tests.
"""

import json

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from PIL import Image
from pipeline import load
from report import Report, begun, run, tensors
from safetensors.numpy import save_file

WEIGHTS, LATENTS, PIXELS = 1e-6, 1e-4, 0.505 / 255
SIZE = 32
# Rank and alpha differ from layer to layer.
BFL = [
    ("double_blocks.0.img_attn.qkv", (3, 1), 4, 2.0),
    ("double_blocks.0.img_attn.proj", (1, 1), 3, 7.5),
    ("double_blocks.0.img_mlp.0", (4, 1), 5, 1.0),
    ("double_blocks.0.img_mod.lin", (6, 1), 2, 3.0),
    ("double_blocks.1.txt_attn.qkv", (3, 1), 6, 4.0),
    ("double_blocks.1.txt_attn.proj", (1, 1), 4, 1.5),
    ("double_blocks.1.txt_mlp.2", (1, 4), 3, 2.5),
    ("single_blocks.1.linear2", (1, 5), 4, 6.0),
    ("single_blocks.1.modulation.lin", (3, 1), 2, 0.5),
]
DIFFUSERS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
             "transformer_blocks.1.attn.add_q_proj", "single_transformer_blocks.1.attn.to_v"]
TARGETS = ["to_q", "to_k", "add_q_proj", "ff.net.0.proj", "proj_mlp"]


class Files:
    """LoRA files of random numbers for a model of width `d`."""

    def __init__(self, out, d):
        self.out, self.d, self.random = out, d, np.random.default_rng(11)

    def normal(self, *shape):
        return (0.1 * self.random.standard_normal(shape)).astype(np.float32)

    def write(self, name, tensors, metadata=None):
        path = self.out / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        return path

    def bfl(self, name, spell, endings, with_alpha, layers=BFL):
        found = {}
        for layer, (rows, columns), rank, alpha in layers:
            found[spell(layer, endings[0])] = self.normal(rank, columns * self.d)
            found[spell(layer, endings[1])] = self.normal(rows * self.d, rank)
            if with_alpha:
                found[spell(layer, "alpha")] = np.array(alpha, np.float32)
        return found

    def all(self):
        """Name and path of each file."""
        down_up = ("lora_down.weight", "lora_up.weight")
        kohya = self.bfl("kohya", lambda l, e: f"lora_unet_{l.replace('.', '_')}.{e}", down_up, True)
        yield "kohya", self.write("kohya", kohya)
        comfy = self.bfl("comfy", lambda l, e: f"diffusion_model.{l}.{e}", down_up, True)
        yield "ComfyUI", self.write("comfy", comfy)
        xlabs = {}
        for block, what, rows, rank in ((0, "qkv_lora1", 3, 3), (0, "qkv_lora2", 3, 4),
                                        (1, "proj_lora1", 1, 2), (1, "proj_lora2", 1, 5)):
            path = f"double_blocks.{block}.processor.{what}"
            xlabs[f"{path}.down.weight"] = self.normal(rank, self.d)
            xlabs[f"{path}.up.weight"] = self.normal(rows * self.d, rank)
        yield "XLabs", self.write("xlabs", xlabs)
        one = {}
        for rank, layer in enumerate(DIFFUSERS, 2):
            path = f"lora_transformer_{layer.replace('.', '_')}"
            one[f"{path}.lora_down.weight"] = self.normal(rank, self.d)
            one[f"{path}.lora_up.weight"] = self.normal(self.d, rank)
            one[f"{path}.alpha"] = np.array(3, np.float32)
        yield "OneTrainer", self.write("onetrainer", one)
        for label, settings, ranks in (
            ("diffusers", None, [4] * 4),
            ("diffusers, rsLoRA", {"use_rslora": True, "lora_alpha": 6}, [4] * 4),
            ("diffusers, patterns", {
                "rank_pattern": {"^transformer_blocks.0.attn.to_k": 2},
                "alpha_pattern": {"^transformer_blocks.0.attn.to_k": 8, "q_proj": 9,
                                  r"single_transformer_blocks\.\d\.attn\.to_v": 6},
            }, [4, 2, 4, 4]),
        ):
            found = {}
            for layer, rank in zip(DIFFUSERS, ranks):
                found[f"transformer.{layer}.lora_A.weight"] = self.normal(rank, self.d)
                found[f"transformer.{layer}.lora_B.weight"] = self.normal(self.d, rank)
            metadata = None
            if settings:
                whole = {"r": 4, "lora_alpha": 4, "target_modules": DIFFUSERS, **settings}
                whole = {f"transformer.{key}": value for key, value in whole.items()}
                metadata = {"lora_adapter_metadata": json.dumps(whole, sort_keys=True)}
            yield label, self.write(label.replace(", ", "-"), found, metadata)


def initializers(folder):
    model = onnx.load(str(folder / "model.onnx"))
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def compare(report, label, export, component, module):
    """Every weight of the export against those of a torch module."""
    found, worst, largest = initializers(export / component), 0.0, 0.0
    for name, weight in module.state_dict().items():
        name, weight = name.replace("base_layer.", ""), weight.numpy()
        ours = found[name]
        # Linear weights are stored transposed.
        pairs = [ours] if ours.shape != weight.T.shape else [ours.T]
        pairs += [ours] if ours.shape == weight.shape else []
        worst = max(worst, min(np.abs(each - weight).max() for each in pairs))
        largest = max(largest, np.abs(weight).max())
    report.relative(f"{label}: {component}", np.array([worst + largest]), np.array([largest]), WEIGHTS)


def image(report, label, pipe, length, args, lora, folder):
    """One image by diffusers, and by both of our programs from the same noise."""
    folder.mkdir(exist_ok=True)
    shape = (1, 16, SIZE // pipe.vae_scale_factor, SIZE // pipe.vae_scale_factor)
    noise = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    save_file({"latents": noise}, folder / "noise.safetensors")
    settings = {"prompt": 'a red "HAT"', "height": SIZE, "width": SIZE, "num_inference_steps": 4,
                "guidance_scale": 3.5, "max_sequence_length": length,
                "latents": pipe._pack_latents(torch.from_numpy(noise), *shape)}
    packed = pipe(**settings, output_type="latent").images
    latents = pipe._unpack_latents(packed, SIZE, SIZE, pipe.vae_scale_factor).numpy()
    pixels = pipe(**settings, output_type="np").images[0]
    for program, model in ((["ng-sample"], folder / "export"),
                           (["ng-train", "sample", "--lora", lora], args.model)):
        png, stored = folder / f"{program[0]}.png", folder / f"{program[0]}.safetensors"
        run(args.programs / program[0], *program[1:], "--model", model, "--prompt", 'a red "HAT"',
            "--steps", 4, "--solver", "euler", "--guidance", 3.5, "--width", SIZE, "--height", SIZE,
            "--noise", folder / "noise.safetensors", "--latents-out", stored, "-o", png)
        report.relative(f"{label}: {program[0]} latents", tensors(stored)["latents"], latents, LATENTS)
        ours = np.asarray(Image.open(png).convert("RGB"), np.float32) / 255
        report.absolute(f"{label}: {program[0]} pixels", ours, pixels, PIXELS)


def of_peft(out, report, args):
    """Adapters that PEFT makes, saves and merges."""
    kinds = [
        ("LoRA", LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, alpha_pattern={"q_proj": 9},
                            rank_pattern={"to_k": 2})),
        ("rsLoRA", LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True)),
        ("DoRA", LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True)),
        ("LoRA with biases", LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_bias=True)),
        ("LoHa", LoHaConfig(r=4, alpha=6, target_modules=TARGETS)),
        ("LoKr", LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_factor=4)),
    ]
    for label, config in kinds:
        folder = out / f"peft-{label.replace(' ', '-')}"
        pipe, length = load(args.model)
        torch.manual_seed(5)
        adapted = get_peft_model(pipe.transformer, config)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                step = 0.1 * torch.randn_like(parameter)
                parameter.data = parameter.data + step if "magnitude" in name else step
        adapted.save_pretrained(folder)
        pipe.transformer = adapted.merge_and_unload()
        checked(report, f"PEFT, {label}", pipe, length, args, folder, out / folder.name)


def checked(report, label, pipe, length, args, lora, folder, with_image=True):
    folder.mkdir(exist_ok=True)
    said = run(args.programs / "ng-export", args.model, "--lora", lora, "--out", folder / "export")
    assert said
    compare(report, label, folder / "export", "transformer", pipe.transformer)
    if with_image:
        image(report, label, pipe, length, args, lora, folder)


def main():
    args = begun(__doc__)
    report = Report(f"LoRA against diffusers and PEFT, {args.model}")
    pipe, length = load(args.model)
    files = Files(args.out, pipe.transformer.inner_dim)
    for label, path in files.all():
        pipe, length = load(args.model)
        pipe.load_lora_weights(path)
        pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
        checked(report, f"{label}", pipe, length, args, path, args.out / f"of-{path.stem}")
    of_peft(args.out, report, args)
    report.finish()


if __name__ == "__main__":
    main()
