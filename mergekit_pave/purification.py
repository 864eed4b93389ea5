"""How the models' weights of one linear layer are purified: `purify: weight, delta, separate`.

Between the algebra (`subspace`, `allocation`, `separation`) and mergekit's interface (`method`).
All results are whole weights again, in float32 or better.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_pave import allocation, subspace, tails
from mergekit_pave.calibration.run import cache_folder
from mergekit_pave.errors import PaveError
from mergekit_pave.numeric import double, wide
from mergekit_pave.parameters import DEFAULT_DAMPENING, DEFAULT_RATIO
from mergekit_pave.separation import separate
from mergekit_pave.statistics import Cut, Layer


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
    participants: list[Participant], base: Tensor, values: Mapping[str, Any]
) -> dict[Hashable, Purified]:
    """The least activated directions out of every weight, or out of every task vector.

    The paper's method (sections 3.2 and 3.3) with `purify: weight`.
    """
    of_delta = values["purify"] == "delta"
    ratio, rank = values["rank_ratio"], min(base.shape)
    if ratio is None:
        ratio = DEFAULT_RATIO[values["purify"]]
    matrices = [wide(p.tensor) - wide(base) if of_delta else wide(p.tensor) for p in participants]
    count = allocation.cap(rank, ratio)
    found = [_tail(p, m, count, values) for p, m in zip(participants, matrices, strict=True)]
    drops = allocation.allocate(
        [tail.normalised for tail in found], rank, ratio, values["rank_allocation"]
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
    values: Mapping[str, Any],
) -> dict[Hashable, Purified]:
    """Every task vector on the inputs that are its own task's rather than the others'.

    Args:
        participants: the models whose weights are purified.
        others: all models with a covariance here, by id; the participants among them.
        base: the base's weight.
        values: the parameters.
    """
    strength = values["separation"]
    if strength is None:
        strength = 1 / max(len(others) - 1, 1)

    def moment(layer: Layer) -> Tensor:
        return double(layer.covariance().to(base.device))

    total = None  # one sum, and one model's moment at a time
    for layer in others.values():
        total = moment(layer) if total is None else total.add_(moment(layer))
    result = {}
    for p in participants:
        own = moment(p.layer)
        try:
            allowed = subspace.damped(torch.lerp(own, total, strength), **damping_of(values))
            delta = separate(p.oriented(wide(p.tensor) - wide(base)), own, allowed)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise _unusable(p, error) from error
        result[p.model] = Purified(wide(base) + p.oriented(delta).to(wide(base)))
    return result


def _tail(
    participant: Participant, matrix: Tensor, count: int, values: Mapping[str, Any]
) -> subspace.Tail:
    """The `count` least activated directions of one model's weight or task vector."""
    layer, damping = participant.layer, damping_of(values)

    def compute() -> subspace.Tail:
        # MPS has no float64.
        here = matrix.cpu() if matrix.device.type == "mps" else matrix
        covariance = None
        if values["subspace"] == "covariance":
            try:
                covariance = subspace.damped(layer.covariance().to(here.device), **damping)
            except ValueError as error:
                raise _unusable(participant, error) from error
        return subspace.tail(
            participant.oriented(here),
            covariance,
            count,
            subspace=values["subspace"],
            seed=layer.seed,
        )

    # The ablations are cheap, and the address does not tell them apart.
    if layer.identity is None or values["subspace"] != "covariance":
        return compute()
    # The weight as it is stored, so that the dtype of a merge's inputs is part of the name.
    named = participant.tensor if values["purify"] == "weight" else matrix
    written = f"{damping['dampening_frac']}|{damping['regularization']}"
    name = tails.address(layer.identity, named, layer.transposed, written)
    return tails.remembered(cache_folder() / "tails", name, count, compute)


def damping_of(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The keywords of `subspace.damped`; raises `PaveError` when both keys are set."""
    fraction, absolute = values["dampening_frac"], values["regularization"]
    if fraction is not None and absolute is not None:
        raise PaveError("dampening_frac and regularization exclude each other: keep one of them.")
    if fraction is None and absolute is None:
        fraction = DEFAULT_DAMPENING
    return {"dampening_frac": fraction, "regularization": absolute}


def _unusable(participant: Participant, error: Exception) -> PaveError:
    return PaveError(
        f"The covariance of {participant.layer.name} of {participant.model} is unusable: {error}; "
        "recalibrate."
    )
