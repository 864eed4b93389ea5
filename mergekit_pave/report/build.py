"""From an open merge to the report's facts: everything the page and the figures show."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.algebra import allocation, subspace
from mergekit_pave.algebra.numeric import wide
from mergekit_pave.algebra.tsv import factors, interference, kept_rank
from mergekit_pave.report import facts, measure
from mergekit_pave.report.merge import Layer, Merge, explained
from mergekit_pave.report.survey import Sample, settings_summary


def build(merge: Merge, sample: Sample, device: torch.device) -> facts.Report:
    """Measure the sampled layers."""
    layers, sites = [], dict[tuple[int, str], float]()
    for layer in tqdm(sample.layers, desc="Measuring layers", unit="weight"):
        layers.append(_layer(merge, layer, device, sites))
    covariances = _covariances(merge, sites)
    coverage = [_coverage(merge, number) for number in range(len(merge.models))]
    return facts.rounded(facts.Report(
        method=merge.method,
        base=merge.base,
        models=[model.label for model in merge.models],
        settings=settings_summary(merge.layers),
        sampling=facts.Sampling(sample.blocks, sample.of, len(layers), len(merge.layers)),
        shares=list(measure.SHARES),
        layers=layers,
        covariances=covariances,
        coverage=coverage,
        summary=summarise(layers, covariances, coverage),
    ))


def _layer(
    merge: Merge, layer: Layer, device: torch.device, sites: dict[tuple[int, str], float]
) -> facts.Weight:
    """One weight over all models; the effective ranks of its covariances go into `sites`."""
    members: dict[int, _Member] = {}
    for number in layer.own:
        covariance = merge.covariance(layer, number).to(device)
        with explained(layer):
            members[number] = _member(merge, layer, number, covariance)
        site = (number, merge.site(layer, number))
        if site not in sites:
            sites[site] = measure.effective_rank(covariance)
    settings = layer.settings
    drops = allocation.allocate(
        [member.tail.normalised for member in members.values()],
        layer.rank, settings.kept_share, settings.rank_allocation,
    )
    cut = list(zip(members.items(), drops, strict=True))
    bases = {number: member.tail.basis[:, :dropped] for (number, member), dropped in cut}
    between, overlap = _between(merge, layer, bases, device)
    return facts.Weight(
        name=layer.name, block=layer.block, kind=layer.kind, shape=list(layer.shape),
        rank=layer.rank, rank_ratio=settings.kept_share,
        models=[member.row(number, layer.rank, dropped) for (number, member), dropped in cut],
        interference=between, overlap=overlap,
    )


@dataclass(frozen=True)
class _Member:
    """One model's weight before it is known how much is dropped.

    Attributes:
        tail: as the merge takes it.
        spectra: (R,) singular values.
        removed: entry `k - 1` is the output energy that the `k` weakest directions carry.
        output: the weight's output energy; `task` is its task vector's.
    """

    tail: subspace.Tail
    spectra: facts.ByBasis[Tensor]
    removed: facts.ByBasis[Tensor]
    output: float
    task: float

    def row(self, model: int, rank: int, dropped: int) -> facts.Row:
        covariance, plain = (energies[dropped - 1].item() if dropped else 0.0
                             for energies in (self.removed.covariance, self.removed.svd))
        lost = _by_basis(measure.lost_energy, self.spectra)
        return facts.Row(
            model=model, kept=rank - dropped, dropped=dropped,
            spectrum=_by_basis(measure.sample_spectrum, self.spectra),
            holding=_by_basis(measure.share_holding, lost),
            error=measure.sample_lost(lost.covariance),
            knee=measure.knee(lost.covariance),
            energy_removed=covariance / self.output if self.output > 0 else 0.0,
            energy_removed_svd=plain / self.output if self.output > 0 else 0.0,
            task_energy_removed=covariance / self.task if self.task > 0 else None,
        )


def _by_basis(
    function: Callable[[Tensor], facts.Value], values: facts.ByBasis[Tensor]
) -> facts.ByBasis[facts.Value]:
    return facts.ByBasis(function(values.svd), function(values.covariance))


def _member(merge: Merge, layer: Layer, number: int, covariance: Tensor) -> _Member:
    settings = layer.settings
    weight = wide(merge.weight(layer, number).to(covariance.device))
    damped = subspace.damped(covariance, **settings.damping)
    count = allocation.cap(layer.rank, settings.kept_share)
    plain = subspace.tail(weight, None, count, subspace="svd")
    seed = zlib.crc32(layer.own[number][1].encode())
    tail = subspace.tail(weight, damped, count, subspace=settings.subspace, seed=seed)
    removed = [measure.direction_energy(part.basis, weight, covariance).cumsum(0)
               for part in (plain, tail)]
    delta = weight - wide(merge.base_weight(layer).to(covariance.device))
    return _Member(
        tail,
        facts.ByBasis(subspace.spectrum(weight, subspace="svd"),
                      subspace.spectrum(weight, damped)),
        facts.ByBasis(*removed),
        measure.output_energy(weight, covariance),
        measure.output_energy(delta, covariance),
    )


def _between(
    merge: Merge, layer: Layer, bases: Mapping[int, Tensor], device: torch.device
) -> tuple[facts.Interference, facts.Overlap]:
    """Interference before and after, and whose directions coincide."""
    # As in TSV: all tasks together have as many components as the weight has rank.
    count = kept_rank(layer.shape, len(layer.own))
    base = wide(merge.base_weight(layer).to(device))
    before, after = [], []
    for number, basis in bases.items():
        weight = wide(merge.weight(layer, number).to(device))
        before.append(factors(weight - base, count))
        after.append(factors(subspace.purify(weight, basis) - base, count))
    was, was_relative = interference(before)
    now, now_relative = interference(after)
    # Only the leading directions are compared: large subspaces overlap anyway.
    top = max(1, min(count, layer.rank // 8))
    return (
        facts.Interference(count, was, now, was_relative, now_relative),
        facts.Overlap(
            rank=top,
            chance=facts.Sides(top / layer.shape[0], top / layer.shape[1]),
            output=measure.overlaps([part.u[:, :top] for part in before]),
            input=measure.overlaps([part.v[:, :top] for part in before]),
            dropped=measure.overlaps([b if b.shape[1] else None for b in bases.values()]),
        ),
    )


def _covariances(merge: Merge, ranks: Mapping[tuple[int, str], float]) -> list[facts.Covariance]:
    """Every covariance of every model; the effective rank only where it was measured."""
    return [
        facts.Covariance(number, name, site.width, site.count, site.count / site.width,
                         ranks.get((number, name)))
        for number, model in enumerate(merge.models)
        for name, site in model.store.sites.items()
    ]


def _coverage(merge: Merge, number: int) -> facts.Coverage:
    return facts.Coverage(**{
        what: facts.Part(reasons.total(), dict(sorted(reasons.items())))
        for what, reasons in merge.coverage[number].items()})


# Fewer rows than this per feature leave a covariance's small eigenvalues mostly noise: their
# spread by sampling alone is (1 +- sqrt(width / rows))^2, at 4 still 0.25 to 2.25.
TOKENS_PER_DIMENSION = 4.0


def summarise(
    layers: Sequence[facts.Weight],
    covariances: Sequence[facts.Covariance],
    coverage: Sequence[facts.Coverage],
) -> facts.Summary:
    rows = [row for layer in layers for row in layer.models]
    return facts.Summary(
        **_cut(layers, covariances, None),
        holding=facts.ByBasis(median([row.holding.svd for row in rows] or [0.0]),
                              median([row.holding.covariance for row in rows] or [0.0])),
        knee=median([row.knee for row in rows] or [0.0]),
        interference=_change(layers),
        overlap=facts.Overlaps(
            _pairs(layers, len(coverage), lambda layer: layer.overlap.output,
                   lambda layer: layer.overlap.chance.output),
            _pairs(layers, len(coverage), lambda layer: layer.overlap.input,
                   lambda layer: layer.overlap.chance.input),
            _pairs(layers, len(coverage), lambda layer: layer.overlap.dropped,
                   lambda layer: max(row.dropped for row in layer.models) / layer.shape[0]),
        ),
        tensors=facts.Tensors(sum(c.purified.tensors for c in coverage),
                              sum(c.plain.tensors for c in coverage),
                              sum(c.skipped.tensors for c in coverage)),
        models=[
            facts.ModelCut(
                **_cut(layers, [c for c in covariances if c.model == number], number),
                purified=own.purified.tensors, plain=own.plain.tensors, skipped=own.skipped.tensors)
            for number, own in enumerate(coverage)],
    )


def _cut(
    layers: Sequence[facts.Weight], covariances: Sequence[facts.Covariance], model: int | None
) -> dict[str, Any]:
    """The fields of `facts.Cut`, over one model or over all."""
    rows = [(layer.rank, row) for layer in layers for row in layer.models
            if model in (None, row.model)]
    removed = [row.energy_removed for _, row in rows] or [0.0]
    task = [row.task_energy_removed for _, row in rows
            if row.task_energy_removed is not None] or [0.0]
    return {
        "dropped": sum(row.dropped for _, row in rows),
        "kept_share": sum(row.kept for _, row in rows) / max(sum(rank for rank, _ in rows), 1),
        "energy_removed": facts.Spread(median(removed), max(removed)),
        "energy_removed_svd": median([row.energy_removed_svd for _, row in rows] or [0.0]),
        "task_energy_removed": facts.Spread(median(task), max(task)),
        "tokens": _tokens(covariances),
    }


def _change(layers: Sequence[facts.Weight]) -> facts.Change:
    before = sum(layer.interference.before for layer in layers)
    after = sum(layer.interference.after for layer in layers)
    return facts.Change(before, after, after / before - 1 if before > 0 else None)


def _pairs(
    layers: Sequence[facts.Weight],
    count: int,
    overlaps: Callable[[facts.Weight], facts.Matrix],
    chance: Callable[[facts.Weight], float],
) -> facts.Pairs:
    """Mean overlap of every pair of `count` models, and the pair that overlaps most."""
    seen: dict[tuple[int, int], list[float]] = {}
    for layer in layers:
        numbers = [row.model for row in layer.models]
        for a, line in zip(numbers, overlaps(layer), strict=True):
            for b, value in zip(numbers, line, strict=True):
                if value is not None:
                    seen.setdefault((a, b), []).append(value)
    matrix = [[mean(seen[i, j]) if (i, j) in seen else None for j in range(count)]
              for i in range(count)]
    pairs = {(i, j): value for i in range(count) for j in range(i)
             if (value := matrix[i][j]) is not None}
    closest = max(pairs, key=pairs.__getitem__) if pairs else None
    chances = [chance(layer) for layer in layers]
    return facts.Pairs(matrix, mean(chances) if chances else None,
                       sorted(closest) if closest else None, pairs[closest] if closest else None)


def _tokens(covariances: Sequence[facts.Covariance]) -> facts.Tokens:
    per = [c.tokens_per_dimension for c in covariances] or [0.0]
    ranks = [c.effective_rank / c.width for c in covariances if c.effective_rank]
    return facts.Tokens(
        covariances=len(covariances),
        least=min(per), median=median(per),
        singular=sum(value < 1 for value in per),
        short=sum(value < TOKENS_PER_DIMENSION for value in per),
        effective_rank_share=median(ranks) if ranks else None,
    )
