"""The report as one HTML file: no script, no request, figures inline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from mergekit_pave.errors import PaveError
from mergekit_pave.report.build import TOKENS_PER_DIMENSION
from mergekit_pave.report.facts import Report
from mergekit_pave.report.figures import MOST_KINDS, MOST_LINES, figures, kinds, png, svg
from mergekit_pave.report.measure import NEARLY_ALL
from mergekit_pave.storage.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def write(report: Report, folder: Path) -> None:
    """Write `report.html`, `report.json` and `figures/*.png` into `folder`."""
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PaveError(f"Cannot create {folder}: {error.strerror}; choose another folder.") \
            from error
    made = figures(report)
    page = render(report, made)
    # NaN is not JSON; a number that is one is a mistake of ours, not something to publish.
    text = json.dumps(report.as_json(), allow_nan=False)
    write_text(folder / "report.json", text)
    for name, figure in tqdm(made.items(), desc="Drawing", unit="figure", leave=False):
        target = folder / "figures" / f"{name}.png"
        write_atomically(target, partial(png, figure))
    write_text(folder / "report.html", page)


def render(report: Report, made: Mapping[str, Figure]) -> str:
    """The page. Names in `report` are untrusted and escaped; only our own SVG is not."""
    environment = Environment(
        loader=PackageLoader("mergekit_pave.report", "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    values = report.as_json()
    images = {name: Markup(_fenced(svg(figure))) for name, figure in made.items()}
    return environment.get_template("report.html").render(
        r=values, s=values["summary"], images=images,
        number=lambda path, style="times": number(values, path, style),
        left_out=len({layer.kind for layer in report.layers}) - len(kinds(report)),
        most_kinds=MOST_KINDS, most_lines=MOST_LINES, nearly_all=NEARLY_ALL,
        enough=TOKENS_PER_DIMENSION,
    )


def _fenced(text: str) -> str:
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def number(values: Mapping[str, Any], path: str, style: str) -> Markup:
    """A number of the report, formatted, with its place in `report.json` as an attribute."""
    value: Any = values
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    if value is None:
        return Markup("–")
    return Markup('<data data-key="{}" data-style="{}" value="{}">{}</data>').format(
        path, style, repr(value), written(value, style))


def written(value: float, style: str) -> str:
    """`percent`, `change` (a signed percentage), `count` or `times` (three digits)."""
    if style == "percent":
        return f"{_digits(100 * value)}%"
    if style == "change":
        return f"{100 * value:+.1f}%".replace("-", "−")
    if style == "count":
        return f"{value:,}"
    return _digits(value)


def _digits(value: float) -> str:
    """Three significant digits without an exponent where one can do without."""
    if value != 0 and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
