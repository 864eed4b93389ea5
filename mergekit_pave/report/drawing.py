"""Figures as small panels: inline SVG that follows the page's theme, and PNGs to take away.

A panel is drawn by a function of an axes. On the page every panel is an SVG of its own, so
that they can flow on narrow screens, and its colours are CSS variables, so that one drawing
serves a light and a dark theme. For the PNG all panels of a figure share one canvas.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_pave.errors import PaveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Light values, as PNGs have them, and the page's names for them. Blue and vermilion stay
# apart for all common kinds of colour blindness; line styles say the same again.
INK, MUTED, GRID = "#1f2430", "#5d6675", "#dfe3e8"
STRONG, WEAK = "#0868ac", "#c9510c"
MODELS = ("#0b6fb3", "#ca5a0a", "#0a8f6c", "#b4609a", "#b98203", "#4f9fd0", "#7d7d85")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", STRONG: "strong", WEAK: "weak",
              **{colour: f"m{i}" for i, colour in enumerate(MODELS)}}

_STYLE = {
    "font.family": "sans-serif", "font.size": 8, "svg.fonttype": "none",
    "svg.hashsalt": "mergekit-pave", "text.parse_math": False, "text.color": INK,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.titlesize": 8.5,
    "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": GRID, "grid.linewidth": 0.6, "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "axes.labelsize": 8, "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round", "axes.formatter.use_mathtext": False,
}

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Inches of a panel, and panels side by side in a PNG. On a phone a panel is about that wide,
# so that its text can be read there.
WIDTH, COLUMNS = 3.5, 3
# Of more lines than this only median and bands are drawn.
MOST_LINES = 8


@dataclass(frozen=True)
class Panel:
    """One small drawing.

    Attributes:
        title: what it shows that its neighbours do not.
        draw: draws on an axes.
        height: over its width.
    """

    title: str
    draw: Callable[[Axes], Any]
    height: float = 0.66


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend; `kind` is `line`, `dashed`, `dot` or `band`."""

    label: str
    colour: str
    kind: str = "line"

    @property
    def variable(self) -> str:
        return _VARIABLES[self.colour]


@dataclass(frozen=True)
class Ramp:
    """The legend of a heat map: labels of its two ends, and the colours between."""

    low: str
    high: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """A figure: panels with one legend. `name` is its PNG's."""

    name: str
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()
    ramp: Ramp | None = None


def require_matplotlib() -> None:
    """Raise `PaveError` when the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PaveError(
            "The report needs matplotlib: pip install 'mergekit-pave[report]'."
        ) from error


def ramp(low: str, high: str) -> Ramp:
    """A legend for `heat`."""
    colours = [colour_map()(i / 8) for i in range(9)]
    return Ramp(low, high, tuple(
        "#" + "".join(f"{round(255 * c):02x}" for c in colour[:3]) for colour in colours))


def colour_map() -> Any:
    """Viridis without its ends, which a dark and a light page would swallow."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    whole = colormaps["viridis"]
    return LinearSegmentedColormap.from_list("pave", [whole(0.12 + 0.83 * i / 63)
                                                      for i in range(64)])


def log_axis(
    axes: Axes, which: str, span: tuple[float, float] | None = None, percent: bool = False
) -> None:
    """Make `x` or `y` logarithmic, with few, plain labels (matplotlib's need mathematics)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    if span:
        getattr(axes, f"set_{which}lim")(*span)
    low, high = getattr(axes, f"get_{which}lim")()
    close = high < 80 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: plain(v, "%" if percent else "")))


def plain(value: float, unit: str = "") -> str:
    """`0.01`, `2·10⁻⁵`: short, and the same in every font."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}{unit}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPT)}{unit}"
    return power if mantissa == "1" else f"{mantissa}·{power}"


def ticks(axes: Axes, which: str, names: Sequence[str], most: int = 12) -> None:
    """Name the places 0, 1, ... of an axis, every so many when there are more than `most`."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, len(names))
                 if len(names) <= most * step)
    getattr(axes, f"set_{which}ticks")(range(0, len(names), every), list(names)[::every])


def svg(panel: Panel) -> str:
    """The panel as an `<svg>` element in the page's colours."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH * panel.height), layout="constrained")
        panel.draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)


def png(drawing: Drawing, path: Path) -> None:
    """All panels on one white canvas."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(drawing.panels))
    rows = math.ceil(len(drawing.panels) / columns)
    height = WIDTH * max(panel.height for panel in drawing.panels)
    with matplotlib.rc_context(_STYLE):
        figure = Figure((WIDTH * columns, height * rows + 0.45), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(drawing.panels):]:
            axes.axis("off")
        for axes, panel in zip(grid, drawing.panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title)
        lines = [Line2D([], [], color=key.colour, label=key.label, **_LINES[key.kind])
                 for key in drawing.keys]
        if lines:
            figure.legend(handles=lines, loc="outside upper left", ncols=len(lines), frameon=False)
        if drawing.ramp:
            bar = figure.colorbar(ScalarMappable(cmap=colour_map()), ax=list(grid), ticks=[0, 1],
                                  location="top", fraction=0.03, shrink=0.4, anchor=(0, 1))
            bar.ax.set_xticklabels([drawing.ramp.low, drawing.ramp.high])
        figure.savefig(path, format="png", dpi=150, facecolor="white")


_LINES: dict[str, dict[str, Any]] = {
    "line": {},
    "dashed": {"linestyle": "--"},
    "dot": {"linestyle": "", "marker": "o", "markersize": 4},
    "band": {"linewidth": 6, "alpha": 0.25},
}


def curves(
    axes: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], colour: str, *,
    dashed: bool = False,
) -> None:
    """The median of some lines over the lines themselves, thin, or over bands of many.

    The bands are from the least to the greatest, and from the 10th to the 90th percentile.
    NaN leaves a gap.
    """
    import numpy as np

    style = "--" if dashed else "-"
    values = np.array(lines, dtype=float)
    if len(lines) > MOST_LINES:
        low, tenth, middle, ninetieth, high = _percentiles(values, (0, 10, 50, 90, 100))
        for below, above in ((low, high), (tenth, ninetieth)):
            axes.fill_between(x, below, above, color=colour, alpha=0.18, linewidth=0)
    else:
        (middle,) = _percentiles(values, (50,))
        if len(lines) > 1:
            axes.plot(x, values.T, color=colour, linewidth=0.7, linestyle=style, alpha=0.65)
    axes.plot(x, middle, color=colour, linestyle=style,
              marker="o" if len(x) < 12 and not dashed else "", markersize=2.5)


def _percentiles(values: Any, places: Sequence[float]) -> Any:
    """Percentiles down the columns; NaN only where a column holds nothing else."""
    import numpy as np

    result = np.full((len(places), values.shape[1]), np.nan)
    for i, column in enumerate(values.T):
        if (seen := column[~np.isnan(column)]).size:
            result[:, i] = np.percentile(seen, places)
    return result


def heat(
    axes: Axes, matrix: Sequence[Sequence[float | None]], low: float, high: float, *,
    columns: Sequence[str], rows: Sequence[str], written: str | None = None,
) -> None:
    """A matrix as colours, and as numbers when there is room and a format for them."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in matrix], dtype=float)
    axes.imshow(values, cmap=colour_map(), vmin=low, vmax=high, aspect="auto",
                interpolation="none")
    axes.grid(False)
    ticks(axes, "x", columns)
    ticks(axes, "y", rows)
    if written is None or values.size > 60:
        return
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            dark = (value - low) / max(high - low, 1e-12) < 0.55
            axes.text(j, i, format(value, written), ha="center", va="center", fontsize=7,
                      color="#ffffff" if dark else "#101010")
