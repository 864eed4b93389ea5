"""The comparison's intervals against formulas and known cases."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "comparison"))

import intervals  # noqa: E402


def _own(model, base, expert):
    return model


def _bootstrap(rows, groups=None, **arguments):
    scores = {name: [[of]] for name, of in rows.items()}
    zeros = np.zeros(len(next(iter(rows.values()))))
    scores = {"base": [[zeros]], "experts": [[zeros + 1]]} | scores
    groups = [range(len(zeros))] if groups is None else [groups]
    return intervals.bootstrap(scores, groups, _own, **arguments)


def test_the_interval_of_a_mean_is_the_normal_one():
    rows = np.random.default_rng(0).normal(3, 2, 400)
    found = _bootstrap({"m": rows}, draws=20_000).score("m")
    error = rows.std() / np.sqrt(len(rows))
    assert found.value == pytest.approx(rows.mean())
    assert found.low == pytest.approx(rows.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(rows.mean() + 1.96 * error, abs=0.05 * error)


def test_a_constant_difference_has_no_width():
    rows = np.random.default_rng(0).normal(size=100)
    found = _bootstrap({"m": rows, "other": rows - 0.5}).difference("m", "other")
    assert found.as_dict() == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_near_copies_count_once():
    rows = np.random.default_rng(0).normal(size=100)
    once = _bootstrap({"m": rows}, draws=20_000).score("m")
    copied = _bootstrap({"m": rows.repeat(9)}, np.arange(100).repeat(9), draws=20_000).score("m")
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.03)
    naive = _bootstrap({"m": rows.repeat(9)}).score("m")
    assert naive.high - naive.low == pytest.approx((once.high - once.low) / 3, rel=0.1)


def test_seeds_and_tasks_are_drawn_too():
    """With rows that all say the same, their spread is all there is."""
    of_seed = [[np.full(5, float(s + 10 * t)) for t in range(4)] for s in range(3)]
    scores = {name: of_seed for name in ("base", "experts", "m")}
    groups = [range(5)] * 4
    everything = intervals.bootstrap(scores, groups, _own).drawn["m"]
    fixed = intervals.bootstrap(scores, groups, _own, resample_tasks=False).drawn["m"]
    assert fixed.std() == pytest.approx(np.std([0, 1, 2]) / np.sqrt(3), rel=0.05)
    tasks = np.std([0, 10, 20, 30]) / np.sqrt(4)
    assert everything.std() == pytest.approx(np.hypot(fixed.std(), tasks), rel=0.05)
