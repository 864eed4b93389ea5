"""Whether a LoRA adapter fits its model, before it is merged into it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from mergekit.common import ModelReference
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import ADAPTERS, adapter_headers, folder_of
from mergekit_pave.models.layers import BUILDING, empty_model
from mergekit_pave.models.source import LoaderOptions

PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def unfit(model: ModelReference, options: LoaderOptions) -> str | None:
    """The sentence about an adapter of another model, or of one with other tokens.

    `None` where it fits, or is not on this machine yet.

    Raises:
        PaveError: its files are missing or damaged.
    """
    folder = folder_of(model.lora, options.cache_dir)
    if folder is None or not any((folder / name).exists() for name in ADAPTERS):
        if folder is not None and folder_is_local(model):
            raise PaveError(f"{folder} holds no adapter: {ADAPTERS[0]} is missing; save it again.")
        return None
    try:
        empty = empty_model(model.config(options.trust_remote_code), options.trust_remote_code)
        own = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
        expected, mergeable = _expected(empty, folder)
    except Exception:  # whatever a model's code cannot do without values
        return None
    if not mergeable:
        return (f"The adapter {model.lora} changes no weights, as a prompt does, and cannot be "
                "merged: name an adapter of another kind, such as LoRA.")
    headers = adapter_headers(folder)
    found = {plain(key): key for key in headers}
    for name, key in found.items():
        weight, factor = target(key)  # an embedding that peft has saved whole, say
        whole = own.get(weight) if key.startswith(PREFIX) and not factor else None
        there = expected.get(name, whole)
        if there is None:
            return (f"The adapter {model.lora} has {key}, and {model.model} no place for it: it "
                    "was trained on another model, or saved without peft; name its own model "
                    "before the `+`, or save it again with peft.")
        if headers[key].shape != there:
            return (
                f"The adapter {model.lora} does not fit {model.model}: its {key} is "
                f"{headers[key].shape}, and by its settings {there}; where it was trained with "
                "added tokens, load the model, resize_token_embeddings to its tokenizer, load the "
                "adapter, merge_and_unload, save_pretrained, and name that folder."
            )
    if lacking := sorted(expected.keys() - found.keys()):
        return (f"The adapter {model.lora} lacks {len(lacking)} tensors that its settings ask for, "
                f"such as {lacking[0]}: save or download it again.")
    return None


def _expected(empty: PreTrainedModel, folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """What peft itself would save of the model with such an adapter, and whether it can merge it.

    Returns:
        Shapes by names, and whether the adapter changes weights.
    """
    settings = PeftConfig.from_pretrained(str(folder))
    if isinstance(settings, LoraConfig):
        settings.init_lora_weights = False  # some ways to begin need the model's values
    with BUILDING, torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(empty, settings, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return shapes, hasattr(adapted, "merge_and_unload")


def folder_is_local(model: ModelReference) -> bool:
    return model.lora.path.startswith((".", "/", "~"))


def plain(key: str) -> str:
    """A tensor's name without that by which peft knows an adapter, which some trainers leave in."""
    return ".".join(part for part in key.split(".") if part != "default")


def target(key: str) -> tuple[str, str]:
    """The weight that a tensor of an adapter changes, and which factor it is, if any."""
    name = key.removeprefix(PREFIX)
    for factor in _FACTORS:
        if name.endswith(factor):
            return name.removesuffix(factor) + ".weight", factor
    for part in (".modules_to_save.default", ".modules_to_save", ".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name, ""
