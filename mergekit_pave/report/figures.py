"""The report's figures, from its dictionary alone. This file has the curves, `maps` the rest.

Panels of one figure share their axes, so that they can be compared at a glance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite, nan
from statistics import mean, median
from typing import TYPE_CHECKING

from mergekit_pave.report import maps
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
    log_axis,
    ticks,
)
from mergekit_pave.report.grouping import (
    Layers,
    Report,
    by_block,
    by_model,
    grid,
    kinds,
    layer_label,
    pointwise,
)
from mergekit_pave.report.sample import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[list[float]]
# What is smaller is drawn here: rounding, not signal.
FLOOR = 1e-9


def drawings(report: Report) -> dict[str, Drawing]:
    """Every figure by name, in the order of the page."""
    made = (_spectra, _spectra_by_depth, maps.ranks, _errors, _energy, _interference,
            maps.overlap, maps.covariances)
    return {drawing.name: drawing for drawing in (make(report) for make in made)}


def limits(values: Iterable[float]) -> tuple[float, float] | None:
    """A logarithmic axis that holds all positive values, with a little room."""
    seen = [v for v in values if isfinite(v) and v > 0]
    return (min(seen) / 1.4, max(seen) * 1.4) if seen else None


# --- spectra -------------------------------------------------------------------------------

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


# --- error and energy ----------------------------------------------------------------------


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


# --- interference --------------------------------------------------------------------------


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
