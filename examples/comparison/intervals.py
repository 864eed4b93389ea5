"""Paired bootstrap over rows, tasks and seeds of training.

Every draw takes the same rows, tasks and seeds for all models, so what makes a row, task or
seed hard for all of them cancels in a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# model -> [seed][task] -> scores of the rows
Scores = Mapping[str, Sequence[Sequence[np.ndarray]]]


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Bootstrap:
    """Strengths of all models: as observed, and in every draw."""

    observed: dict[str, float]
    drawn: dict[str, np.ndarray]

    def score(self, model: str) -> Interval:
        return _interval(self.observed[model], self.drawn[model])

    def difference(self, model: str, other: str) -> Interval:
        """By how much `model` is stronger than `other`, on the same draws."""
        value = self.observed[model] - self.observed[other]
        return _interval(value, self.drawn[model] - self.drawn[other])


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))


def bootstrap(
    scores: Scores,
    groups: Sequence[Sequence],
    strength: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    draws: int = 4000,
    resample_tasks: bool = True,
    seed: int = 0,
) -> Bootstrap:
    """Draw rows (whole groups of them), tasks and seeds with replacement.

    Args:
        scores: of all models, `base` and `experts` among them, on the same rows.
        groups: task -> the group of every row; rows of one group are near copies.
        strength: of mean scores `(model, base, expert)`, elementwise.
        draws: how many.
        resample_tasks: False asks about these tasks alone, not about others like them.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    seeds, tasks = len(scores["base"]), len(groups)
    rows = [_row_weights(of_task, draws, generator) for of_task in groups]
    of_seeds = _counts(draws, seeds, generator)
    of_tasks = _counts(draws, tasks, generator) if resample_tasks else np.ones((draws, tasks))

    def means(model: str) -> np.ndarray:
        """(draws + 1, seeds, tasks); the last is what was observed."""
        result = np.empty((draws + 1, seeds, tasks))
        for s, of_seed in enumerate(scores[model]):
            for t, values in enumerate(of_seed):
                result[:-1, s, t] = rows[t] @ values
                result[-1, s, t] = np.mean(values)
        return result

    base, experts = means("base"), means("experts")
    observed, drawn = {}, {}
    for model in scores:
        strengths = strength(means(model), base, experts)
        observed[model] = float(strengths[-1].mean())
        drawn[model] = np.einsum("dst,ds,dt->d", strengths[:-1], of_seeds, of_tasks)
        drawn[model] /= seeds * tasks
    return Bootstrap(observed, drawn)


def _counts(draws: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of `size` things is drawn, in every draw."""
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)


def _row_weights(groups: Sequence, draws: int, generator: np.random.Generator) -> np.ndarray:
    """(draws, rows): what every row counts for in a mean over drawn groups."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    weights = _counts(draws, member.max() + 1, generator)[:, member].astype(float)
    return weights / weights.sum(axis=1, keepdims=True)
