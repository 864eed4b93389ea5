"""Which weights a merge would purify, and their tensors, read one at a time from the shards.

Nothing is merged: the models, their covariance stores and the settings come from the same
configuration as the merge's, and the stores through the same cache.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.parameter_resolver import resolve_parameter
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.calibration.model import ModelSource
from mergekit_pave.check import Allowances, preflight, read_yaml
from mergekit_pave.check.inputs import Input, configuration, inputs
from mergekit_pave.check.models import read_config
from mergekit_pave.errors import PaveError
from mergekit_pave.fingerprint import fingerprint
from mergekit_pave.locate import LoaderOptions, model_source
from mergekit_pave.method import PREFIX, PaveMerge
from mergekit_pave.parameters import (
    CALIBRATION,
    COVARIANCE,
    DEFAULT_DAMPENING,
    DEFAULT_RATIO,
)
from mergekit_pave.plugin import register
from mergekit_pave.statistics import open_store
from mergekit_pave.store import CovarianceStore, same_layer

logger = logging.getLogger(__name__)

_SHARED = ("rank_ratio", "rank_allocation", "subspace", "dampening_frac", "regularization")
_SWITCHED_OFF = "rank_ratio is 1.0 here"
# The first number in a name counts layers.
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.+)")


class Checkpoint:
    """A model's tensors by name, each read when it is asked for."""

    def __init__(self, source: ModelSource):
        index = ShardedTensorIndex.from_disk(source.path)
        self.names: list[str] = sorted(index.tensor_paths)
        self._loader = LazyTensorLoader(index, lazy_unpickle=False)

    def get(self, name: str) -> Tensor:
        return self._loader.get_tensor(name)

    def find(self, name: str) -> str | None:
        """This checkpoint's name for `name` of another one, which may have a prefix more."""
        if name in self.names:
            return name
        return next((own for own in self.names if same_layer(own, name)), None)


@dataclass(frozen=True)
class Model:
    """One fine-tuned model: a public label, its tensors and its covariances."""

    label: str
    entry: Input
    source: ModelSource
    tensors: Checkpoint
    store: CovarianceStore


@dataclass(frozen=True)
class Settings:
    """What purification is told for one weight."""

    rank_ratio: float
    rank_allocation: str
    subspace: str
    dampening_frac: float | None
    regularization: float | None

    @property
    def damping(self) -> dict[str, float | None]:
        """The keywords of `subspace.damped`."""
        if self.dampening_frac is None and self.regularization is None:
            return {"dampening_frac": DEFAULT_DAMPENING, "regularization": None}
        return {"dampening_frac": self.dampening_frac, "regularization": self.regularization}


@dataclass
class Layer:
    """One linear weight of all models.

    Attributes:
        name: the weight in the base's checkpoint.
        block: number of the layer it belongs to, None outside the numbered layers.
        kind: what it is within its layer, such as `self_attn.q_proj`.
        shape: (out, in), whichever way round it is stored.
        own: number of each model that purifies it -> name in its checkpoint and in its store.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    settings: Settings
    own: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def cost(self) -> float:
        """Multiplications of one decomposition, up to a constant, times the models."""
        return float(self.shape[0] * self.shape[1] * self.rank * len(self.own))


@dataclass
class Merge:
    """A configuration with everything open.

    Attributes:
        layers: every weight that at least one model would have purified.
        coverage: per model, `purified`, `plain` and `skipped`: reason -> tensors.
        switched_off: weights that only `rank_ratio: 1.0` keeps from being purified.
    """

    method: str
    base: str
    base_tensors: Checkpoint
    models: list[Model]
    layers: list[Layer]
    coverage: list[dict[str, Counter[str]]]
    switched_off: list[str] = field(default_factory=list)

    def weight(self, layer: Layer, model: int) -> Tensor:
        """(out, in), as it is stored but for Conv1D's transposition."""
        tensor = self.models[model].tensors.get(layer.own[model][0])
        return tensor.T if self.transposed(layer) else tensor

    def base_weight(self, layer: Layer) -> Tensor:
        tensor = self.base_tensors.get(layer.name)
        return tensor.T if self.transposed(layer) else tensor

    def site(self, layer: Layer, model: int) -> str:
        """The name under which this model's store has the layer's covariance."""
        return self.models[model].store.weights[layer.own[model][1]].site

    def covariance(self, layer: Layer, model: int) -> Tensor:
        """(in, in) float32."""
        return self.models[model].store.covariance(self.site(layer, model))

    def transposed(self, layer: Layer) -> bool:
        model, (_, name) = next(iter(layer.own.items()))
        return self.models[model].store.weights[name].transposed


def open_merge(
    path: Path, options: LoaderOptions, device: torch.device, allow_crimes: bool = False
) -> Merge:
    """Check a configuration, open its models and stores (calibrating what is absent).

    Raises:
        PaveError: what `mergekit-pave check` finds, or a store that cannot be had.
    """
    register()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PaveError(f"{path} is not text in UTF-8: {error.reason}.") from error
    config = configuration(read_yaml(text, str(path)))
    for warning in preflight(config, text, options, Allowances(allow_crimes)):
        logger.warning("%s", warning)
    entries = inputs(config)
    if not isinstance(entries[0].method, PaveMerge):
        raise PaveError(
            f"merge_method: {config.merge_method} purifies nothing; this looks at what "
            f"{PREFIX + config.merge_method} would do: name that one in a copy of the "
            "configuration, with its calibration data."
        )
    if entries[0].can_be("purify") != {"weight"}:
        raise PaveError(
            "This looks at what `purify: weight` would do: take `purify` (and `separation`, and a "
            "rank_ratio meant for it) out of a copy of the configuration."
        )
    _refuse_parts(config, entries[0].base, options)
    sources = [model_source(entry.model, options) for entry in entries]
    models = [
        Model(label, entry, source, Checkpoint(source), _store_of(entry, source, options, device))
        for label, entry, source in zip(
            _distinct([source.label for source in sources]), entries, sources, strict=True)
    ]
    base = model_source(entries[0].base, options)
    merge = Merge(config.merge_method, base.label, Checkpoint(base), models, [], [])
    _survey(merge)
    if not merge.layers:
        reasons = merge.coverage[0]["plain"].most_common(3)
        raise PaveError("This merge purifies nothing: " + ", ".join(
            f"{count} tensors are merged plainly ({why})" for why, count in reasons) + ".")
    return merge


@contextmanager
def explained(layer: Layer) -> Iterator[None]:
    """Turn what the algebra says of unusable numbers into a `PaveError` that names the layer."""
    try:
        yield
    except ValueError as error:
        raise PaveError(f"{layer.name} cannot be looked at: {error}; check that checkpoint, or "
                        "recalibrate the model.") from error


def _refuse_parts(
    config: MergeConfiguration, base: ModelReference, options: LoaderOptions
) -> None:
    """Raise `PaveError` unless whole models are merged, all their layers in one way.

    Slices and modules can each have parameters, models and layers of their own, and leave out
    or repeat layers of the base.
    """
    # "default" is mergekit's name for a model's only module.
    modules = config.modules or {"default": config}
    simple = list(modules) == ["default"]
    if simple and _is_whole(modules["default"].slices or [], base, options):
        return
    part = "slice" if simple else "module"
    raise PaveError(
        f"{part}s: this looks at whole models whose layers are all merged in one way: in a copy "
        f"of the configuration name the models under `models`, with the parameters of one {part}, "
        "and read what is said of its layers."
    )


def _is_whole(
    slices: Sequence[OutputSliceDefinition], base: ModelReference, options: LoaderOptions
) -> bool:
    if not slices:
        return True
    layers = getattr(read_config(base, options), "num_hidden_layers", None)
    ranges = [tuple(source.layer_range) for source in slices[0].sources]
    return len(slices) == 1 and all(found == (0, layers) for found in ranges)


def _store_of(
    entry: Input, source: ModelSource, options: LoaderOptions, device: torch.device
) -> CovarianceStore:
    """The covariances of one model, as its merge would get them."""
    keys = (COVARIANCE, *CALIBRATION)
    values = {p.name: p.validate(entry.get(p.name)) for p in keys}
    if not (values["covariance"] or values["calibration_dataset"]):
        raise PaveError(
            f"{entry.where}: {source.label} has no calibration data: set calibration_dataset "
            "(its own task data) or covariance (a store) under its parameters."
        )
    return open_store(source, values, options, device)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Labels told apart: folders of the same name in different places get a number."""
    seen: Counter[str] = Counter()
    result = []
    for label in labels:
        seen[label] += 1
        result.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return result


# --- which tensors are linear weights ------------------------------------------------------


def place(name: str) -> tuple[int | None, str]:
    """`(12, "self_attn.q_proj")` for `model.layers.12.self_attn.q_proj.weight`.

    The first number counts layers; later ones (experts, sublayers) become `*`. Encoder and
    decoder layers of the same kind are told apart.
    """
    stem = name.removesuffix(".weight")
    found = _NUMBERED.search(stem)
    if not found:
        return None, stem
    kind = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", found[2])
    side = next((p for p in ("decoder", "encoder") if p in stem[: found.start()].split(".")), "")
    # Most models call their only stack "encoder"; that says nothing.
    return int(found[1]), f"decoder {kind}" if side == "decoder" else kind


def depths(names: Sequence[str]) -> dict[str, float]:
    """Where mergekit reads a gradient, from 0 to 1 over the layers of each stack.

    It takes the start of a gradient outside of them, and the end where there is one layer only.
    """
    stacks: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in names:
        if match := _NUMBERED.search(name.removesuffix(".weight")):
            stack, number = stacks[name] = name[: match.start()], int(match[1])
            last[stack] = max(last.get(stack, 0), number)
    inside = {name: number / last[stack] if last[stack] else 1.0
              for name, (stack, number) in stacks.items()}
    return {name: inside.get(name, 0.0) for name in names}


def _survey(merge: Merge) -> None:
    """Fill in `layers`, `coverage` and `switched_off` from names, shapes and fingerprints."""
    names = merge.base_tensors.names
    depth = depths(names)
    merge.coverage = [
        {what: Counter() for what in ("purified", "plain", "skipped")} for _ in merge.models
    ]
    for name in tqdm(names, desc="Reading fingerprints", unit="tensor", leave=False):
        base = merge.base_tensors.get(name)
        # What all models share is the same in the scopes of each.
        settings = _settings(merge.models[0].entry, name, depth[name])
        layer = Layer(name, *place(name), tuple(base.shape), settings)
        reasons = set()
        for number, model in enumerate(merge.models):
            what, reason = _place_in(layer, number, model, base, depth[name])
            merge.coverage[number][what][reason] += 1
            reasons.add(reason)
        if _SWITCHED_OFF in reasons:
            merge.switched_off.append(name)
        if layer.own:
            if merge.transposed(layer):
                layer.shape = layer.shape[::-1]
            merge.layers.append(layer)


def _place_in(
    layer: Layer, number: int, model: Model, base: Tensor, t: float
) -> tuple[str, str]:
    """What happens to this tensor of one model and why; notes it in `layer` if purified."""
    own = model.tensors.find(layer.name)
    if own is None:
        return "skipped", "not in this checkpoint"
    if base.ndim != 2:
        return "plain", "not a matrix (norm, bias, convolution)"
    tensor = model.tensors.get(own)
    if tensor.shape != base.shape:
        return "skipped", "another shape than the base's"
    found = model.store.find(own, tensor)
    if found is None:
        reasons = [why for key, why in model.store.skipped.items() if same_layer(key, own)]
        return "plain", reasons[0] if reasons else "not a linear layer (embedding, position)"
    if torch.equal(fingerprint(tensor), fingerprint(base)):
        return "plain", "equals the base"
    if layer.settings.rank_ratio == 1:
        return "plain", _SWITCHED_OFF
    if _resolve(model.entry, "weight", layer.name, t) == 0:
        return "plain", "weight is 0 here"
    layer.own[number] = (own, found)
    return "purified", "linear layer with its own covariance"


def _settings(entry: Input, tensor: str, t: float) -> Settings:
    values = {key: _resolve(entry, key, tensor, t) for key in _SHARED}
    if values["rank_ratio"] is None:
        values["rank_ratio"] = DEFAULT_RATIO["weight"]
    return Settings(**values)


def _resolve(entry: Input, key: str, tensor: str, t: float) -> Any:
    """mergekit's reading of scopes, filters and gradients; None for a key the method lacks."""
    spec = next((p for p in entry.method.spec.parameters if p.name == key), None)
    if spec is None:
        return None
    try:
        return resolve_parameter(spec, entry.scopes, tensor_name=tensor, t=t, model=entry.model)
    except RuntimeError as error:
        raise PaveError(
            f"{entry.where}: {key} has no value for {tensor}, which no filter matches; add an "
            "item without a filter."
        ) from error


def settings_summary(layers: Sequence[Layer]) -> Mapping[str, Any]:
    """The settings that occur, for the page: `rank_ratio` as a range, the rest as names."""
    ratios = [layer.settings.rank_ratio for layer in layers]
    first = layers[0].settings
    return {
        "rank_ratio": [min(ratios), max(ratios)],
        "rank_allocation": first.rank_allocation,
        "subspace": first.subspace,
        **first.damping,
    }
