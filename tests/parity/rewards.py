"""Compares `ng-train score` with the packages that define the rewards, on weights that torch.save wrote.

    PYTHONPATH=.runtime/rewards python tests/parity/rewards.py clip --programs target/release --out DIR
    PYTHONPATH=.runtime/image-reward:.runtime/rewards python tests/parity/rewards.py image-reward ...

Random networks of true size: ViT-B/32 for hpsv2, CLIP and PickScore (ViT-H/14 for hpsv2 with
--vit-h), ViT-L/14 for the aesthetic predictor, BLIP ViT-L with BERT for ImageReward. The packages
prepare images and prompts with their own code. Scores may differ by 1e-4.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import Report, run

ROOT = Path(__file__).resolve().parents[2]
CLIP_TOKENIZER = ROOT / "tests/fixtures/tokenizers/pipeline/tokenizer"
LIMIT = 1e-4
PROMPTS = ["a red cat on a green sofa, oil painting", "“Don’t &amp; won’t”, " + "a long list of words " * 20]
SHAPES = {"square": (512, 512), "wide": (701, 400), "tall": (333, 768), "tiny": (31, 19)}


def fixtures():
    """`make.py` of the fixtures: it draws parameters, and imports what cannot simply be imported."""
    path = ROOT / "trainer/src/reward/fixtures/networks/make.py"
    spec = importlib.util.spec_from_file_location("make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(folder):
    """Images of several shapes: gradients, an edge and noise."""
    random = np.random.default_rng(0)
    paths = []
    for name, (width, height) in SHAPES.items():
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        channels = [np.sin(9 * x + 4 * y), np.cos(20 * x * y), np.sign(y - x)]
        pixels = 128 + 100 * np.stack(channels, -1) + random.normal(0, 12, (height, width, 3))
        paths.append(folder / f"{name}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


class Comparison:
    def __init__(self, part, programs, out):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.programs = out, programs
        self.report, self.images = Report(f"rewards, {part}"), draw(out)

    def compare(self, kind, settings, score):
        """Our scores of every image and prompt, and those of `score(image, prompt)`; removes the weights."""
        for index, prompt in enumerate(PROMPTS):
            ours = self.scores(kind, settings, prompt)
            theirs = [score(Image.open(path), prompt) for path in self.images]
            print(f"{kind}: {', '.join(f'{value:.4f}' for value in theirs)}")
            self.report.absolute(f"{kind}, prompt {index}", ours, theirs, LIMIT)
        for weights in settings.keys() & {"weights", "clip"}:
            settings[weights].unlink()

    def scores(self, kind, settings, prompt):
        """What `ng-train score` says of every image."""
        fields = {"name": kind, "kind": kind, "weight": 1.0, **settings}
        table = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in fields.items())
        lines = run(
            self.programs / "ng-train", "--device", "cpu", "score", *self.images, "--prompt", prompt,
            "--preset", "signs", "--set", f"rewards=[{{{table}}}]", "--set", "judges=[]",
        ).splitlines()
        return [json.loads(line)["scores"][kind] for line in lines]


def hpsv2(comparison, make, architecture):
    img_score = make.import_hpsv2(comparison.out)
    from hpsv2.src.open_clip import create_model_and_transforms
    from hpsv2.src.open_clip.factory import get_model_config

    model, _, prepare = create_model_and_transforms(
        architecture, light_augmentation=True, output_dict=True)
    weights = comparison.out / "HPS.pt"
    torch.save({"epoch": 3, "state_dict": make.draw(model).state_dict()}, weights)
    config = weights.with_name("open_clip_config.json")
    config.unlink(missing_ok=True)
    if architecture != "ViT-H-14":
        config.write_text(json.dumps({"model_cfg": get_model_config(architecture)}))
    img_score.model_dict.update(model=model, preprocess_val=prepare)
    score = lambda image, prompt: float(img_score.score(image, prompt, cp=weights)[0])
    comparison.compare("hpsv2", {"weights": weights, "tokenizer": CLIP_TOKENIZER}, score)


def open_clip(comparison, make):
    import open_clip

    name = "ViT-B-32-quickgelu"
    model, _, prepare = open_clip.create_model_and_transforms(name)
    weights = comparison.out / "open_clip_pytorch_model.bin"
    torch.save(make.draw(model).state_dict(), weights)
    config = {"model_cfg": open_clip.get_model_config(name)}
    weights.with_name("open_clip_config.json").write_text(json.dumps(config))
    tokenize = open_clip.get_tokenizer(name)

    def score(image, prompt):
        pixels = prepare(image)[None]
        images = model.encode_image(pixels, normalize=True)
        return float((images * model.encode_text(tokenize([prompt]), normalize=True)).sum())

    comparison.compare("clip", {"weights": weights, "tokenizer": CLIP_TOKENIZER}, score)


def squashed(comparison, make):
    """DFN5B's ViT-H/14 in small, opened as from the hub: QuickGELU, heads of 80, images squashed to 27 patches a side."""
    import open_clip
    from open_clip.model import CLIP

    folder = comparison.out / "squashed"
    folder.mkdir(exist_ok=True)
    config = open_clip.get_model_config("ViT-H-14-378-quickgelu") | {"embed_dim": 64}
    config["vision_cfg"] |= {"layers": 2, "width": 160}
    config["text_cfg"] |= {"layers": 2, "width": 128, "heads": 2}
    prepared = open_clip.get_pretrained_cfg("ViT-H-14-378-quickgelu", "dfn5b")
    prepared = {key: prepared[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    weights = folder / "open_clip_pytorch_model.bin"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
    torch.save(make.draw(CLIP(**config)).state_dict(), weights)
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokenize = open_clip.get_tokenizer("ViT-H-14")

    def score(image, prompt):
        images = model.encode_image(prepare(image)[None], normalize=True)
        return float((images * model.encode_text(tokenize([prompt]), normalize=True)).sum())

    comparison.compare("clip", {"weights": weights, "tokenizer": CLIP_TOKENIZER}, score)


def forms(comparison, make):
    """One small CLIP in the files that people have: each scores as the plain one does."""
    from open_clip.model import CLIP

    config = {
        "embed_dim": 64, "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
    }
    model = make.draw(CLIP(**config)).eval()
    (comparison.out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    state = model.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    write = {
        "plain": lambda file: torch.save(state, file),
        "before PyTorch 1.6": lambda file: torch.save(state, file, _use_new_zipfile_serialization=False),
        "of training": lambda file: torch.save({"epoch": 1, "state_dict": wrapped, "optimizer": optimizer}, file),
        "TorchScript": lambda file: torch.jit.script(model).save(str(file)),
    }
    for kind in ("clip", "hpsv2"):
        found = {}
        for form, save in write.items():
            save(comparison.out / "form.pt")
            settings = {"weights": comparison.out / "form.pt", "tokenizer": CLIP_TOKENIZER}
            found[form] = comparison.scores(kind, settings, PROMPTS[0])
            comparison.report.absolute(f"{kind}, file {form}", found[form], found["plain"], 0)
    (comparison.out / "form.pt").unlink()


def pickscore(comparison, make):
    """As on PickScore's page; with Pillow, as the transformers of its day did."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = make.draw(CLIPModel(CLIPConfig()))
    model.save_pretrained(comparison.out)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    processor = CLIPImageProcessorPil()

    def score(image, prompt):
        ids = tokenizer([prompt], padding="max_length", truncation=True, max_length=77,
                        return_tensors="pt")
        outputs = model(**processor(image, return_tensors="pt"), **ids)
        return float((outputs.image_embeds * outputs.text_embeds).sum())

    weights = comparison.out / "model.safetensors"
    comparison.compare("pickscore", {"weights": weights, "tokenizer": CLIP_TOKENIZER}, score)


def image_reward(comparison, make):
    make.import_image_reward()
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from transformers import BertTokenizer, BertTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat on green sofa , oil paint ##ing don ' t & amp ; won " \
            "long list of words".split()
    vocabulary = comparison.out / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary)).backend_tokenizer.save(str(comparison.out / "tokenizer.json"))
    blip_pretrain.init_tokenizer = lambda: BertTokenizer(str(vocabulary))
    config = comparison.out / "med_config.json"
    config.write_text(json.dumps(make.MED | {
        "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 512,
        "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 30524}))
    model = make.draw(ImageReward(config))
    weights = comparison.out / "ImageReward.pt"
    torch.save(model.state_dict(), weights)
    score = lambda image, prompt: model.score(prompt, image)
    comparison.compare("image-reward", {"weights": weights, "tokenizer": comparison.out}, score)


def aesthetic(comparison, make):
    """The head of the predictor on OpenAI's ViT-L/14, prepared by OpenAI's package."""
    from clip.clip import _transform
    from ImageReward.models.AestheticScore import MLP
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    model = make.draw(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)))
    model.save_pretrained(comparison.out)
    head = make.draw(MLP(768))
    weights = comparison.out / "linearMSE.pth"
    torch.save(head.state_dict(), weights)
    prepare = _transform(224)

    def score(image, _prompt):
        features = model.get_image_features(pixel_values=prepare(image)[None])
        return float(head(torch.nn.functional.normalize(features)))

    clip = comparison.out / "model.safetensors"
    comparison.compare("aesthetic", {"weights": weights, "clip": clip}, score)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["clip", "image-reward"])
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vit-h", action="store_true", help="hpsv2's own size: 4 GB, minutes")
    args = parser.parse_args()
    comparison, make = Comparison(args.part, args.programs, args.out), fixtures()
    with torch.no_grad():
        if args.part == "clip":
            hpsv2(comparison, make, "ViT-H-14" if args.vit_h else "ViT-B-32")
            open_clip(comparison, make)
            squashed(comparison, make)
            forms(comparison, make)
            pickscore(comparison, make)
        else:
            image_reward(comparison, make)
            aesthetic(comparison, make)
    comparison.report.finish()


if __name__ == "__main__":
    main()
