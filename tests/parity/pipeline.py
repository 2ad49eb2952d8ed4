"""Loading pipelines for the comparisons, without the library's progress bars."""

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging


def load(folder):
    """The pipeline in `folder` in f32, and the number of T5 tokens of a prompt."""
    logging.disable_progress_bar()
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, min(pipe.tokenizer_2.model_max_length, 512)
