"""Whether a model runs on text alone or on images alone: some need both in one forward pass."""

from __future__ import annotations

import copy
import re

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from mergekit_pave.models.layers import class_name

# How a forward pass ends in which an input is missing. Other errors, such as of an operation that
# needs values, do not mean that.
_MISSING = re.compile(
    r"ValueError: .*specify.*|AttributeError: 'NoneType'.*|TypeError: .* missing \d+ required.*")


def missing_input(config: PreTrainedConfig, images: bool) -> str | None:
    """Why the model of a config cannot run on text alone (or on images alone); `None` if it can.

    Runs the model's class on tensors without memory (the `meta` device), and only for configs
    that hold those of several models.
    """
    name = class_name(config)
    cls = getattr(transformers, name, None) if name else None
    if cls is None or not _parts(config):
        return None
    try:
        with torch.device("meta"), torch.inference_mode():
            model = cls(copy.deepcopy(config)).eval()
            model(**empty_inputs(config, images))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        if _MISSING.match(said):
            return f"{name}, {said.rstrip('.')}"
    return None


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def empty_inputs(config: PreTrainedConfig, images: bool) -> dict[str, Tensor]:
    """One image or four tokens for a model of that config, on the `meta` device."""
    if not images:
        ids = torch.ones(1, 4, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, "decoder_input_ids": ids} if config.is_encoder_decoder else inputs
    vision = next((c for c in _parts(config) if getattr(c, "image_size", None)), config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return {"pixel_values": torch.ones(1, channels, height, width, device="meta")}
