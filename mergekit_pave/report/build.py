"""From an open merge to the report's dictionary: everything the page and the figures show."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.algebra import allocation, subspace
from mergekit_pave.algebra.numeric import wide
from mergekit_pave.algebra.tsv import factors, interference, kept_rank
from mergekit_pave.report import measure
from mergekit_pave.report.merge import Layer, Merge, explained
from mergekit_pave.report.survey import Sample, settings_summary

FORMAT = 1


def build(merge: Merge, sample: Sample, device: torch.device) -> dict[str, Any]:
    """Measure the sampled layers; the result is `report.json`, without a path in it."""
    layers, sites = [], dict[tuple[int, str], float]()
    for layer in tqdm(sample.layers, desc="Measuring layers", unit="weight"):
        layers.append(_layer(merge, layer, device, sites))
    report = {
        "kind": "mergekit-pave report",
        "format": FORMAT,
        "version": version("mergekit-pave"),
        "method": merge.method,
        "base": merge.base,
        "models": [model.label for model in merge.models],
        "settings": settings_summary(merge.layers),
        "sampling": {"blocks": sample.blocks, "of": sample.of, "weights": len(sample.layers),
                     "of_weights": len(merge.layers)},
        "shares": list(measure.SHARES),
        "layers": layers,
        "covariances": _covariances(merge, sites),
        "coverage": [_coverage(merge, number) for number in range(len(merge.models))],
    }
    report["summary"] = summarise(report)
    return _rounded(report)


def _rounded(value: Any) -> Any:
    """Round all numbers to six digits: further digits depend on the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _layer(
    merge: Merge, layer: Layer, device: torch.device, sites: dict[tuple[int, str], float]
) -> dict[str, Any]:
    """One weight over all models; the effective ranks of its covariances go into `sites`."""
    tails: dict[int, subspace.Tail] = {}
    rows: dict[int, dict[str, Any]] = {}
    for number in layer.own:
        covariance = merge.covariance(layer, number).to(device)
        with explained(layer):
            tails[number], rows[number] = _member(merge, layer, number, covariance)
        site = (number, merge.site(layer, number))
        if site not in sites:
            sites[site] = measure.effective_rank(covariance)
    settings = layer.settings
    drops = allocation.allocate(
        [tail.normalised for tail in tails.values()],
        layer.rank, settings.kept_share, settings.rank_allocation,
    )
    bases = {n: tails[n].basis[:, :k] for n, k in zip(tails, drops, strict=True)}
    for (number, row), dropped in zip(rows.items(), drops, strict=True):
        _spend(row, layer.rank, dropped)
        row["model"] = number
    return {
        "name": layer.name, "block": layer.block, "kind": layer.kind,
        "shape": list(layer.shape), "rank": layer.rank, "rank_ratio": settings.rank_ratio,
        "models": list(rows.values()),
        **_between(merge, layer, bases, device),
    }


def _member(
    merge: Merge, layer: Layer, number: int, covariance: Tensor
) -> tuple[subspace.Tail, dict[str, Any]]:
    """One model's tail, as the merge takes it, and its numbers before anything is dropped."""
    settings = layer.settings
    weight = wide(merge.weight(layer, number).to(covariance.device))
    damped = subspace.damped(covariance, **settings.damping)
    count = allocation.cap(layer.rank, settings.kept_share)
    plain = subspace.tail(weight, None, count, subspace="svd")
    seed = zlib.crc32(layer.own[number][1].encode())
    tail = subspace.tail(weight, damped, count, subspace=settings.subspace, seed=seed)
    values = {"svd": subspace.spectrum(weight, subspace="svd"),
              "covariance": subspace.spectrum(weight, damped)}
    lost = {name: measure.lost_energy(s) for name, s in values.items()}
    delta = weight - wide(merge.base_weight(layer).to(covariance.device))
    return tail, {
        "spectrum": {name: measure.sample_spectrum(s) for name, s in values.items()},
        "holding": {name: measure.share_holding(e) for name, e in lost.items()},
        "error": measure.sample_lost(lost["covariance"]),
        "knee": measure.knee(lost["covariance"]),
        # `_spend` replaces these once it is known how many directions are dropped.
        "_energy": measure.direction_energy(tail.basis, weight, covariance).cumsum(0),
        "_energy_svd": measure.direction_energy(plain.basis, weight, covariance).cumsum(0),
        "_output": measure.output_energy(weight, covariance),
        "_task": measure.output_energy(delta, covariance),
    }


def _spend(row: dict[str, Any], rank: int, dropped: int) -> None:
    """Turn what each direction carries into what this cut removes."""
    sums, output, task = (row.pop(key) for key in ("_energy", "_output", "_task"))
    plain = row.pop("_energy_svd")
    removed, removed_svd = (s[dropped - 1].item() if dropped else 0.0 for s in (sums, plain))
    row |= {
        "kept": rank - dropped,
        "dropped": dropped,
        "energy_removed": removed / output if output > 0 else 0.0,
        "energy_removed_svd": removed_svd / output if output > 0 else 0.0,
        "task_energy_removed": removed / task if task > 0 else None,
    }


def _between(
    merge: Merge, layer: Layer, bases: Mapping[int, Tensor], device: torch.device
) -> dict[str, Any]:
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
    return {
        "interference": {"rank": count, "before": was, "after": now,
                         "relative_before": was_relative, "relative_after": now_relative},
        "overlap": {
            "rank": top,
            "chance": {"output": top / layer.shape[0], "input": top / layer.shape[1]},
            "output": measure.overlaps([part.u[:, :top] for part in before]),
            "input": measure.overlaps([part.v[:, :top] for part in before]),
            "dropped": measure.overlaps([b if b.shape[1] else None for b in bases.values()]),
        },
    }


def _covariances(merge: Merge, ranks: Mapping[tuple[int, str], float]) -> list[dict[str, Any]]:
    """Every covariance of every model; the effective rank only where it was measured."""
    return [
        {
            "model": number, "site": name, "width": site.width, "tokens": site.count,
            "tokens_per_dimension": site.count / site.width,
            "effective_rank": ranks.get((number, name)),
        }
        for number, model in enumerate(merge.models)
        for name, site in model.store.sites.items()
    ]


def _coverage(merge: Merge, number: int) -> dict[str, Any]:
    found = merge.coverage[number]
    return {what: {"tensors": reasons.total(), "reasons": dict(sorted(reasons.items()))}
            for what, reasons in found.items()}


# Fewer rows than this per feature leave a covariance's small eigenvalues mostly noise: their
# spread by sampling alone is (1 +- sqrt(width / rows))^2, at 4 still 0.25 to 2.25.
TOKENS_PER_DIMENSION = 4.0


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows as numbers, from the rest of the report."""
    rows = [row for layer in report["layers"] for row in layer["models"]]
    ranks = sum(layer["rank"] * len(layer["models"]) for layer in report["layers"])
    return {
        **_of_rows(rows),
        "kept_share": sum(row["kept"] for row in rows) / max(ranks, 1),
        "holding": {key: median([row["holding"][key] for row in rows] or [0.0])
                    for key in ("svd", "covariance")},
        "knee": median([row["knee"] for row in rows] or [0.0]),
        "interference": _interference(report["layers"]),
        "overlap": {key: _pairs(report, key) for key in ("output", "input", "dropped")},
        "tokens": _tokens(report["covariances"]),
        "tensors": {what: sum(c[what]["tensors"] for c in report["coverage"])
                    for what in ("purified", "plain", "skipped")},
        "models": [_model(report, number) for number in range(len(report["models"]))],
    }


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    removed = [row["energy_removed"] for row in rows] or [0.0]
    task = [r["task_energy_removed"] for r in rows if r["task_energy_removed"] is not None]
    return {
        "dropped": sum(row["dropped"] for row in rows),
        "energy_removed": {"median": median(removed), "most": max(removed)},
        "energy_removed_svd": median([row["energy_removed_svd"] for row in rows] or [0.0]),
        "task_energy_removed": {"median": median(task or [0.0]), "most": max(task or [0.0])},
    }


def _model(report: Mapping[str, Any], number: int) -> dict[str, Any]:
    own = [(layer["rank"], row) for layer in report["layers"] for row in layer["models"]
           if row["model"] == number]
    rows = [row for _, row in own]
    covariances = [c for c in report["covariances"] if c["model"] == number]
    return {
        **_of_rows(rows),
        "kept_share": sum(r["kept"] for r in rows) / max(sum(rank for rank, _ in own), 1),
        "tokens": _tokens(covariances),
        **{what: report["coverage"][number][what]["tensors"]
           for what in ("purified", "plain", "skipped")},
    }


def _interference(layers: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    parts = [layer["interference"] for layer in layers]
    before, after = (sum(part[key] for part in parts) for key in ("before", "after"))
    return {"before": before, "after": after,
            "change": after / before - 1 if before > 0 else None}


def _pairs(report: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Mean overlap of every pair over the layers, and the pair that overlaps most."""
    count = len(report["models"])
    seen: dict[tuple[int, int], list[float]] = {}
    chances = []
    for layer in report["layers"]:
        numbers = [row["model"] for row in layer["models"]]
        for i, a in enumerate(numbers):
            for j, b in enumerate(numbers):
                value = layer["overlap"][key][i][j]
                if value is not None:
                    seen.setdefault((a, b), []).append(value)
        chances.append(_chance(layer, key))
    matrix = [[mean(seen[i, j]) if (i, j) in seen else None for j in range(count)]
              for i in range(count)]
    pairs = {(i, j): value for i in range(count) for j in range(i)
             if (value := matrix[i][j]) is not None}
    closest = max(pairs, key=pairs.__getitem__) if pairs else None
    return {"matrix": matrix, "chance": mean(chances) if chances else None,
            "pair": sorted(closest) if closest else None,
            "most": pairs[closest] if closest else None}


def _chance(layer: Mapping[str, Any], key: str) -> float:
    """What random directions of these numbers would overlap."""
    if key == "dropped":
        return max(row["dropped"] for row in layer["models"]) / layer["shape"][0]
    return layer["overlap"]["chance"][key]


def _tokens(covariances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    per = [c["tokens_per_dimension"] for c in covariances] or [0.0]
    ranks = [c["effective_rank"] / c["width"] for c in covariances if c["effective_rank"]]
    return {
        "covariances": len(covariances),
        "least": min(per), "median": median(per),
        "singular": sum(value < 1 for value in per),
        "short": sum(value < TOKENS_PER_DIMENSION for value in per),
        "effective_rank_share": median(ranks) if ranks else None,
    }
