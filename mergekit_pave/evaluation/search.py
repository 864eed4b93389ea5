"""Finding the best strength on a line, with few looks.

A score over strength rises to one peak and falls. Points a constant factor apart show where the
peak is; a parabola through the best of them and its neighbours, over the logarithm, says where
between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

FACTOR = 1.5
# Further points are tried, at most so many, while the best one is at the edge.
FURTHER = 3
# How many parabolas are fitted, and how close two strengths are taken for the same (a share).
REFINED, CLOSE = 2, 0.02


def line(
    value: Callable[[float], float | None], centre: float, given: float | None, points: int
) -> dict[float, float]:
    """Look for the strength at which `value` is highest.

    Args:
        value: the score at a strength; `None` when the budget is spent.
        centre: where to look first.
        given: a strength that is looked at in any case.
        points: how many around the centre.

    Returns:
        Strength -> score of everything that was looked at.
    """
    found: dict[float, float] = {}

    def look(strength: float) -> bool:
        strength = round(strength, 4)
        if strength not in found and (score := value(strength)) is not None:
            found[strength] = score
        return strength in found

    half = points // 2
    wanted = [centre * FACTOR**i for i in sorted(range(-half, points - half), key=abs)]
    for strength in ([] if given is None else [given]) + wanted:
        if not look(strength):
            return found
    for _ in range(FURTHER):
        best, places = max(found, key=found.__getitem__), sorted(found)
        if best not in (places[0], places[-1]):
            break
        if not look(best / FACTOR if best == places[0] else best * FACTOR):
            return found
    for _ in range(REFINED):
        between = peak(found)
        if between is None or any(abs(between / s - 1) < CLOSE for s in found if s):
            break
        if not look(between):
            break
    return found


def peak(found: dict[float, float]) -> float | None:
    """Where the parabola through the best strength and its neighbours is highest.

    Over `x = log s` of `(x_i, y_i)`, i = 1, 2, 3, the highest point of the one parabola through
    them; `None` where the best strength has no neighbour on one side, or all three are on a line.
    """
    places = sorted(s for s in found if s > 0)
    i = places.index(max(places, key=found.__getitem__))
    if not 0 < i < len(places) - 1:
        return None
    x, y = zip(*((math.log(s), found[s]) for s in places[i - 1 : i + 2]), strict=True)
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend >= 0:
        return None
    top = (x[0] + x[1]) / 2 - left / (2 * bend)
    return math.exp(min(max(top, x[0]), x[2]))
