"""One number for a merge: the share of what its experts learned that it keeps, on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.intervals import Interval, weights
from mergekit_pave.evaluation.scores import Scores
from mergekit_pave.evaluation.verdict import measure


@dataclass(frozen=True)
class Objective:
    """What candidates are compared by.

    Attributes:
        experts, bases: row scores of every task.
        names: the score that counts for each task, as `OfTask.measure` says.
    """

    experts: list[Scores]
    bases: list[Scores]
    names: list[str]

    def value(self, merge: Sequence[Scores]) -> float:
        """Mean over tasks of `(base - merge) / (base - expert)`, on the first rows that it has."""
        return float(self._means(merge, None))

    def interval(self, merge: Sequence[Scores]) -> Interval:
        """The value with its 95 % interval, by bootstrap over every task's rows."""
        low, high = np.quantile(self._means(merge, 0), (0.025, 0.975))
        return Interval(self.value(merge), float(low), float(high))

    def difference(self, merge: Sequence[Scores], other: Sequence[Scores]) -> Interval:
        """By how much `merge` is better than `other`, on the first rows that both have."""
        rows = [min(len(a[n]), len(b[n])) for a, b, n in zip(merge, other, self.names, strict=True)]
        one, two = ([{n: s[n][:r]} for s, n, r in zip(x, self.names, rows, strict=True)]
                    for x in (merge, other))
        drawn = self._means(one, 0) - self._means(two, 0)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Interval(self.value(one) - self.value(two), float(low), float(high))

    def _means(self, merge: Sequence[Scores], seed: int | None) -> np.ndarray:
        total = 0.0
        for i, name in enumerate(self.names):
            m = merge[i][name]
            b, e = self.bases[i][name], self.experts[i][name]
            # The gap is measured on all rows: on the few rows of a first look it would be noise.
            gap = b.mean() - e.mean()
            lost = b[: len(m)] - m
            rows = np.full(len(m), 1 / len(m)) if seed is None else weights(len(m), seed + i)
            share = rows @ lost / gap
            total = total + share / len(self.names)
        return np.asarray(total)


def objective(bench: Bench) -> Objective:
    """The objective of a bench.

    Raises:
        PaveError: no base, or an expert whose rows do not show what it has learned.
    """
    bases = bench.bases()
    if bases is None:
        raise PaveError("tune compares with the base model; name it with --base.")
    experts, names = bench.experts(), []
    for task, expert, base in zip(bench.tasks, experts, bases, strict=False):
        name = measure(task.kind, expert, base)
        if name is None:
            raise PaveError(
                f"{task.label} answers its held-out rows as the base does, so that nothing tells "
                "how much of it a merge keeps; name other rows with --held-out.")
        names.append(name)
    count = len(bench.tasks)
    return Objective(experts[:count], bases[:count], names)
