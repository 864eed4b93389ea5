"""Whether a LoRA adapter fits its model, before it is merged into it."""

from __future__ import annotations

from mergekit.common import ModelReference

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import ADAPTERS, adapter_headers, folder_of
from mergekit_pave.models.layers import empty_model
from mergekit_pave.models.source import LoaderOptions

_PREFIX = "base_model.model."
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
        state = empty_model(model.config(options.trust_remote_code),
                            options.trust_remote_code).state_dict()
    except Exception:  # whatever a model's code cannot do without values
        return None
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for key, header in adapter_headers(folder).items():
        name, factor = target(key)
        there = shapes.get(name)
        if there is None:
            # An adapter's bias, prompt or magnitude: peft knows where it belongs.
            if factor:
                return (f"The adapter {model.lora} has {key}, and {model.model} no {name}: it was "
                        "trained on another model; name that one before the `+`.")
            continue
        fits = not factor or factor.startswith(".lora_emb") or (
            header.shape[1 if factor == _FACTORS[0] else 0] in there)
        if (not factor and header.shape != there) or not fits:
            return (
                f"The adapter {model.lora} does not fit {model.model}: its {key} is "
                f"{header.shape}, and {name} is {there}; where it was trained with added tokens, "
                "load the model, resize_token_embeddings to its tokenizer, load the adapter, "
                "merge_and_unload, save_pretrained, and name that folder."
            )
    return None


def folder_is_local(model: ModelReference) -> bool:
    return model.lora.path.startswith((".", "/", "~"))


def target(key: str) -> tuple[str, str]:
    """The weight that a tensor of an adapter changes, and which factor it is, if any."""
    name = key.removeprefix(_PREFIX)
    for factor in _FACTORS:
        if name.endswith(factor):
            return name.removesuffix(factor) + ".weight", factor
    for part in (".modules_to_save.default", ".modules_to_save", ".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name, ""
