"""Figures from `results.json`; each is left out when its numbers are."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"plain": "#4c6ef5", "weight": "#e8590c", "delta": "#2b8a3e", "separate": "#9c36b5",
           "per task": "#868e96"}
LABELS = {"plain": "plain", "weight": "purify: weight (the paper's)", "delta": "purify: delta",
          "separate": "purify: separate", "per task": "one model per task"}
SPACES = {"covariance": "#e8590c", "svd": "#4c6ef5", "random": "#868e96"}
AXIS = {
    "encoder": "accuracy, percent of the experts'",
    "causal": "percent of the experts' improvement kept",
}


def draw(results: dict, folder: Path) -> list[Path]:
    """All figures, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"methods": _methods(results)}
    for parent in dict.fromkeys(record["parent"] for record in results["ablations"]):
        of_parent = [r for r in results["ablations"] if r["parent"] == parent]
        kind = _form(parent) or parent
        figures[f"ratio-{kind}"] = _ratio(results, of_parent, parent)
        figures[f"samples-{kind}"] = _samples(results, of_parent, parent)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150, bbox_inches="tight")
            plt.close(figure)
    return files


def _methods(results: dict) -> plt.Figure:
    """Every method with its interval, weakest below."""
    records = [r for r in results["methods"] if "group" in r]
    records.sort(key=lambda r: r["score_these_tasks"]["value"])
    figure, axes = plt.subplots(figsize=(7, 1 + 0.28 * len(records)))
    for place, record in enumerate(records):
        _dot(axes, record["score_these_tasks"], place, COLOURS[record["group"]])
    axes.set_yticks(range(len(records)), [r["name"] for r in records])
    base = next(r for r in results["methods"] if r["name"] == "base")
    for value, label in ((base["score"]["value"], "base"), (1.0, "experts")):
        axes.axvline(100 * value, color="#adb5bd", linestyle=":", zorder=0)
        axes.annotate(label, (100 * value, 1), xycoords=("data", "axes fraction"),
                      xytext=(0, 3), textcoords="offset points", ha="center", color="#868e96")
    used = dict.fromkeys(r["group"] for r in records)
    handles = [plt.Line2D([], [], color=COLOURS[g], marker="o", label=LABELS[g]) for g in used]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2,
                  frameon=False)
    axes.set_xlabel(f"{AXIS[results['setting']]} (95 % interval over rows and seeds)")
    return _clean(figure, axes)


def _dot(axes: plt.Axes, interval: dict, place: float, colour: str) -> None:
    axes.plot([100 * interval["low"], 100 * interval["high"]], [place, place], color=colour)
    axes.plot(100 * interval["value"], place, "o", color=colour)


def _ratio(results: dict, records: list[dict], parent: str) -> plt.Figure | None:
    """Score against the kept ratio, for every way to choose the directions."""
    curves = defaultdict(list)
    for record in records:
        if record["curve"].endswith(" at ratio"):
            space = record["curve"].removesuffix(" at ratio").removeprefix("subspace ")
            curves[space].append((record["value"], record["score"]["value"]))
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for space, points in curves.items():
        ratios, scores = zip(*sorted(points), strict=True)
        axes.plot(ratios, [100 * s for s in scores], "o-", color=SPACES[space], label=space)
    _twin_line(axes, results, parent)
    axes.set_xlabel("kept fraction of the rank")
    axes.set_ylabel(AXIS[results["setting"]])
    axes.set_title(parent, fontsize=10)
    axes.legend(frameon=False)
    return _clean(figure, axes)


def _samples(results: dict, records: list[dict], parent: str) -> plt.Figure | None:
    """Score against the number of calibration rows."""
    points = sorted((r["value"], r["score"]["value"]) for r in records if r["curve"] == "samples")
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(5, 3.5))
    counts, scores = zip(*points, strict=True)
    form = _form(parent)
    axes.plot(counts, [100 * s for s in scores], "o-", color=COLOURS[form or "plain"],
              label="purified" if form else parent)
    _twin_line(axes, results, parent)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.set_xlabel("calibration rows per task")
    axes.legend(frameon=False)
    axes.set_ylabel(AXIS[results["setting"]])
    axes.set_title(parent, fontsize=10)
    return _clean(figure, axes)


def _form(method: str) -> str:
    """What a purified method purifies; nothing for another."""
    return method.partition("(")[2].rstrip(")")


def _twin_line(axes: plt.Axes, results: dict, parent: str) -> None:
    """The plain method at its own strength, on the same seed."""
    of = {record["name"]: record for record in results["methods"]}
    twin = of.get(of[parent]["twin"])
    if twin is not None:
        axes.axhline(100 * twin["first_seed"], color="#343a40", linestyle="--", linewidth=1,
                     label=twin["name"])


def _clean(figure: plt.Figure, axes: plt.Axes) -> plt.Figure:
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
