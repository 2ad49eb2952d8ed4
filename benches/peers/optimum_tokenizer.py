"""Tokenizers for Optimum, whose transformers is older than the folders."""

import json

from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast


def tokenizer(folder):
    """The tokenizer in `folder`, read by hand."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")
    settings = {name: config[name] for name in names if name in config}
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(whole), **settings)
    return CLIPTokenizerFast(
        vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"), **settings,
    )
