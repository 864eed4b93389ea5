"""The class of a model, and the linear layers in it that can be purified."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from mergekit.common import get_auto_cls
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_pave.errors import PaveError

logger = logging.getLogger(__name__)
# transformers changes the default dtype of the whole process while it builds a model: two threads
# that build at once would leave one's dtype behind for all.
BUILDING = threading.RLock()
_ROUTERS = {"gate", "router", "shared_expert_gate"}


# GPT-2's `Conv1D` keeps its weight as `(in, out)`.
LinearLayer = nn.Linear | Conv1D


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a model: weight name -> module, and why others are left out."""

    modules: dict[str, LinearLayer]
    skipped: dict[str, str]


def warn_of_unseen(model: str, skipped: Mapping[str, str]) -> None:
    """Warn of weights that look like those of linear layers and have no covariance."""
    unseen = [name for name, reason in skipped.items() if reason.startswith(("its", "fused"))]
    if unseen:
        logger.warning(
            "%s: %d weights cannot be purified and keep the plain task vector, e.g. %s (%s).",
            model, len(unseen), unseen[0], skipped[unseen[0]],
        )


def linear_layers(model: PreTrainedModel) -> LinearLayers:
    """Split a model's linear layers into those to purify and those with a reason not to."""
    modules: dict[str, LinearLayer] = {}
    skipped: dict[str, str] = {}
    embedded = {id(p) for m in _vocabulary_modules(model) for p in m.parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if id(module.weight) in embedded:
            reason = "vocabulary layer"
        elif _in_head(model, name):
            reason = "task head"
        elif name.rpartition(".")[2] in _ROUTERS:
            reason = "router"
        else:
            modules[f"{name}.weight"] = module
            continue
        skipped[f"{name}.weight"] = reason
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            skipped[name] = "fused experts: their inputs cannot be observed one by one"
    return LinearLayers(modules, skipped)


def _vocabulary_modules(model: PreTrainedModel) -> list[nn.Module]:
    found: list[nn.Module] = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):
            continue
        # A vision model's "input embeddings" are its patch projection.
        if isinstance(module, (nn.Embedding, nn.Linear)):
            found.append(module)
    return found


def _in_head(model: PreTrainedModel, name: str) -> bool:
    body = model.base_model
    if body is model:
        return False
    return not name.startswith(model.base_model_prefix + ".")


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as `(in, out)`."""
    return isinstance(module, Conv1D)


def class_name(config: PretrainedConfig) -> str:
    """The class that a checkpoint's config names; empty where it names none."""
    return next(iter(getattr(config, "architectures", None) or ()), "")


def model_class(config: PretrainedConfig) -> Any:
    """The class named in the checkpoint's config, as mergekit would choose it."""
    name = class_name(config)
    if not name:
        return transformers.AutoModel
    own = getattr(transformers, name, None)
    return own if own is not None else get_auto_cls(name)


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without weights (on the `meta` device), to list its layers."""
    cls = model_class(config)
    # accelerate's own way changes torch.nn.Module for all threads, a merge beside this one too.
    with BUILDING, torch.device("meta"):
        if hasattr(cls, "from_config"):
            return cls.from_config(config, trust_remote_code=trust_remote_code)
        return cls(config)


def refuse_quantised(config: PretrainedConfig, label: str) -> None:
    """Raise `PaveError` for a checkpoint whose weights are not plain floating point."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        get = quantised.get if isinstance(quantised, dict) else lambda k: getattr(quantised, k, "")
        raise PaveError(
            f"{label} is quantised ({get('quant_method') or 'quantization_config'}): merging "
            "needs full-precision weights; name the checkpoint it was quantised from."
        )
