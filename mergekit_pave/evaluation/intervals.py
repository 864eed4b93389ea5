"""Intervals by bootstrap over rows.

Every draw takes the same rows for all models, so what makes a row hard for all of them cancels
in a difference or a ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def weights(rows: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """`(draws, rows)` float64: what each row counts for in the mean of one draw."""
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=draws)
    return counts / rows


def interval(
    statistic: Callable[..., np.ndarray], scores: Sequence[np.ndarray], seed: int = 0
) -> Interval:
    """`statistic` of the mean scores, with its 95 % interval.

    Args:
        statistic: of one mean for each member of `scores`, elementwise over draws.
        scores: `(rows,)` each, of the same rows.
        seed: of the draws.
    """
    values = [np.asarray(score, dtype=float) for score in scores]
    drawn = weights(len(values[0]), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*(score.mean() for score in values)))
        spread = statistic(*(drawn @ score for score in values))
    low, high = np.nanquantile(spread, (0.025, 0.975))
    return Interval(value, float(low), float(high))
