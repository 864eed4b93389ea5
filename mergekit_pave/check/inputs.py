"""What a merge is made of: its base, its fine-tunes with their parameters, its slices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod
from mergekit.merge_methods.base import ParameterSpec

from mergekit_pave.calibration.data import CalibrationSpec
from mergekit_pave.check.finding import Finding, error
from mergekit_pave.errors import PaveError
from mergekit_pave.locate import LoaderOptions
from mergekit_pave.merging.covariances import CovarianceMethod
from mergekit_pave.merging.emr import EmrMerge
from mergekit_pave.method import PaveMerge, unwrapped
from mergekit_pave.parameters import CALIBRATION, COVARIANCE, DATA_FREE, PARAMETERS


@dataclass(frozen=True)
class Input:
    """One fine-tuned model with its parameters, the nearest scope first, the top one last."""

    model: ModelReference
    base: ModelReference | None
    where: str
    scopes: tuple[Mapping[str, Any], ...]
    method: MergeMethod

    def get(self, name: str) -> Any:
        """The value of a per-model key, or its default."""
        found = [scope[name] for scope in self.scopes if name in scope]
        return found[0] if found else PARAMETERS[name].default

    def sets(self, name: str) -> bool:
        """Whether the model, its slice or its module has the key, whatever the top level says."""
        return any(name in scope for scope in self.scopes[:-1])

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

    def _parameter(self, name: str) -> ParameterSpec:
        return next(p for p in self.method.spec.parameters if p.name == name)

    @property
    def solved(self) -> bool:
        """Whether the merge itself is made by the covariances, purified or not."""
        return isinstance(unwrapped(self.method), CovarianceMethod)

    @property
    def looked_at(self) -> bool:
        """Whether any tensor needs this model's covariances."""
        if self.solved:
            return True
        return self.ranked

    @property
    def ranked(self) -> bool:
        """Whether they tell what is purified."""
        if not isinstance(self.method, PaveMerge):
            return False
        return self.can_be("rank_ratio") != {1} and "covariance" in self.can_be("subspace")

    @property
    def estimated(self) -> bool:
        """Whether they are told from the task vector."""
        data_free = self.get("calibration_dataset") == DATA_FREE and not self.get("covariance")
        return self.looked_at and data_free

    @property
    def calibrated(self) -> bool:
        """Whether they have to be computed from data, or read from a store."""
        return self.looked_at and not self.estimated


def configuration(raw: Any) -> MergeConfiguration:
    """mergekit's own reading of the YAML, its complaints as one sentence."""
    try:
        return MergeConfiguration.model_validate(raw)
    except (ValueError, RuntimeError) as fault:
        raise PaveError(f"mergekit cannot read the configuration: {_reason(fault)}.") from fault


def model_reference(name: str) -> ModelReference:
    """mergekit's own reading of a model's name: `MODEL[@REVISION][+ADAPTER]`."""
    try:
        return ModelReference.model_validate(name)
    except (ValueError, RuntimeError) as fault:
        raise PaveError(f"mergekit cannot read the model's name: {_reason(fault)}.") from fault


def _reason(fault: Exception) -> str:
    details = getattr(fault, "errors", list)()
    if details:
        where = ".".join(str(part) for part in details[0]["loc"])
        return f"{where}: {details[0]['msg']}".lstrip(": ")
    reason = str(fault)
    if "@" in reason or "Can't parse" in reason:
        reason += (
            " (in a model's name `@` starts a revision and `+` an adapter: rename or link a "
            "folder that has them in its path)"
        )
    return reason


def inputs(config: MergeConfiguration) -> list[Input]:
    """The fine-tuned models of a configuration, once for each set of calibration keys.

    Of several slices that have it, the first that needs its covariances stands for all.
    """
    found: dict[tuple, Input] = {}
    for entry in _entries(config):
        keys = (repr(entry.get(p.name)) for p in (*CALIBRATION, COVARIANCE))
        key = (entry.model, entry.base, *keys)
        if key not in found or (entry.looked_at and not found[key].looked_at):
            found[key] = entry
    return list(found.values())


def _entries(config: MergeConfiguration) -> Iterator[Input]:
    """The fine-tuned models, once for each slice."""
    method = merge_methods.get(config.merge_method)
    for _, base, members in _groups(config):
        yield from _fine_tunes(base, members, method)


def _fine_tunes(
    base: ModelReference | None, members: Iterable[_Member], method: MergeMethod
) -> Iterator[Input]:
    for path, model, scopes in members:
        if model != base:
            yield Input(model, base, path, scopes, method)


def calibration_spec(entry: Input) -> CalibrationSpec:
    """The calibration data of one input, as the method would read it."""
    values = {p.name: p.validate(entry.get(p.name)) for p in CALIBRATION}
    return CalibrationSpec.from_parameters(values)


_Member = tuple[str, ModelReference, tuple[Mapping[str, Any], ...]]


def _groups(
    config: MergeConfiguration,
) -> Iterator[tuple[str, ModelReference | None, list[_Member]]]:
    """What is merged with what: (path, base, [(path, model, its parameter scopes)])."""
    top = config.parameters
    parts = [("", config, (top,))]
    parts += [
        (f"modules.{name}.", module, (module.parameters, top))
        for name, module in (config.modules or {}).items()
    ]
    for prefix, part, outer in parts:
        if part.models:
            where = f"{prefix}models"
            yield where, config.base_model, list(_members(part.models, where, outer))
        for i, piece in enumerate(part.slices or []):
            where = f"{prefix}slices[{i}]"
            members = _members(piece.sources, f"{where}.sources", (piece.parameters, *outer))
            yield where, piece.base_model or config.base_model, list(members)


def _members(
    items: Iterable[Any], where: str, outer: tuple[Mapping[str, Any] | None, ...]
) -> Iterator[_Member]:
    for i, item in enumerate(items):
        scopes = tuple(scope or {} for scope in (item.parameters, *outer))
        yield f"{where}[{i}]", item.model, scopes


def check_inputs(config: MergeConfiguration, options: LoaderOptions) -> Iterator[Finding]:
    """Everything about the inputs that needs no look at them."""
    method = merge_methods.get(config.merge_method)
    for where, base, members in _groups(config):
        yield from _check_group(where, base, [model for _, model, _ in members], method)
        yield from _check_weights(where, list(_fine_tunes(base, members, method)))
    yield from _check_scales(inputs(config))
    said = set()
    for entry in _entries(config):
        for finding in _check_entry(entry, options):
            # Slices repeat the models, and their faults.
            if (entry.model, finding.what) not in said:
                said.add((entry.model, finding.what))
                yield finding
    if isinstance(unwrapped(method), EmrMerge):
        yield from _check_emr(config)
    yield from _check_slices(config)


def _check_entry(entry: Input, options: LoaderOptions) -> Iterator[Finding]:
    yield from _check_damping(entry)
    if isinstance(entry.method, PaveMerge):
        yield from _check_purify(entry)
    for spec in entry.method.spec.parameters:
        if spec.required and not any(spec.name in scope for scope in entry.scopes):
            yield error(
                entry.where, f"{entry.method.spec.name} needs a value for {spec.name}: add "
                f"`{spec.name}: VALUE` to `parameters`."
            )
    if entry.model.lora and not options.lora_merge_cache:
        yield error(
            entry.where, f"{entry.model} names an adapter: add --lora-merge-cache DIR to the "
            "command (a path with a `+` is read as model plus adapter)."
        )
    if entry.looked_at and not (entry.get("covariance") or entry.get("calibration_dataset")):
        yield error(
            entry.where, f"{entry.model} has no calibration data: add "
            "`calibration_dataset: NAME_OR_FILE` (its own task data), `covariance: STORE` or, "
            "without data, `calibration_dataset: none` or `self` to its parameters."
        )


def _check_group(
    where: str, base: ModelReference | None, models: list[ModelReference], method: MergeMethod
) -> Iterator[Finding]:
    if base is None:
        yield error(
            "base_model", "is missing: task vectors are differences from it; add "
            "`base_model: NAME`."
        )
        return
    twice = [model for i, model in enumerate(models) if model in models[:i]]
    if twice:
        yield error(where, f"{twice[0]} is listed twice; remove one and raise the other's weight.")
        return
    others = [model for model in models if model != base]
    if not others:
        yield error(where, "holds no fine-tuned model beside the base; add one.")
        return
    folders: dict[tuple[str, ...], ModelReference] = {}
    for model in dict.fromkeys([base, *models]):
        first = folders.setdefault(_place(model), model)
        if first != model:
            yield error(where, f"{model} and {first} are the same; write both alike or remove one.")
            return
    # mergekit adds a base that `models` leaves out, but not to the sources of a slice.
    ids = models if where.endswith("]") else [base, *others]
    if base not in ids:
        yield error(where, f"its sources lack the base {base}; add it with the same layer_range.")
        return
    try:
        method.spec.contract.validate_ids(ids, base)
    except ValueError as fault:
        yield error(where, f"{method.spec.name}: {fault} (the base included).")


def _place(model: ModelReference) -> tuple[str, ...]:
    """What tells models apart: a folder wherever its path leads, or a name."""
    parts = [part for part in (model.model, model.lora) if part]
    return tuple(
        os.path.realpath(part.path) if os.path.isdir(part.path) else str(part) for part in parts)


def _check_weights(where: str, entries: Sequence[Input]) -> Iterator[Finding]:
    """A mean by covariances has to be one of something."""
    if entries and all(entry.solved and entry.can_be("weight") == {0} for entry in entries):
        yield error(where, "every weight is 0, which leaves nothing to merge; raise one.")


def _check_emr(config: MergeConfiguration) -> Iterator[Finding]:
    """Its masks are told from one base, by one rescaler, whatever the slices."""
    for where, base, _ in _groups(config):
        if base not in (None, config.base_model):
            mend = "" if config.base_model else f" and add `base_model: {base}` at the top level"
            yield error(
                where, f"{config.merge_method} needs one base for the whole model: remove the "
                f"base_model of the slice{mend}."
            )
    values = {value for entry in _entries(config) for value in entry.can_be("rescaler")}
    if len(values) > 1:
        yield error(
            "parameters", "rescaler must be one value for the whole model: give it once, without "
            "a filter."
        )


def _check_damping(entry: Input) -> Iterator[Finding]:
    fractions, absolutes = ({need for need, _ in entry.settings(name)}
                            for name in ("dampening_frac", "regularization"))
    if not fractions or not absolutes:
        return
    # Behind filters they may well concern different tensors.
    if None in fractions | absolutes or fractions & absolutes:
        yield error(
            "parameters", "dampening_frac and regularization exclude each other: keep one of them."
        )


def _check_scales(entries: Iterable[Input]) -> Iterator[Finding]:
    """Covariances that are added up have to be of one kind: of inputs, or of task vectors."""
    compared = [
        entry for entry in entries
        if entry.looked_at and (entry.solved or "separate" in entry.can_be("purify"))
    ]
    for entry in compared:
        if not entry.calibrated and any(other.calibrated for other in compared):
            yield error(
                entry.where, f"calibration_dataset: {DATA_FREE} for {entry.model} and data for "
                "another model: their covariances have no common scale, and are compared here; "
                f"use {DATA_FREE} for all models or for none."
            )
            return


def _check_purify(entry: Input) -> Iterator[Finding]:
    """Keys that have no effect or a bad one with this `purify`: the user cannot have meant that."""
    if entry.estimated and entry.ranked and "weight" in entry.can_be("purify"):
        yield Finding(
            "warning", entry.where, "calibration_dataset: none with purify: weight cuts the base "
            "where the task vector alone looked weak, and can ruin the merge: set purify: delta or "
            "separate, or give data."
        )
    if entry.can_be("purify") != {"separate"}:
        if entry.settings("separation") and "separate" not in entry.can_be("purify"):
            yield error("parameters", "separation has an effect only with `purify: separate`.")
        return
    if entry.can_be("rank_ratio") - {None, 1}:
        yield error(
            "parameters", "rank_ratio has no effect with `purify: separate`, which truncates "
            "nothing (1.0 switches it off): remove it, or choose `purify: delta`."
        )
    if entry.can_be("subspace") != {"covariance"}:
        yield error(
            "parameters", "subspace must be covariance with `purify: separate`: there is nothing "
            "to separate without covariances."
        )


def _check_slices(config: MergeConfiguration) -> Iterator[Finding]:
    groups = [("slices", config.slices or [])]
    groups += [(f"modules.{n}.slices", m.slices or []) for n, m in (config.modules or {}).items()]
    for where, pieces in groups:
        for i, piece in enumerate(pieces):
            if len({tuple(source.layer_range) for source in piece.sources}) > 1:
                yield error(
                    f"{where}[{i}]", "its sources have different layer_range: a task vector "
                    "needs the same layer of model and base; make the ranges equal."
                )
            for first, end in sorted({tuple(source.layer_range) for source in piece.sources}):
                if not 0 <= first < end:
                    yield error(
                        f"{where}[{i}]", f"layer_range {[first, end]} holds no layers: give the "
                        "first, from 0, and the one after the last."
                    )
