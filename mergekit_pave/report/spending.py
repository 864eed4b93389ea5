"""What a cut would take from every weight, for all cuts at once: the facts behind `suggest`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_pave import allocation, subspace
from mergekit_pave.report import measure
from mergekit_pave.report.gather import Layer, Merge, explained
from mergekit_pave.store import CovarianceStore

# The candidates; the last is the largest cut.
RATIOS = (1.0, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.875)
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Spent:
    """What dropping 0, 1, ... directions takes from one weight of one model.

    Attributes:
        normalised: (k,) the tail of `A`, for the allocation.
        calibration: (k + 1,) share of the output energy on the calibration rows.
        held_out: (k + 1,) the same on held-out rows, None without any.
        removed: (k + 1,) norm of what is dropped over the norm of the task vector.
        task: output energy of the task vector over that of the weight.
    """

    normalised: Tensor
    calibration: Tensor
    held_out: Tensor | None
    removed: Tensor
    task: float

    def share(self, dropped: int) -> float:
        held = 0.0 if self.held_out is None else self.held_out[dropped].item()
        return max(self.calibration[dropped].item(), held)


@dataclass(frozen=True)
class Seen:
    """One layer: what its models would spend, and the energies of several dampings.

    Attributes:
        dampings: damping -> mean logarithm of the held-out energy that it drops.
    """

    layer: Layer
    models: list[Spent]
    dampings: dict[float, float]

    def shares(self, ratio: float) -> list[tuple[Spent, int]]:
        drops = allocation.allocate([s.normalised for s in self.models], self.layer.rank, ratio,
                                    self.layer.settings.rank_allocation)
        return list(zip(self.models, drops, strict=True))

    def bears(self, ratio: float, threshold: float) -> bool:
        """Whether every model keeps all but `threshold` of its output energy, and the merge
        sees no more of the base taken away than of the fine-tuning."""
        return all(
            spent.share(dropped) <= threshold and spent.removed[dropped] <= 1
            for spent, dropped in self.shares(ratio)
        )


def look(
    merge: Merge, layers: Sequence[Layer], held: Sequence[CovarianceStore] | None,
    device: torch.device,
) -> list[Seen]:
    """Spend up to the largest cut at every layer, on held-out rows too where given."""
    seen = [_seen(merge, layer, held, device)
            for layer in tqdm(layers, desc="Looking at layers", unit="weight")]
    return [one for one in seen if one.models]


def _seen(
    merge: Merge, layer: Layer, held: Sequence[CovarianceStore] | None, device: torch.device
) -> Seen:
    models, logs = [], {fraction: [] for fraction in DAMPINGS}
    base = merge.base_weight(layer).to(device, torch.float64)
    for number, (_, name) in layer.own.items():
        if name not in merge.models[number].store.weights:
            continue  # an expert that a part of the rows never reached
        weight = merge.weight(layer, number).to(device, torch.float64)
        covariance = merge.covariance(layer, number).to(device)
        other = None
        if held is not None and name in held[number].weights:
            store = held[number]
            other = store.covariance(store.weights[name].site).to(device)
            for fraction, value in _damped_energies(layer, weight, covariance, other).items():
                logs[fraction].append(math.log(max(value, 1e-300)))
        with explained(layer):
            models.append(_spent(layer, weight, base, covariance, other))
    return Seen(layer, models, {f: mean(values) for f, values in logs.items() if values})


def _spent(
    layer: Layer, weight: Tensor, base: Tensor, covariance: Tensor, other: Tensor | None
) -> Spent:
    damped = subspace.damped(covariance, **layer.settings.damping)
    tail = subspace.tail(weight, damped, allocation.cap(layer.rank, RATIOS[-1]))
    energies = [None if c is None else _shares(tail.basis, weight, c)
                for c in (covariance, other)]
    output = measure.output_energy(weight, covariance)
    task = measure.output_energy(weight - base, covariance) / output if output > 0 else 0.0
    lengths = torch.linalg.vector_norm(tail.basis.mT @ weight, dim=1).square().cumsum(0)
    changed = torch.linalg.vector_norm(weight - base).clamp_min(torch.finfo(weight.dtype).tiny)
    removed = torch.cat([lengths.new_zeros(1), lengths]).sqrt() / changed
    return Spent(tail.normalised.cpu(), energies[0], energies[1], removed.cpu(), task)


def _shares(basis: Tensor, weight: Tensor, covariance: Tensor) -> Tensor:
    """(k + 1,) share of `E |W x|^2` in the first 0, 1, ... directions of `basis`."""
    energy = measure.direction_energy(basis, weight, covariance)
    total = max(measure.output_energy(weight, covariance), torch.finfo(energy.dtype).tiny)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]).cpu() / total


def _damped_energies(
    layer: Layer, weight: Tensor, covariance: Tensor, other: Tensor
) -> dict[float, float]:
    """Held-out energy that this merge's cut would take, by damping."""
    count = max(1, allocation.cap(layer.rank, layer.settings.rank_ratio))
    count = min(count, layer.rank - 1)
    if count < 1:
        return {}
    return {
        fraction: measure.direction_energy(
            subspace.tail(weight, subspace.damped(covariance, dampening_frac=fraction),
                          count).basis, weight, other).sum().item()
        for fraction in DAMPINGS
    }
