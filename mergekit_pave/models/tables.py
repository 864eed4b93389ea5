"""The linear layers of a model by their names in its checkpoint, and why other weights are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import Header, headers
from mergekit_pave.models.layers import (
    LinearLayers,
    empty_model,
    is_transposed,
    linear_layers,
    refuse_quantised,
    warn_of_unseen,
)
from mergekit_pave.models.renaming import ClassNames

# By name and shape: whether the weight is stored `(in, out)`.
LayerTable = dict[tuple[str, tuple[int, ...]], bool]


def layer_table(
    config: PretrainedConfig, trust_remote_code: bool, label: str, folder: Path | str | None = None
) -> LayerTable:
    """The linear layers of a model, from its config and the headers of its files alone.

    Args:
        config: names the class.
        trust_remote_code: only what the user's own flag said.
        label: the model's name for messages.
        folder: its weights; their names come first, those of the class follow.

    Raises:
        PaveError: the checkpoint is quantised.
    """
    refuse_quantised(config, label)
    model = empty_model(config, trust_remote_code)
    layers = linear_layers(model)
    warn_of_unseen(label, layers.skipped)
    found: LayerTable = {}
    if folder is not None:
        names = ClassNames(model)
        for name in _headers(folder):
            if (module := layers.modules.get(names.one(name) or "")) is not None:
                found[name, tuple(module.weight.shape)] = is_transposed(module)
    for name, module in layers.modules.items():
        found.setdefault((name, tuple(module.weight.shape)), is_transposed(module))
    return found


def unpurified(
    config: PretrainedConfig, trust_remote_code: bool, folder: Path | str
) -> dict[str, str]:
    """Why the matrices of a checkpoint are no weights of linear layers to treat, by name.

    Vocabulary and heads are not among them: they are left out on purpose.
    """
    try:
        model = empty_model(config, trust_remote_code)
    except Exception:  # whatever a model's code cannot do without values
        return {}
    layers, names = linear_layers(model), ClassNames(model)
    return {name: why for name, header in _headers(folder).items()
            if len(header.shape) > 1 and (why := _reason(name, names, layers, model))}


def _reason(
    name: str, names: ClassNames, layers: LinearLayers, model: nn.Module
) -> str | None:
    owns = names.of(name)
    if not owns:
        return "unknown to the model's class"
    reasons = {layers.skipped.get(own) for own in owns}
    if any(own in layers.modules for own in owns) and names.one(name):
        return None
    if any(own in layers.modules for own in owns):
        return "several layers in one tensor"
    if reasons & {"vocabulary layer", "task head"} or any(own in names.vocabulary for own in owns):
        return None
    why = next(iter(reasons - {None}), None)
    if why:
        return why.partition(":")[0]
    module = model.get_submodule(owns[0].rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return None
    return "no linear layer"


def _headers(folder: Path | str) -> Mapping[str, Header]:
    try:
        return headers(Path(folder))
    except PaveError:
        return {}
