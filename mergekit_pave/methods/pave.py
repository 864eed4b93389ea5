"""`PaveMerge`: a mergekit merge method that purifies its inputs, then runs another method.

The covariances that it looks at were opened before the merge began (`methods.layers`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    MergeMethod,
    MergeMethodSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor
from typing_extensions import Self

from mergekit_pave.algebra import allocation, numeric, subspace
from mergekit_pave.algebra.numeric import double, summed, wide
from mergekit_pave.algebra.papers import PAVE
from mergekit_pave.algebra.separation import separate
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import (
    StatefulMethod,
    check_finite,
    finite,
    layers_of,
    spec_of,
)
from mergekit_pave.methods.layers import Cut, Layer, MergeState
from mergekit_pave.recipe.parameters import PARAMETERS, PREFIX, Purification
from mergekit_pave.storage import decompositions
from mergekit_pave.storage.files import cache_folder


def can_wrap(method: MergeMethod) -> bool:
    """Whether a purified twin makes sense: a base is required, and it is not one already."""
    spec = method.spec
    return spec.contract.base == BasePolicy.REQUIRED and not spec.name.startswith(PREFIX)


class PaveMerge(StatefulMethod):
    """Purify every linear weight (PAVE, arXiv 2510.14697), then merge with `inner`.

    Tensors that are not purified are handed to `inner` as they came, so `rank_ratio: 1.0`
    is bit for bit `inner`. Where something is purified, the task vectors are formed and
    merged in float32 or better and the result is cast once, to the inputs' common dtype.
    """

    treated = "purified"
    purifies = True

    def __init__(self, inner: MergeMethod):
        self.inner = inner
        spec = inner.spec
        # A method that needs covariances itself has the calibration keys already.
        inner_names = {p.name for p in spec.parameters}
        ours = (spec_of(p) for p in PARAMETERS.values() if p.name not in inner_names)
        self.spec: MergeMethodSpec = replace(
            spec,
            name=PREFIX + spec.name,
            pretty_name=f"PAVE-purified {spec.pretty_name or spec.name}",
            reference_url=PAVE.url,
            parameters=(*spec.parameters, *ours),
            uses_accelerator=True,
        )

    def within(self, state: MergeState, name: str | None = None) -> Self:
        own = super().within(state, name)
        if isinstance(self.inner, StatefulMethod):
            own.inner = self.inner.within(state)
        return own

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        how = Purification.of(parameters)
        inner = {p.name: parameters[p.name] for p in self.inner.spec.parameters}
        solves = getattr(self.inner, "solves", False)
        layers: dict[Hashable, Layer] = {}
        if not how.off or solves:
            # A model that contributes nothing here still has inputs, which the others should spare.
            everyone = solves or how.purify == "separate"
            entries = [e for e in group.non_base if everyone or _contributes(e, group, inner)]
            # A method that needs covariances itself gets them, whatever `subspace` says.
            ranked_by = "covariance" if solves else how.subspace
            layers = layers_of(self.state, group, entries, parameters, ranked_by)
        purified = self._purify(group, layers, how, inner)
        name = group.metadata.name
        self.state.count("plain" if purified is group else "purified", name)
        if solves:
            merged = self.inner.merge_layers(purified, layers, **inner)
        else:
            (merged,) = self.inner((purified,), parameters=inner)
        if purified is group:
            return finite(merged, group)
        merged = merged.to(group.entries[0].tensor.dtype)
        if not numeric.finite(merged):
            raise PaveError(
                f"The merge of {name} holds NaN or Inf; lower the weights, or "
                "set rank_ratio: 1.0 for this tensor with a filter."
            )
        return merged

    def _purify(
        self,
        group: TensorGroup,
        layers: Mapping[Hashable, Layer],
        how: Purification,
        inner: Mapping[str, Any],
    ) -> TensorGroup:
        """`group` itself when nothing is purified, else a copy in float32 or better."""
        participants = [
            Participant(entry.id, entry.tensor, layers[entry.id])
            for entry in group.non_base
            if entry.id in layers and _contributes(entry, group, inner)
        ]
        if how.off or not participants:
            return group
        base, name = group.base.tensor, group.metadata.name
        check_finite(base, group.base.id, name)
        for participant in participants:
            check_finite(participant.tensor, participant.model, name)
        if how.purify == "separate":
            new = separated(participants, layers, base, how)
        else:
            new = truncated(participants, base, how)
        for model, purified in new.items():
            if purified.cut is not None:
                self.state.record_cut(name, model, purified.cut)
        entries = tuple(
            replace(e, tensor=new[e.id].weight if e.id in new else wide(e.tensor))
            for e in group.entries
        )
        return replace(group, entries=entries)


def _contributes(entry: TensorEntry, group: TensorGroup, inner: Mapping[str, Any]) -> bool:
    """False where the task vector is zero, or its `weight` is.

    Purifying a weight that equals the base's would give it a task vector: minus the base in the
    dropped directions.
    """
    weights = inner.get("weight")
    if isinstance(weights, Mapping) and weights.get(entry.id) == 0:
        return False
    return not torch.equal(entry.tensor, group.base.tensor)


@dataclass(frozen=True)
class Participant:
    """One model's weight of the layer.

    Attributes:
        model: mergekit's id.
        tensor: as mergekit loaded it.
        layer: what is known of the layer.
    """

    model: Hashable
    tensor: Tensor
    layer: Layer

    def oriented(self, matrix: Tensor) -> Tensor:
        """`(out, in)` from the stored layout, and back."""
        return matrix.mT if self.layer.transposed else matrix


@dataclass(frozen=True)
class Purified:
    """One model's new weight, and what it lost where that can be counted."""

    weight: Tensor
    cut: Cut | None = None


def truncated(
    participants: list[Participant], base: Tensor, how: Purification
) -> dict[Hashable, Purified]:
    """The least activated directions out of every weight, or out of every task vector.

    The paper's method (sections 3.2 and 3.3) with `purify: weight`.
    """
    of_delta, ratio, rank = how.purify == "delta", how.kept_share, min(base.shape)
    matrices = [wide(p.tensor) - wide(base) if of_delta else wide(p.tensor) for p in participants]
    count = allocation.cap(rank, ratio)
    found = [_tail(p, m, count, how) for p, m in zip(participants, matrices, strict=True)]
    drops = allocation.allocate(
        [tail.normalised for tail in found], rank, ratio, how.rank_allocation
    )
    result = {}
    for p, matrix, tail, dropped in zip(participants, matrices, found, drops, strict=True):
        basis = tail.basis[:, :dropped]
        new = p.oriented(subspace.purify(p.oriented(matrix), basis)).contiguous()
        lost = torch.linalg.vector_norm(matrix - new)
        changed = torch.linalg.vector_norm(wide(p.tensor) - wide(base))
        cut = Cut(rank, dropped, (lost / changed).item())
        result[p.model] = Purified(new + wide(base) if of_delta else new, cut)
    return result


def separated(
    participants: list[Participant],
    others: Mapping[Hashable, Layer],
    base: Tensor,
    how: Purification,
) -> dict[Hashable, Purified]:
    """Every task vector on the inputs that are its own task's rather than the others'.

    Args:
        participants: the models whose weights are purified.
        others: all models with a covariance here, by id; the participants among them.
        base: the base's weight.
        how: what is done to them.
    """
    strength = how.separation
    if strength is None:
        strength = 1 / max(len(others) - 1, 1)

    def moment(layer: Layer) -> Tensor:
        return double(layer.covariance().to(base.device))

    total = summed(map(moment, others.values()))
    result = {}
    for p in participants:
        own = moment(p.layer)
        try:
            allowed = subspace.damped(torch.lerp(own, total, strength), **how.damping)
            delta = separate(p.oriented(wide(p.tensor) - wide(base)), own, allowed)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise _unusable(p, error) from error
        result[p.model] = Purified(wide(base) + p.oriented(delta).to(wide(base)))
    return result


def _tail(
    participant: Participant, matrix: Tensor, count: int, how: Purification
) -> subspace.Tail:
    """The `count` least activated directions of one model's weight or task vector."""
    layer = participant.layer

    def compute() -> subspace.Tail:
        # MPS has no float64.
        here = matrix.cpu() if matrix.device.type == "mps" else matrix
        covariance = None
        if how.subspace == "covariance":
            try:
                covariance = subspace.damped(layer.covariance().to(here.device), **how.damping)
            except ValueError as error:
                raise _unusable(participant, error) from error
        return subspace.tail(
            participant.oriented(here),
            covariance,
            count,
            subspace=how.subspace,
            seed=layer.seed,
        )

    # The ablations are cheap, and would share one address in the cache.
    if layer.identity is None or how.subspace != "covariance":
        return compute()
    # The address has the weight as mergekit loaded it, so that its dtype is part of the name.
    named = participant.tensor if how.purify == "weight" else matrix
    written = f"{how.dampening_frac}|{how.regularization}"
    name = decompositions.address(layer.identity, named, layer.transposed, written)
    return decompositions.remembered(
        cache_folder() / "decompositions", name, count, named.dtype, compute)


def _unusable(participant: Participant, error: Exception) -> PaveError:
    return PaveError(
        f"The covariance of {participant.layer.name} of {participant.model} is unusable: {error}; "
        "recalibrate."
    )
