"""What a merge is made of: its base, its fine-tunes with their parameters, its slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod
from mergekit.merge_methods.base import ParameterSpec

from mergekit_pave.recipe.parameters import (
    CALIBRATION,
    COVARIANCE,
    DATA_FREE,
    PARAMETERS,
    CalibrationSpec,
    CovarianceSource,
)


def purifies(method: MergeMethod) -> bool:
    """Whether a method is a purified twin."""
    return getattr(method, "purifies", False)


def unwrapped(method: MergeMethod) -> MergeMethod:
    """The method itself, or the one that a purified twin wraps."""
    return method.inner if purifies(method) else method


@dataclass(frozen=True)
class Input:
    """One fine-tuned model with its parameters, the nearest scope first, the top one last."""

    model: ModelReference
    base: ModelReference | None
    where: str
    scopes: Scopes
    method: MergeMethod

    def get(self, name: str) -> Any:
        """The value of a per-model key, or its default."""
        found = [scope[name] for scope in self.scopes if name in scope]
        return found[0] if found else PARAMETERS[name].default

    def settings(self, name: str) -> list[tuple[str | None, Any]]:
        """All values a key can take, each with the filter it needs (`None`: any tensor)."""
        found: list[tuple[str | None, Any]] = []
        for scope in self.scopes:
            if name not in scope:
                continue
            value = scope[name]
            for item in value if isinstance(value, list) else [value]:
                need = getattr(item, "filter", None)
                need = None if need == "*" else need
                item = getattr(item, "value", item)
                found += [(need, v) for v in (item if isinstance(item, list) else [item])]
            if any(need is None for need, _ in found):
                break
        return found

    def can_be(self, name: str) -> set[Any]:
        """The values a key of the method can take, its default among them when nothing else
        holds for every tensor."""
        parameter = self._parameter(name)
        found = self.settings(name)
        values = {parameter.validate(value) for _, value in found}
        return values if any(need is None for need, _ in found) else values | {parameter.default}

    def is_zero(self, name: str) -> bool:
        """Whether a key that the method has is 0 for every tensor."""
        known = any(p.name == name for p in self.method.spec.parameters)
        return known and bool(self.settings(name)) and self.can_be(name) == {0}

    def _parameter(self, name: str) -> ParameterSpec:
        return next(p for p in self.method.spec.parameters if p.name == name)

    @property
    def solved(self) -> bool:
        """Whether the merge itself is made by the covariances, purified or not."""
        return getattr(unwrapped(self.method), "solves", False)

    @property
    def looked_at(self) -> bool:
        """Whether any tensor needs this model's covariances."""
        if self.solved:
            return True
        return self.ranked

    @property
    def ranked(self) -> bool:
        """Whether its covariances rank the directions that purification removes."""
        if not purifies(self.method):
            return False
        return self.can_be("rank_ratio") != {1} and "covariance" in self.can_be("subspace")

    @property
    def found_by_name(self) -> bool:
        """Whether any layer is found by its name, because no covariance store names it."""
        if self.estimated:
            return True
        return purifies(self.method) and not self.can_be("subspace") <= {"covariance"}

    @property
    def estimated(self) -> bool:
        """Whether its covariances are estimated from the task vector."""
        data_free = self.get("calibration_dataset") == DATA_FREE and not self.get("covariance")
        return self.looked_at and data_free

    @property
    def calibrated(self) -> bool:
        """Whether its covariances have to be computed from data, or read from a store."""
        return self.looked_at and not self.estimated


def inputs_of(entries: Iterable[Input]) -> list[Input]:
    """The fine-tuned models, once for each set of calibration keys.

    Of several slices that have it, the first that needs its covariances stands for all.
    """
    found: dict[tuple, Input] = {}
    for entry in entries:
        keys = (repr(entry.get(p.name)) for p in (*CALIBRATION, COVARIANCE))
        key = (entry.model, entry.base, *keys)
        if key not in found or (entry.looked_at and not found[key].looked_at):
            found[key] = entry
    return list(found.values())


def calibration_spec(entry: Input) -> CalibrationSpec:
    """The calibration data of one input, as the method would read it."""
    values = {p.name: p.validate(entry.get(p.name)) for p in CALIBRATION}
    return CalibrationSpec.from_parameters(values)


def covariance_source(entry: Input) -> CovarianceSource:
    """Where one input's covariances come from, as the method would read it."""
    keys = (COVARIANCE, *CALIBRATION)
    return CovarianceSource.of({p.name: p.validate(entry.get(p.name)) for p in keys})


Scopes = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Group:
    """Models that are merged with each other: all of them, or those of one slice.

    Attributes:
        where: a path into the YAML.
        base: of the group.
        members: path, model and parameter scopes of each, the base perhaps among them.
    """

    where: str
    base: ModelReference | None
    members: tuple[tuple[str, ModelReference, Scopes], ...]

    def fine_tunes(self, method: MergeMethod) -> list[Input]:
        """All models but the base."""
        return [Input(model, self.base, where, scopes, method)
                for where, model, scopes in self.members if model != self.base]


def groups_of(config: MergeConfiguration) -> Iterator[Group]:
    """What is merged with what."""
    top = config.parameters
    parts: list[tuple[str, Any, tuple[Mapping[str, Any] | None, ...]]] = [("", config, (top,))]
    parts += [
        (f"modules.{name}.", module, (module.parameters, top))
        for name, module in (config.modules or {}).items()
    ]
    for prefix, part, outer in parts:
        if part.models:
            where = f"{prefix}models"
            yield Group(where, config.base_model, _members(part.models, where, outer))
        for i, piece in enumerate(part.slices or []):
            where = f"{prefix}slices[{i}]"
            members = _members(piece.sources, f"{where}.sources", (piece.parameters, *outer))
            yield Group(where, piece.base_model or config.base_model, members)


def _members(
    items: Iterable[Any], where: str, outer: tuple[Mapping[str, Any] | None, ...]
) -> tuple[tuple[str, ModelReference, Scopes], ...]:
    return tuple(
        (f"{where}[{i}]", item.model, tuple(scope or {} for scope in (item.parameters, *outer)))
        for i, item in enumerate(items))
