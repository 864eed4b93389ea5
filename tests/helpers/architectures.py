"""Tiny random models of every class that transformers knows for text, images, and both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM",
         "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
LARGEST = 30_000_000  # parameters
# By the begin of the list: the value of a setting whose name fits.
_SIZES = [(re.compile(pattern), value) for pattern, value in (
    (r"first_k_dense_replace|num_dense_layers|n_groups?|topk_group|num_nextn.*"
     r"|.*shared_experts?", 1),
    (r".*experts_per_tok(en)?|.*top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r".*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r".*(intermediate|ffn|mlp)_(size|dim)|.*_ffn_dim|d_ff|n_inner|.*mlp_dim", 48),
    (r".*(key_value|kv|query_group).*(heads|num|groups)|n_head_kv", 2),
    (r".*heads|n_head|.*num_heads.*", 4),
    (r".*head_dim|d_kv|.*head_size|qk_channels|v_channels", 8),
    (r".*lora_rank|rank", 8),
    (r".*vocab_size.*|n_words", 96),
    (r".*max_position.*|n_positions|max_(source|target)_positions|.*max_seq_len", 64),
    (r".*(num_|n_|_)layers?|depth|.*num_blocks", 2),
    (r"image_size|.*img_size", 32),
    (r"patch_size", 8),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embed_dim|d_latents|hidden_dim|embedding_size|out_hidden_size)|dim"
     r"|.*(embed|projection|output|hidden|input)_dim|.*_hidden_size|.*channels", 32),
)]
# What some configurations leave to their checkpoints.
_UNSET = {"head_dim": 8, "vocab_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
          "hidden_size": 32, "intermediate_size": 48}
_FEWER = re.compile(r".*(num_|n_|_)layers?|depth|.*vocab_size|.*max_position.*|.*experts")


def architectures() -> dict[str, type]:
    """Class name -> its configuration class."""
    names = {name for task in TASKS
             for entry in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
             for name in ((entry,) if isinstance(entry, str) else entry)}
    found = {}
    for name in sorted(names | set(NAME_TO_ARCH)):
        cls = getattr(transformers, name, None)
        if cls is not None and getattr(cls, "config_class", None):
            found[name] = cls.config_class
    return found


def build(name: str) -> torch.nn.Module:
    """A random model of a class, as small as its configuration can be made by rule."""
    cls = getattr(transformers, name)
    for rule in (_sized, _filled, _fewer):
        try:
            config = rule(cls.config_class())
            # As it is read back: a number that was changed may contradict another one.
            config = cls.config_class.from_dict(json.loads(config.to_json_string(use_diff=False)))
            config.architectures = [name]
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size} parameters")
            torch.manual_seed(0)
            return cls(config)
        except Exception as error:  # a setting that this rule has made unfit
            fault = error
    raise ValueError(f"{type(fault).__name__}: {fault}")


def _sized(config: PreTrainedConfig) -> PreTrainedConfig:
    return _changed(config, lambda key, value: next(
        (size for pattern, size in _SIZES if pattern.fullmatch(key)), value))


def _filled(config: PreTrainedConfig) -> PreTrainedConfig:
    for part in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for key, value in _UNSET.items():
            if getattr(part, key, 0) is None:
                setattr(part, key, value)
    return _sized(config)


def _fewer(config: PreTrainedConfig) -> PreTrainedConfig:
    def rule(key: str, value: int) -> int:
        if not _FEWER.fullmatch(key):
            return value
        return next(size for pattern, size in _SIZES if pattern.fullmatch(key))
    return _changed(config, rule)


def _changed(config: PreTrainedConfig, rule: Any) -> PreTrainedConfig:
    """A configuration with smaller numbers; of lists of layers, one layer of each kind stays."""
    layers = getattr(config, "layer_types", None) or []
    kept = sorted({layers.index(kind) for kind in layers})
    kept = kept if len(kept) > 1 else [0, 1][: len(layers)]
    for key, value in list(vars(config).items()):
        if key.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            _changed(value, rule)
        elif isinstance(value, (list, tuple)) and layers and len(value) == len(layers):
            setattr(config, key, type(value)(value[i] for i in kept))
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif key.endswith("_token_id"):
            setattr(config, key, min(value, 3))
        elif value > 0:
            small = min(value, rule(key, value))
            if layers and value == len(layers):
                small = len(kept)
            setattr(config, key, small)
    return config


def family(folder: Path, name: str) -> list[Path]:
    """A base and two fine-tunes, in which every fourth tensor is as in the base."""
    model = build(name)
    paths = [folder / part for part in ("base", "e0", "e1")]
    for path in paths:
        model.save_pretrained(path)
        with torch.no_grad():
            for i, parameter in enumerate(_floating(model)):
                if i % 4:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    transformers.AutoConfig.from_pretrained(paths[0])
    getattr(transformers, name).from_pretrained(paths[0])  # fails where the rules made it unfit
    return paths


def _floating(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for _, p in sorted(model.named_parameters()) if p.is_floating_point())
