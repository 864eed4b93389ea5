"""The report's figures, drawn with plain matplotlib from the report's facts alone.

A figure has one panel for each kind of weight; the panels share their axes, so that they can be
compared at a glance. The page shows it as SVG, the folder `figures` keeps it as PNG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from math import nan
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_pave.errors import PaveError
from mergekit_pave.report.build import TOKENS_PER_DIMENSION
from mergekit_pave.report.facts import Report, Row, Weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Layers = list[Weight]

# At most so many kinds of weights are drawn, the largest; the JSON has all.
MOST_KINDS = 9
# With more models than this, the median and the range are drawn instead of a line for each.
MOST_LINES = 8
# What is smaller is rounding, not signal.
FLOOR = 1e-9
STRONG, WEAK, MUTED = "#0868ac", "#c9510c", "#5d6675"
_STYLE: Any = {
    "font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "mergekit-pave",
    "text.parse_math": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#dfe3e8",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
}


def require_matplotlib() -> None:
    """Raise `PaveError` when the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PaveError(
            "The report needs matplotlib: pip install 'mergekit-pave[report]'."
        ) from error


def figures(report: Report) -> dict[str, Figure]:
    """Every figure by name, in the order of the page."""
    made = {
        "spectra": _spectra, "ranks": _ranks, "error": _error, "energy": _energy,
        "interference": _interference, "overlap": _overlap, "covariances": _covariances,
        **({"kept": _kept} if report.evaluation else {}),
    }
    with _styled():
        return {name: draw(report) for name, draw in made.items()}


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element."""
    out = io.StringIO()
    with _styled():
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg"):]


def png(figure: Figure, path: Path) -> None:
    with _styled():
        figure.savefig(path, format="png", dpi=150)


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _panels(titles: Sequence[str], height: float = 2.3) -> tuple[Figure, list[Axes]]:
    """A figure with a titled panel for each, three to a row."""
    from matplotlib.figure import Figure

    columns = max(1, min(3, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = Figure((3.5 * columns, height * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels[len(titles):]:
        axes.axis("off")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
    return figure, panels[: len(titles)]


def _finish(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """One legend for all panels."""
    if panels and (entries := panels[0].get_legend_handles_labels())[0]:
        figure.legend(*entries, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _curves(
    axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], label: str, colour: str,
    style: str = "-",
) -> None:
    """The median of some lines over the lines themselves, or over the range of many."""
    columns = [[v for v in column if not math.isnan(v)] for column in zip(*lines, strict=True)]
    middle = [median(c) if c else nan for c in columns]
    axes.plot(x, middle, style, color=colour, label=label)
    if len(lines) > MOST_LINES:
        low, high = ([pick(c) if c else nan for c in columns] for pick in (min, max))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    elif len(lines) > 1:
        axes.plot(x, list(zip(*lines, strict=True)), style, color=colour, lw=0.6, alpha=0.6)


def _blocks(axes: Axes, names: Sequence[str]) -> None:
    every = max(1, math.ceil(len(names) / 12))
    axes.set_xticks(range(0, len(names), every), list(names)[::every])
    axes.set_xlabel("layer")


def _spectra(report: Report) -> Figure:
    groups = kinds(report)
    figure, panels = _panels(list(groups))
    x = [100 * share for share in report.shares]
    for axes, layers in zip(panels, groups.values(), strict=True):
        for key, label, colour, style in (
            ("covariance", "weighted by the covariance", STRONG, "-"),
            ("svd", "plain SVD", WEAK, "--"),
        ):
            lines = [
                [max(v, FLOOR) for v in pointwise(median, [getattr(r.spectrum, key) for r in rows])]
                for rows in by_model(layers).values()
            ]
            _curves(axes, x, lines, label, colour, style)
        axes.set_yscale("log")
        axes.set(xlabel="directions, strongest first (%)", ylabel="singular value / largest")
    return _finish(figure, panels)


def _error(report: Report) -> Figure:
    groups = kinds(report)
    figure, panels = _panels(list(groups))
    x = [100 * share for share in report.shares]
    for axes, layers in zip(panels, groups.values(), strict=True):
        lines = [
            [v if v > 0 else nan for v in pointwise(median, [r.error for r in rows])]
            for rows in by_model(layers).values()
        ]
        _curves(axes, x, lines, "energy lost", STRONG)
        knee = 100 * median(row.knee for layer in layers for row in layer.models)
        axes.axvline(knee, color=WEAK, linestyle=":", label="knee, median")
        cut = 100 * mean(layer.rank_ratio for layer in layers)
        axes.axvline(cut, color=MUTED, linestyle="--", label="this merge's rank_ratio")
        axes.set_yscale("log")
        axes.set(xlabel="rank ratio (% kept)", ylabel="activated energy lost")
    return _finish(figure, panels)


def _energy(report: Report) -> Figure:
    groups = kinds(report)
    figure, panels = _panels(list(groups))
    for axes, layers in zip(panels, groups.values(), strict=True):
        for key, label, colour, style in (
            ("energy_removed", "as dropped by this merge", STRONG, ".-"),
            ("energy_removed_svd", "same number dropped by plain SVD", WEAK, "--"),
        ):
            matrix, blocks = grid(report, layers, partial(_entry, key))
            lines = [[100 * v if v and v > 0 else nan for v in line] for line in matrix]
            _curves(axes, range(len(blocks)), lines, label, colour, style)
            _blocks(axes, blocks)
        # A merge close to its plain method may drop nothing, which leaves the panels empty.
        if any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
            axes.set_yscale("log")
        axes.set_ylabel("output energy removed (%)")
    return _finish(figure, panels)


def _entry(key: str, row: Row, layer: Weight) -> float:
    return getattr(row, key)


def _interference(report: Report) -> Figure:
    groups = kinds(report)
    figure, panels = _panels(list(groups))
    for axes, layers in zip(panels, groups.values(), strict=True):
        blocks = by_block(layers)
        for key, label, colour, style in (
            ("relative_before", "before purification", WEAK, "--"),
            ("relative_after", "after purification", STRONG, "-"),
        ):
            line = [mean(getattr(one.interference, key) for one in some)
                    for some in blocks.values()]
            _curves(axes, range(len(blocks)), [line], label, colour, style)
        _blocks(axes, list(blocks))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("interference per unit\nof singular value")
    return _finish(figure, panels)


def _heat(
    figure: Figure, panels: Sequence[Axes], matrices: Sequence[Sequence[Sequence[float | None]]],
    low: float, high: float, label: str,
) -> Figure:
    """Matrices as colours, with one scale for all."""
    image = None
    for axes, matrix in zip(panels, matrices, strict=True):
        values = [[nan if v is None else v for v in row] for row in matrix]
        image = axes.imshow(values, vmin=low, vmax=high, aspect="auto", interpolation="none")
        axes.set_yticks(range(len(values)), [str(i + 1) for i in range(len(values))])
        axes.set_ylabel("model")
        axes.grid(False)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label=label)
    return figure


def _ranks(report: Report) -> Figure:
    """Kept ranks: layers across, models down."""
    groups = kinds(report)
    figure, panels = _panels(list(groups), _height(report))
    parts = [grid(report, layers, lambda row, layer: 100 * row.kept / layer.rank)
             for layers in groups.values()]
    low = min((v for matrix, _ in parts for row in matrix for v in row if v is not None),
              default=0.0)
    for axes, (_, blocks) in zip(panels, parts, strict=True):
        _blocks(axes, blocks)
    return _heat(figure, panels, [matrix for matrix, _ in parts], low, 100.0, "rank kept (%)")


def _overlap(report: Report) -> Figure:
    """Mean overlap of every two models: of their task vectors, and of what they drop."""
    overlap = report.summary.overlap
    parts = {"task vectors: output side": overlap.output,
             "task vectors: input side": overlap.input, "dropped by PAVE": overlap.dropped}
    figure, panels = _panels(
        [f"{title} (chance {part.chance or 0:.2f})" for title, part in parts.items()],
        _height(report))
    # The diagonal is left out, since a model shares everything with itself.
    matrices = [[[None if i == j else v for j, v in enumerate(row)]
                 for i, row in enumerate(part.matrix)] for part in parts.values()]
    high = max((v for matrix in matrices for row in matrix for v in row if v), default=1.0)
    for axes in panels:
        axes.set_xticks(range(len(report.models)),
                        [str(i + 1) for i in range(len(report.models))])
        axes.set_xlabel("model")
    return _heat(figure, panels, matrices, 0.0, high, "overlap")


def _covariances(report: Report) -> Figure:
    """How much data every covariance saw, and how many directions the data fill."""
    figure, (tokens, filled) = _panels(
        ["how much data", "how many directions they fill"], _height(report))
    seen = report.covariances
    numbers = [c.model + 1 for c in seen]
    tokens.plot([c.tokens_per_dimension for c in seen], numbers, "o", color=STRONG,
                markersize=3, alpha=0.4, label="one covariance")
    tokens.axvline(1, color=WEAK, linestyle="--", label="below 1: singular")
    tokens.axvline(TOKENS_PER_DIMENSION, color=MUTED, linestyle="--",
                   label=f"below {TOKENS_PER_DIMENSION:g}: noisy")
    tokens.set_xscale("log")
    tokens.set(xlabel="tokens per dimension", ylabel="model")
    ranks = [(100 * c.effective_rank / c.width, c.model + 1) for c in seen
             if c.effective_rank]
    filled.plot([x for x, _ in ranks], [y for _, y in ranks], "o", color=STRONG, markersize=3,
                alpha=0.4)
    filled.set_xlim(left=0)
    filled.set(xlabel="effective rank (% of the width)", ylabel="model")
    return _finish(figure, [tokens])


def _kept(report: Report) -> Figure:
    """What every merge keeps of every model, with intervals."""
    models = list(dict.fromkeys(kept.model for kept in report.evaluation))
    merges = list(dict.fromkeys(kept.merge for kept in report.evaluation))
    figure, (axes,) = _panels([""], 0.6 + 0.15 * len(models) * (1 + len(merges)))
    figure.set_figwidth(7)
    for number, merge in enumerate(merges):
        own = [kept for kept in report.evaluation if kept.merge == merge]
        places = [models.index(k.model) + 0.7 * (number + 0.5) / len(merges) - 0.35 for k in own]
        # A bootstrap's interval need not hold the value itself.
        ends = [[100 * max(0.0, k.value - k.low) for k in own],
                [100 * max(0.0, k.high - k.value) for k in own]]
        axes.errorbar([100 * k.value for k in own], places, xerr=ends, fmt="o", markersize=3,
                      capsize=2, label=merge)
    for place in (0, 100):
        axes.axvline(place, color=MUTED, linestyle="--")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("kept of what the expert learned (%): the base is 0, the expert 100")
    return _finish(figure, [axes])


def _height(report: Report) -> float:
    return min(1.4 + 0.2 * len(report.models), 4.4)


def kinds(report: Report) -> dict[str, Layers]:
    """The layers by kind, by name; at most `MOST_KINDS`, the largest."""
    groups: dict[str, Layers] = {}
    for layer in report.layers:
        groups.setdefault(layer.kind, []).append(layer)
    sizes = {kind: sum(layer.shape[0] * layer.shape[1] for layer in layers)
             for kind, layers in groups.items()}
    largest = sorted(sizes, key=lambda kind: sizes[kind], reverse=True)[:MOST_KINDS]
    return {kind: layers for kind, layers in groups.items() if kind in largest}


def by_model(layers: Layers) -> dict[int, list[Row]]:
    """Model number -> its rows."""
    groups: dict[int, list[Row]] = {}
    for layer in layers:
        for row in layer.models:
            groups.setdefault(row.model, []).append(row)
    return dict(sorted(groups.items()))


def by_block(layers: Layers) -> dict[str, Layers]:
    """Label of the block -> its layers, from the first to the last."""

    def number(layer: Weight) -> int:
        return -1 if layer.block is None else layer.block

    ordered = sorted(layers, key=number)
    return {"–" if block < 0 else str(block): list(group)
            for block, group in groupby(ordered, number)}


def grid(
    report: Report, layers: Layers, value: Callable[[Row, Weight], float]
) -> tuple[list[list[float | None]], list[str]]:
    """(models, blocks) means of `value(row, layer)`, and the blocks' labels."""
    groups = by_block(layers)
    cells: dict[tuple[int, str], list[float]] = {}
    for block, group in groups.items():
        for layer in group:
            for row in layer.models:
                cells.setdefault((row.model, block), []).append(value(row, layer))
    rows = [[mean(cells[n, b]) if (n, b) in cells else None for b in groups]
            for n in range(len(report.models))]
    return rows, list(groups)


def pointwise(
    combine: Callable[[Iterable[float]], float], lines: Sequence[Sequence[float]]
) -> list[float]:
    """One line from many of the same length."""
    return [combine(values) for values in zip(*lines, strict=True)]
