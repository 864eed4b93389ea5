"""Headline numbers of a report: over everything measured, and per model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

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
    pairs = {(i, j): matrix[i][j] for i in range(count) for j in range(i)
             if matrix[i][j] is not None}
    closest = max(pairs, key=pairs.get) if pairs else None
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
