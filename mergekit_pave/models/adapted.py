"""A model with a LoRA adapter, applied while its tensors are read: no merged copy on disk.

peft's way is to load the whole model, to add the adapter, and to save a copy, which mergekit then
reads. Here a weight `W` (out, in) of an adapted layer is read as

    W + s B A,   s = alpha / r,   or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732),

and, where the adapter holds magnitudes `m` (out), as `m (W + s B A) / |W + s B A|` by rows (DoRA,
arXiv 2402.09353). Sums are float32 or better, so that in a merge with `dtype: float32` the change
keeps the rank of the adapter: a copy in bfloat16 buries its weakest directions in rounding.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_pave.algebra.numeric import wide
from mergekit_pave.errors import PaveError
from mergekit_pave.models.adapters import plain, target, unfit
from mergekit_pave.models.headers import ADAPTERS, folder_of
from mergekit_pave.models.layers import empty_model, is_transposed
from mergekit_pave.models.merged_copies import NOT_THERE
from mergekit_pave.models.renaming import ClassNames
from mergekit_pave.models.source import LoaderOptions, model_source

Change = Callable[[Tensor], Tensor]

_PREFIX = "base_model.model."
_CONFIG = "adapter_config.json"
_FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?")
_EMBEDDED = {"lora_embedding_A", "lora_embedding_B"}
# Settings that say nothing of the weights, or that `_changes` takes into account.
_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
    # How training began; `init_lora_weights` names the kinds that change the base's weights.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_lora_weights",
    "runtime_config",
}
_PLAIN_STARTS = (True, False, None, "gaussian")


class AdaptedLoader(LazyTensorLoader):
    """mergekit's loader of a model, with an adapter in the tensors that it gives."""

    def __init__(
        self, index: ShardedTensorIndex, changes: Mapping[str, Change], dtype: torch.dtype | None,
        lazy_unpickle: bool = False,
    ) -> None:
        """
        Args:
            index: of the model's files.
            changes: of its tensors, by their names there.
            dtype: of changed tensors; that of the stored ones when not given.
            lazy_unpickle: as for mergekit's.
        """
        super().__init__(index, lazy_unpickle)
        self._changes, self._dtype = changes, dtype

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: Any = None, raise_on_missing: bool = True
    ) -> Any:
        there = self.index.tensor_paths
        name = next((n for n in (key, *(aliases or ())) if n in there), key)
        tensor = super().get_tensor(name, device, raise_on_missing=raise_on_missing)
        if tensor is None or name not in self._changes:
            return tensor
        return self._changes[name](tensor).to(self._dtype or tensor.dtype)


def adapted_loader(
    model: ModelReference, options: LoaderOptions, dtype: str | None = None,
    lazy_unpickle: bool = False,
) -> AdaptedLoader:
    """The tensors of `MODEL+ADAPTER`; a model of the Hub is downloaded.

    Args:
        model: with an adapter.
        options: where downloads are kept.
        dtype: the name of that of a merge; changed tensors are rounded to the stored one's without.
        lazy_unpickle: as for mergekit's.

    Raises:
        PaveError: an adapter that only peft can apply, or one of another model.
    """
    if why := only_by_peft(model, options) or unfit(model, options):
        raise PaveError(why)
    index = ShardedTensorIndex.from_disk(model_source(model, options, unmerged=True).path)
    adapter = _folder(model, options)
    empty = empty_model(model.config(options.trust_remote_code), options.trust_remote_code)
    names = ClassNames(empty)
    there = {names.one(name): name for name in index.tensor_paths}
    tied = names.tied.keys() | set(names.tied.values())
    changes = {}
    try:
        for own, change in _changes(_settings(adapter), _tensors(adapter), empty):
            if own not in there or own in tied:
                raise ValueError(f"it changes {own}, which is no tensor of its own in the files")
            changes[there[own]] = change
    except (ValueError, TypeError, re.error) as error:
        raise PaveError(_needs_copy(model, str(error))) from error
    wanted = options.lora_merge_dtype or dtype
    return AdaptedLoader(
        index, changes, dtype_from_name(wanted) if wanted else None, lazy_unpickle)


def _changes(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], empty: nn.Module
) -> Iterator[tuple[str, Change]]:
    """What becomes of each tensor of the class; `ValueError` where only peft can tell."""
    if why := _beyond(settings):
        raise ValueError(why)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if found := _FACTOR.fullmatch(key.removeprefix(_PREFIX)):
            part = found[2] + (found[3] if found[3] == ".bias" else "")
            layers.setdefault(found[1], {})[part] = value
        else:  # a bias, a head, or another module that was trained and saved whole
            yield target(key)[0], partial(_replaced, new=value)
    for layer, parts in layers.items():
        module = empty.get_submodule(layer)
        if isinstance(module, nn.Embedding) and parts.keys() == _EMBEDDED:
            a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
            yield f"{layer}.weight", partial(
                _adapted, a=a, b=b, scale=_scale(settings, layer, len(a)), transposed=True)
            continue
        if not isinstance(module, (nn.Linear, Conv1D)) or not {"lora_A", "lora_B"} <= {*parts}:
            raise ValueError(f"it changes {layer}, a {type(module).__name__}")
        a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        scale = _scale(settings, layer, len(a))
        yield f"{layer}.weight", partial(
            _adapted, a=a, b=b, scale=scale, transposed=is_transposed(module), magnitude=magnitude)
        if (bias := parts.get("lora_B.bias")) is not None:
            yield f"{layer}.bias", partial(_shifted, by=bias, scale=scale)


def _scale(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    alpha = next(own, settings.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _adapted(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool,
    magnitude: Tensor | None = None,
) -> Tensor:
    w = wide(weight)
    w = w.mT if transposed else w
    w = torch.addmm(w, b.to(w), a.to(w), alpha=scale)
    if magnitude is not None:
        w = w * (magnitude.to(w) / w.norm(dim=1)).unsqueeze(1)
    return (w.mT if transposed else w).contiguous()


def _shifted(bias: Tensor, by: Tensor, scale: float) -> Tensor:
    return torch.add(wide(bias), by.to(wide(bias)), alpha=scale)


def _replaced(stored: Tensor, new: Tensor) -> Tensor:
    return new.to(stored.device)


def only_by_peft(model: ModelReference, options: LoaderOptions) -> str | None:
    """The sentence about an adapter on this machine that needs a merged copy, by its settings."""
    folder = folder_of(model.lora, options.cache_dir)
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    why = _beyond(_settings(folder))
    return _needs_copy(model, why) if why else None


def _needs_copy(model: ModelReference, why: str) -> str:
    return (f"{model} can only be merged by peft, since {why}: add --lora-merge-cache DIR to the "
            "command, for the merged copy.")


def _folder(model: ModelReference, options: LoaderOptions) -> Path:
    part = model.lora
    if Path(part.path).exists():
        return Path(part.path)
    try:
        return Path(snapshot_download(
            part.path, revision=part.revision, cache_dir=options.cache_dir,
            allow_patterns=["adapter_*"]))
    except NOT_THERE as fault:
        raise PaveError(
            f"The adapter {part} cannot be had ({str(fault).splitlines()[0].rstrip('.:')}): check "
            "the name, the network and, for a gated one, `hf auth login`.") from fault


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise PaveError(f"{folder / _CONFIG} cannot be read ({fault}); save the adapter again."
                        ) from fault
    if not isinstance(found, dict):
        raise PaveError(f"{folder / _CONFIG} holds no settings; save the adapter again.")
    return found


def _beyond(settings: Mapping[str, Any]) -> str | None:
    """What of an adapter's settings is not understood here."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return f"its kind is {kind}"
    if (start := settings.get("init_lora_weights")) not in _PLAIN_STARTS:
        return f"it was started by {start}, which changes the model's own weights"
    known = vars(LoraConfig())
    for key, value in settings.items():
        if key not in _UNDERSTOOD and value and value != known.get(key):
            return f"it sets {key}"
    return None


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = next(folder / name for name in ADAPTERS if (folder / name).exists())
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {plain(key): value for key, value in tensors.items()}
