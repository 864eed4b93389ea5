"""Tuning on validation rows: every method gets the same number of merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods import Method

BUDGET = 6  # merges for each method

Objective = Callable[[float | None, float | None], float]  # of strength and ratio; higher is better


@dataclass(frozen=True)
class Tuned:
    """The best setting found, its value, and everything that was tried."""

    strength: float | None
    ratio: float | None
    value: float
    tried: tuple[tuple[float | None, float | None, float], ...]


def tune(method: Method, objective: Objective, quick: bool = False) -> Tuned:
    """Strength at the first ratio, then the ratio at the best strength."""
    tried: dict[tuple[float | None, float | None], float] = {}

    def value(strength: float | None, ratio: float | None) -> float:
        if (strength, ratio) not in tried:
            tried[strength, ratio] = objective(strength, ratio)
        return tried[strength, ratio]

    strengths, ratios = method.strengths, method.ratios
    if quick:
        strengths, ratios = strengths[1:4:2], ratios[:2]
    first = ratios[0] if ratios else None
    if not strengths:
        strength = None
    elif ratios:
        strength = peak(strengths, lambda s: value(s, first), quick)
    else:
        strength = line(strengths, lambda s: value(s, first), quick)
    for ratio in ratios or (None,):
        value(strength, ratio)
    best = max(tried, key=tried.__getitem__)
    trials = tuple((*point, result) for point, result in tried.items())
    return Tuned(*best, tried[best], trials)


def line(grid: tuple[float, ...], value: Callable[[float], float], quick: bool) -> float:
    """Every point of the grid, then one halfway between the best and its better neighbour."""
    values = {point: value(point) for point in grid}
    best = max(values, key=values.__getitem__)
    place = grid.index(best)
    beside = [grid[i] for i in (place - 1, place + 1) if 0 <= i < len(grid)]
    if beside and not quick:
        between = round((best + max(beside, key=values.__getitem__)) / 2, 4)
        values[between] = value(between)
    return max(values, key=values.__getitem__)


def peak(grid: tuple[float, ...], value: Callable[[float], float], quick: bool) -> float:
    """Every second point, then both neighbours of the best: all of a curve with one peak."""
    values = {point: value(point) for point in (grid if quick else grid[1::2])}
    place = grid.index(max(values, key=values.__getitem__))
    if not quick:
        for i in (place - 1, place + 1):
            values[grid[i]] = value(grid[i])
    return max(values, key=values.__getitem__)
