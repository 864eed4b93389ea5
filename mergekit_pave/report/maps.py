"""Figures with models on an axis: kept ranks, overlaps, and the covariances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_pave.report.drawing import (
    MUTED,
    STRONG,
    WEAK,
    Drawing,
    Key,
    Panel,
    heat,
    log_axis,
    ramp,
    ticks,
)
from mergekit_pave.report.grouping import Report, grid, kinds, model_labels
from mergekit_pave.report.summary import TOKENS_PER_DIMENSION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Matrix = list[list[float | None]]


def ranks(report: Report) -> Drawing:
    """Kept ranks, a panel per kind: layers across, models down."""
    names = model_labels(report)
    low = min((row["kept"] / layer["rank"] for layer in report["layers"]
               for row in layer["models"]), default=0.0)

    def draw(axes: Axes, matrix: Matrix, blocks: list[str]) -> None:
        percent = [[None if v is None else 100 * v for v in row] for row in matrix]
        heat(axes, percent, 100 * low, 100.0, columns=blocks, rows=names,
             written=".1f" if len(blocks) <= 8 else None)
        axes.set_xlabel("layer")
        axes.set_ylabel("model")

    panels = []
    for kind, layers in kinds(report).items():
        part = grid(report, layers, lambda row, layer: row["kept"] / layer["rank"])
        panels.append(Panel(kind, lambda axes, part=part: draw(axes, *part), _height(len(names))))
    return Drawing("ranks", tuple(panels), ramp=ramp(f"{low:.1%} of the rank kept", "100%"))


def overlap(report: Report) -> Drawing:
    """Mean overlap of every two models: of their task vectors, and of what they drop."""
    parts = report["summary"]["overlap"]
    names = model_labels(report)
    high = max((v for part in parts.values() for i, row in enumerate(part["matrix"])
                for j, v in enumerate(row) if v is not None and i != j), default=1.0)
    titles = {"output": "task vectors: output side", "input": "task vectors: input side",
              "dropped": "dropped by PAVE"}

    def draw(axes: Axes, matrix: Matrix) -> None:
        # A model shares everything with itself; the colours are for the others.
        others = [[None if i == j else v for j, v in enumerate(row)]
                  for i, row in enumerate(matrix)]
        heat(axes, others, 0.0, max(high, 1e-12), rows=names, written=".2f",
             columns=[str(i + 1) for i in range(len(names))])
        axes.set_xlabel("model")

    panels = tuple(
        Panel(f"{title} (chance {parts[key]['chance'] or 0:.2f})",
              lambda axes, key=key: draw(axes, parts[key]["matrix"]),
              max(0.6, _height(len(names))))
        for key, title in titles.items())
    return Drawing("overlap", panels, ramp=ramp("0, nothing shared", f"{high:.2f}"))


def covariances(report: Report) -> Drawing:
    """How much data every covariance saw, and how many directions the data fill."""

    def tokens(axes: Axes) -> None:
        _strip(axes, report, lambda c: c["tokens_per_dimension"])
        axes.axvline(1, color=WEAK, linestyle="--", linewidth=1)
        axes.axvline(TOKENS_PER_DIMENSION, color=MUTED, linestyle="--", linewidth=1)
        axes.set_xlabel("tokens per dimension")
        log_axis(axes, "x")

    def filled(axes: Axes) -> None:
        _strip(axes, report, lambda c: c["effective_rank"] and
               100 * c["effective_rank"] / c["width"])
        axes.set_xlim(left=0)
        axes.set_xlabel("effective rank (% of the width)")

    height = _height(len(report["models"]))
    keys = (Key("one covariance", STRONG, "dot"), Key("below 1: singular", WEAK, "dashed"),
            Key(f"below {TOKENS_PER_DIMENSION:g}: noisy", MUTED, "dashed"))
    return Drawing("covariances", (Panel("how much data", tokens, height),
                                   Panel("how many directions they fill", filled, height)), keys)


def _strip(
    axes: Axes, report: Report, value: Callable[[Mapping[str, Any]], float | None]
) -> None:
    points = [(value(c), c["model"]) for c in report["covariances"]]
    points = [(x, y) for x, y in points if x]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", color=STRONG, markersize=3,
              alpha=0.45 if len(points) < 500 else 0.2, markeredgewidth=0)
    names = model_labels(report)
    ticks(axes, "y", names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("model")


def _height(models: int) -> float:
    return min(0.36 + 0.06 * max(models, 2), 1.25)
