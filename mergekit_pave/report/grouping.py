"""The report's layers by kind, by model and by depth, for figures that stay readable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import Any

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
