"""`PaveMerge`: a mergekit merge method that purifies its inputs, then runs another method.

The only module that knows mergekit's merge-method interface. Purification itself is in
`subspace` and `allocation`; where the covariances come from is in `statistics`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    PerInputValues,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor

from mergekit_pave import allocation, subspace, tails
from mergekit_pave.calibration.run import cache_folder
from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import DEFAULT_DAMPENING, PARAMETERS, Parameter
from mergekit_pave.statistics import Cut, Layer, Statistics

PREFIX = "pave_"
PAPER = "https://arxiv.org/abs/2510.14697"
# What mergekit's planner calls a run of layers, before it comes to single tensors.
_WHOLE_SLICE = re.compile(r"\.slices\[\d+\]$")


@dataclass(frozen=True)
class CheckedSpec(ParameterSpec):
    """A parameter whose bad values are refused in one sentence, while mergekit plans."""

    parameter: Parameter | None = None

    def validate(self, value: Any) -> Any:
        return self.parameter.validate(value)


def _spec_of(parameter: Parameter) -> CheckedSpec:
    return CheckedSpec(
        name=parameter.name,
        value_type=parameter.kind | None,
        scope=ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
        default=parameter.default,
        description=parameter.doc,
        parameter=parameter,
    )


def can_wrap(method: MergeMethod) -> bool:
    """Whether a purified twin makes sense: a base is required, and it is not one already."""
    spec = method.spec
    return spec.contract.base == BasePolicy.REQUIRED and not spec.name.startswith(PREFIX)


@dataclass(frozen=True)
class _Participant:
    """One model whose weight of this layer is purified."""

    entry: TensorEntry
    layer: Layer
    tail: subspace.Tail


class PaveMerge(GroupMergeMethod):
    """Purify every linear weight (PAVE, arXiv 2510.14697), then merge with `inner`.

    Tensors that are not purified are handed to `inner` as they came, so `rank_ratio: 1.0`
    is bit for bit `inner`. Where something is purified, the task vectors are formed and
    merged in float32 or better and the result is cast once, to the inputs' common dtype.
    """

    def __init__(self, inner: MergeMethod, statistics: Statistics):
        self.inner = inner
        self.statistics = statistics
        spec = inner.spec
        self.spec: MergeMethodSpec = replace(
            spec,
            name=PREFIX + spec.name,
            pretty_name=f"PAVE-purified {spec.pretty_name or spec.name}",
            reference_url=PAPER,
            parameters=(*spec.parameters, *map(_spec_of, PARAMETERS.values())),
            uses_accelerator=True,
        )

    def validate_inputs(self, input_ids, base_id=None, *, group_name=None) -> None:
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name and _WHOLE_SLICE.search(group_name):
            self.statistics.prepare(input_ids)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        own = {name: parameters.pop(name) for name in PARAMETERS}
        dtype = group.entries[0].tensor.dtype
        purified = self._purify(group, own, parameters)
        (merged,) = self.inner((purified,), parameters=parameters)
        merged = merged.to(dtype)
        if purified is not group and not torch.isfinite(merged).all():
            raise PaveError(
                f"The merge of {group.metadata.name} holds NaN or Inf; lower the weights, or "
                "set rank_ratio: 1.0 for this tensor with a filter."
            )
        return merged

    def _purify(
        self, group: TensorGroup, own: Mapping[str, Any], inner: Mapping[str, Any]
    ) -> TensorGroup:
        """`group` itself when nothing is purified, else a copy in float32 or better."""
        ratio = own["rank_ratio"]
        shape = group.entries[0].tensor.shape
        if ratio == 1 or len(shape) != 2 or group.metadata.vocabulary_axis is not None:
            self.statistics.count("plain", group.metadata.name)
            return group
        _check_finite(group.base.tensor, group.base.id, group.metadata.name)
        drop_at_most = allocation.cap(min(shape), ratio)
        participants = [
            _Participant(entry, layer, self._tail(entry, layer, drop_at_most, own, group))
            for entry in group.non_base
            if _contributes(entry, group, inner)
            and (layer := self._layer(entry, group, own)) is not None
        ]
        if not participants:
            self.statistics.count("plain", group.metadata.name)
            return group
        drops = allocation.allocate(
            [p.tail.normalised for p in participants],
            min(shape),
            ratio,
            own["rank_allocation"],
        )
        self.statistics.count("purified", group.metadata.name)
        new = {}
        for participant, dropped in zip(participants, drops, strict=True):
            entry = participant.entry
            new[entry.id] = _project(participant, dropped)
            self.statistics.record_cut(
                group.metadata.name,
                entry.id,
                Cut(min(shape), dropped, _outweighed(entry.tensor, new[entry.id], group)),
            )
        entries = tuple(
            replace(e, tensor=new[e.id] if e.id in new else _wide(e.tensor)) for e in group.entries
        )
        return replace(group, entries=entries)

    def _layer(
        self, entry: TensorEntry, group: TensorGroup, own: Mapping[str, Any]
    ) -> Layer | None:
        values = {
            name: value[entry.id] if isinstance(value, PerInputValues) else value
            for name, value in own.items()
        }
        return self.statistics.layer(entry.id, group.metadata.name, entry.tensor, values)

    def _tail(
        self,
        entry: TensorEntry,
        layer: Layer,
        count: int,
        own: Mapping[str, Any],
        group: TensorGroup,
    ) -> subspace.Tail:
        """The `count` least activated directions of one model's weight."""
        _check_finite(entry.tensor, entry.id, group.metadata.name)
        fraction, absolute = _damping(own)

        def compute() -> subspace.Tail:
            weight = _wide(entry.tensor)
            if weight.device.type == "mps":  # has no float64
                weight = weight.cpu()
            covariance = None
            if own["subspace"] == "covariance":
                covariance = _damped(layer, fraction, absolute, weight.device, entry.id)
            return subspace.tail(
                weight.T if layer.transposed else weight,
                covariance,
                count,
                subspace=own["subspace"],
                seed=layer.seed,
            )

        if layer.identity is None:
            return compute()
        damping = f"{fraction}|{absolute}"
        name = tails.address(layer.identity, entry.tensor, layer.transposed, damping)
        return tails.remembered(cache_folder() / "tails", name, count, compute)


def _damping(own: Mapping[str, Any]) -> tuple[float | None, float | None]:
    fraction, absolute = own["dampening_frac"], own["regularization"]
    if fraction is not None and absolute is not None:
        raise PaveError("dampening_frac and regularization exclude each other: keep one of them.")
    if fraction is None and absolute is None:
        fraction = DEFAULT_DAMPENING
    return fraction, absolute


def _damped(
    layer: Layer,
    fraction: float | None,
    absolute: float | None,
    device: torch.device,
    model: Hashable,
) -> Tensor:
    try:
        return subspace.damped(
            layer.covariance().to(device), dampening_frac=fraction, regularization=absolute
        )
    except ValueError as error:
        raise PaveError(
            f"The covariance of {layer.name} of {model} is unusable: {error}; recalibrate."
        ) from error


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _contributes(entry: TensorEntry, group: TensorGroup, inner: Mapping[str, Any]) -> bool:
    """False for a task vector that is zero anyway.

    Projecting a weight that equals the base's would give it a task vector: minus the base
    in the dropped directions.
    """
    weights = inner.get("weight")
    if isinstance(weights, Mapping) and weights.get(entry.id) == 0:
        return False
    return not torch.equal(entry.tensor, group.base.tensor)


def _outweighed(before: Tensor, after: Tensor, group: TensorGroup) -> float:
    """Norm of what was removed, over the norm of the whole task vector."""
    removed = torch.linalg.vector_norm(before - after)
    return (removed / torch.linalg.vector_norm(_wide(before) - _wide(group.base.tensor))).item()


def _check_finite(tensor: Tensor, model: Hashable, name: str | None) -> None:
    if not torch.isfinite(tensor).all():
        raise PaveError(
            f"{name} of {model} holds NaN or Inf; download or save that checkpoint again."
        )


def _project(participant: _Participant, dropped: int) -> Tensor:
    weight = _wide(participant.entry.tensor)
    basis = participant.tail.basis[:, :dropped]
    if participant.layer.transposed:
        return subspace.purify(weight.T, basis).T.contiguous()
    return subspace.purify(weight, basis)
