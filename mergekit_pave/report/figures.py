"""The report's figures, from its dictionary alone. This file has the curves, `maps` the rest.

Panels of one figure share their axes, so that they can be compared at a glance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite, nan
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from mergekit_pave.report.build import TOKENS_PER_DIMENSION
from mergekit_pave.report.drawing import (
    INK,
    MODELS,
    MUTED,
    STRONG,
    WEAK,
    Drawing,
    Key,
    Panel,
    curves,
    heat,
    log_axis,
    ramp,
    ticks,
)
from mergekit_pave.report.survey import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[list[float]]
# What is smaller is drawn here: rounding, not signal.
FLOOR = 1e-9


def drawings(report: Report) -> dict[str, Drawing]:
    """Every figure by name, in the order of the page."""
    made = (_spectra, _spectra_by_depth, ranks, _errors, _energy, _interference,
            overlap, covariances)
    return {drawing.name: drawing for drawing in (make(report) for make in made)}


def limits(values: Iterable[float]) -> tuple[float, float] | None:
    """A logarithmic axis that holds all positive values, with a little room."""
    seen = [v for v in values if isfinite(v) and v > 0]
    return (min(seen) / 1.4, max(seen) * 1.4) if seen else None


_SPECTRUM_KEYS = (Key("weighted by the covariance", STRONG), Key("plain SVD", WEAK, "dashed"))


def _spectra(report: Report) -> Drawing:
    parts = [(kind, _spectrum_lines(layers)) for kind, layers in kinds(report).items()]
    return _spectrum_drawing("spectra", report, parts)


def _spectra_by_depth(report: Report) -> Drawing:
    parts = []
    for kind, layers in kinds(report).items():
        for place in spread(range(len(layers)), 3):
            one = [layers[place]]
            parts.append((f"{kind}, {layer_label(layers[place])}", _spectrum_lines(one)))
    return _spectrum_drawing("spectra-by-depth", report, parts)


def _spectrum_lines(layers: Layers) -> dict[str, Lines]:
    """One line per model, the median of its layers, for both spectra."""
    return {
        which: [[max(v, FLOOR) for v in pointwise(median, [r["spectrum"][which] for r in rows])]
                for rows in by_model(layers).values()]
        for which in ("svd", "covariance")
    }


def _spectrum_drawing(
    name: str, report: Report, parts: Sequence[tuple[str, dict[str, Lines]]]
) -> Drawing:
    x = [100 * share for share in report["shares"]]
    # The very last value may be zero, which would leave the others a corner of the axis.
    span = limits(v for _, both in parts for lines in both.values() for line in lines
                  for v in line[:-1])

    def draw(axes: Axes, both: dict[str, Lines]) -> None:
        curves(axes, x, both["svd"], WEAK, dashed=True)
        curves(axes, x, both["covariance"], STRONG)
        axes.set_xlim(0, 100)
        axes.set_xlabel("directions, strongest first (%)")
        axes.set_ylabel("singular value / largest")
        log_axis(axes, "y", span)

    panels = [Panel(title, lambda axes, both=both: draw(axes, both)) for title, both in parts]
    return Drawing(name, tuple(panels), _SPECTRUM_KEYS)


def _errors(report: Report) -> Drawing:
    few = len(report["models"]) <= len(MODELS)
    span = limits(max(v, FLOOR) for layer in report["layers"] for row in layer["models"]
                  for v in row["error"] if v > 0)
    panels = tuple(Panel(kind, _draw_errors(report, layers, few, span))
                   for kind, layers in kinds(report).items())
    own = [Key(name, MODELS[i]) for i, name in enumerate(report["models"])] if few else [
        Key("median of the models", STRONG), Key("10% to 90%, and all", STRONG, "band")]
    return Drawing("error", panels, (*own, Key("knee", INK, "dot"),
                                     Key("this merge's rank_ratio", MUTED, "dashed")))


def _draw_errors(
    report: Report, layers: Layers, few: bool, span: tuple[float, float] | None
) -> Callable[[Axes], None]:
    x = [100 * share for share in report["shares"]]
    groups = by_model(layers)
    lines = {n: [v if v > 0 else nan for v in pointwise(median, [r["error"] for r in rows])]
             for n, rows in groups.items()}

    def draw(axes: Axes) -> None:
        if few:
            for number, line in lines.items():
                axes.plot(x, line, color=MODELS[number], linewidth=1.3)
        else:
            curves(axes, x, list(lines.values()), STRONG)
        for number, rows in groups.items():
            bend = 100 * median(row["knee"] for row in rows)
            axes.plot(bend, _at(x, lines[number], bend), "o", color=INK, markersize=3.2, zorder=3)
        cut = 100 * mean(layer["rank_ratio"] for layer in layers)
        axes.axvline(cut, color=MUTED, linestyle="--", linewidth=1)
        axes.set_xlim(0, 101)
        axes.set_xlabel("rank ratio (% kept)")
        axes.set_ylabel("activated energy lost")
        log_axis(axes, "y", span)

    return draw


def _energy(report: Report) -> Drawing:
    keys = (Key("as dropped by this merge", STRONG),
            Key("same number dropped by plain SVD", WEAK, "dashed"))
    parts = {kind: _energy_lines(report, layers) for kind, layers in kinds(report).items()}
    # A merge close to its plain method may drop nothing, which leaves the panels empty.
    span = limits(v for _, both in parts.values() for lines in both.values() for line in lines
                  for v in line) or (1e-3, 1.0)

    def draw(axes: Axes, blocks: list[str], both: dict[str, Lines]) -> None:
        curves(axes, range(len(blocks)), both["energy_removed_svd"], WEAK, dashed=True)
        curves(axes, range(len(blocks)), both["energy_removed"], STRONG)
        _layer_axis(axes, blocks)
        axes.set_ylabel("output energy removed")
        log_axis(axes, "y", span, percent=True)

    return Drawing("energy", tuple(
        Panel(kind, lambda axes, part=part: draw(axes, *part)) for kind, part in parts.items()
    ), keys)


def _energy_lines(report: Report, layers: Layers) -> tuple[list[str], dict[str, Lines]]:
    """Percentages by block, one line per model; NaN where nothing is dropped."""
    both: dict[str, Lines] = {}
    blocks: list[str] = []
    for key in ("energy_removed_svd", "energy_removed"):
        matrix, blocks = grid(report, layers, lambda row, _, key=key: row[key])
        both[key] = [[100 * v if v and v > 0 else nan for v in line] for line in matrix]
    return blocks, both


def _interference(report: Report) -> Drawing:
    keys = (Key("before purification", WEAK, "dashed"), Key("after purification", STRONG))
    parts = {kind: _interference_lines(layers) for kind, layers in kinds(report).items()}
    top = max((v for _, both in parts.values() for line in both.values() for v in line),
              default=1.0)

    def draw(axes: Axes, blocks: list[str], both: dict[str, list[float]]) -> None:
        curves(axes, range(len(blocks)), [both["relative_before"]], WEAK, dashed=True)
        curves(axes, range(len(blocks)), [both["relative_after"]], STRONG)
        _layer_axis(axes, blocks)
        axes.set_ylim(0, 1.08 * top or 1)
        axes.set_ylabel("interference per unit\nof singular value")

    return Drawing("interference", tuple(
        Panel(kind, lambda axes, part=part: draw(axes, *part)) for kind, part in parts.items()
    ), keys)


def _interference_lines(layers: Layers) -> tuple[list[str], dict[str, list[float]]]:
    groups = by_block(layers)
    return list(groups), {
        key: [mean(layer["interference"][key] for layer in group) for group in groups.values()]
        for key in ("relative_before", "relative_after")
    }


def _at(x: Sequence[float], y: Sequence[float], place: float) -> float:
    """`y` at `place`, straight between its neighbours (of the logarithm's straight line)."""
    for i in range(len(x) - 1):
        if x[i] <= place <= x[i + 1]:
            share = (place - x[i]) / (x[i + 1] - x[i])
            return y[i] ** (1 - share) * y[i + 1] ** share
    return nan


def _layer_axis(axes: Axes, blocks: Sequence[str]) -> None:
    ticks(axes, "x", blocks)
    axes.set_xlabel("layer")


Report = Mapping[str, Any]
Row = Mapping[str, Any]
Layers = list[Mapping[str, Any]]
# More kinds of weights than this are left to the JSON: the largest are drawn.
MOST_KINDS = 9
# Names of more models than this do not fit beside a panel.
MOST_NAMES = 8


def kinds(report: Report) -> dict[str, Layers]:
    """The layers by kind, by name; at most `MOST_KINDS`, the largest."""
    groups: dict[str, Layers] = {}
    for layer in report["layers"]:
        groups.setdefault(layer["kind"], []).append(layer)
    sizes = {kind: sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
             for kind, layers in groups.items()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:MOST_KINDS]
    return {kind: layers for kind, layers in groups.items() if kind in largest}


def by_model(layers: Layers) -> dict[int, list[Row]]:
    """Model number -> its rows."""
    groups: dict[int, list[Row]] = {}
    for layer in layers:
        for row in layer["models"]:
            groups.setdefault(row["model"], []).append(row)
    return dict(sorted(groups.items()))


def by_block(layers: Layers) -> dict[str, Layers]:
    """Label of the block -> its layers, from the first to the last."""

    def number(layer: Mapping[str, Any]) -> int:
        return -1 if layer["block"] is None else layer["block"]

    ordered = sorted(layers, key=number)
    return {"–" if block < 0 else str(block): list(group)
            for block, group in groupby(ordered, number)}


def grid(
    report: Report, layers: Layers, value: Callable[[Row, Mapping[str, Any]], float]
) -> tuple[list[list[float | None]], list[str]]:
    """(models, blocks) means of `value(row, layer)`, and the blocks' labels."""
    groups = by_block(layers)
    cells: dict[tuple[int, str], list[float]] = {}
    for block, group in groups.items():
        for layer in group:
            for row in layer["models"]:
                cells.setdefault((row["model"], block), []).append(value(row, layer))
    rows = [[mean(cells[n, b]) if (n, b) in cells else None for b in groups]
            for n in range(len(report["models"]))]
    return rows, list(groups)


def pointwise(
    combine: Callable[[Iterable[float]], float], lines: Sequence[Sequence[float]]
) -> list[float]:
    """One line from many of the same length."""
    return [combine(values) for values in zip(*lines, strict=True)]


def layer_label(layer: Mapping[str, Any]) -> str:
    return "outside the layers" if layer["block"] is None else f"layer {layer['block']}"


def model_labels(report: Report) -> list[str]:
    """Names while they fit beside a panel, else the numbers of the page's table."""
    names = report["models"]
    if len(names) > MOST_NAMES:
        return [str(i + 1) for i in range(len(names))]
    return [f"{i + 1} {_short(name)}" for i, name in enumerate(names)]


def _short(name: str, length: int = 14) -> str:
    name = name.rpartition("/")[2]
    return name if len(name) <= length else f"{name[:6]}…{name[-(length - 7):]}"


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
