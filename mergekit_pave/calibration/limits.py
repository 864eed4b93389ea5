"""What one model can take: input kind, positions, vocabulary rows, decoder start token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import BUILDING, class_name
from mergekit_pave.recipe.parameters import DATA_FREE, GENERATED

_POSITION_KEYS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_seq_len",
)

# Tokenizers without a limit report about 1e30.
_NO_LIMIT = 10**9


def main_input(config: PreTrainedConfig) -> str:
    """`input_ids`, `pixel_values`, ...: what the model's forward pass takes first."""
    known: Any = MODEL_MAPPING.get(type(config), None)
    model = known[0] if isinstance(known, tuple) else known
    return getattr(model, "main_input_name", "input_ids")


def text_configs(config: PreTrainedConfig) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The configurations that describe the text inputs of the encoder and of the decoder.

    One and the same unless the model is a composite of two.
    """
    decoder = config.get_text_config(decoder=True)
    encoder = getattr(config, "encoder", None)
    if config.is_encoder_decoder and isinstance(encoder, PreTrainedConfig):
        return encoder.get_text_config(), decoder
    return config.get_text_config(), decoder


def is_text_encoder(config: PreTrainedConfig) -> bool:
    """True for BERT and its kin, which take sentence pairs; causal models take one text."""
    text = config.get_text_config()
    return (
        text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not any(map(_is_named_causal, config.architectures or ()))
        and not config.is_encoder_decoder
        and not getattr(text, "is_decoder", False))


def _is_named_causal(architecture: str) -> bool:
    return "CausalLM" in architecture or "LMHead" in architecture


def refuse_unless_causal(config: PreTrainedConfig, model: str) -> None:
    """Raise `PaveError` for a model that cannot write text for `calibration_dataset: self`."""
    own = class_name(config)
    known = own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if own and not config.is_encoder_decoder and (known or _is_named_causal(own)):
        return
    raise PaveError(
        f"calibration_dataset: {GENERATED} needs a causal language model; {model} is a "
        f"{own or 'model without a named class'}: name a dataset or use {DATA_FREE}.")


def length_limit(config: PreTrainedConfig, tokenizer: Any, wanted: int) -> int:
    """`wanted` tokens, or as many as the tokenizer and the position table allow."""
    limit = wanted
    if tokenizer is not None and 0 < tokenizer.model_max_length < _NO_LIMIT:
        limit = min(limit, tokenizer.model_max_length)
    for text in {id(text): text for text in text_configs(config)}.values():
        for key in _POSITION_KEYS:
            positions = getattr(text, key, None)
            if not isinstance(positions, int) or positions <= 0:
                continue
            pad = getattr(text, "pad_token_id", None) or 0
            if limit + pad + 1 > positions:
                limit = min(limit, positions - _unusable_positions(text))
    return limit


def _unusable_positions(config: PreTrainedConfig) -> int:
    """Rows of the position table that no token uses.

    RoBERTa and its many kin count positions from `padding_idx + 1`, and nothing in a
    configuration says so; the table itself does. Built without memory, and only when the
    limit is near enough to matter.
    """
    try:
        with BUILDING, torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config))
    except Exception:  # remote code, or an architecture without a plain model
        return 0
    return max(
        (module.padding_idx + 1 for name, module in model.named_modules()
         if isinstance(module, nn.Embedding) and module.padding_idx is not None
         and "position" in name.rsplit(".", 1)[-1]),
        default=0)


def decoder_start(config: PreTrainedConfig, model: str) -> int:
    """The token that an encoder-decoder's target is shifted behind."""
    for holder in (config, config.get_text_config(decoder=True)):
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(holder, key, None)
            if token is not None:
                return token
    raise PaveError(
        f"{model} does not say how its decoder starts; set decoder_start_token_id in its "
        "config.json.")
