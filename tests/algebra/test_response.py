"""Strength, evening and regression from a prior against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import readers

from mergekit_pave.algebra.response import (
    distinct,
    evening,
    matched,
    strength,
    toward,
)


def estimated(delta: torch.Tensor) -> torch.Tensor:
    """`D^T D`, what stands in for the moment of the inputs where there are no data."""
    return delta.double().mT @ delta.double()


def task_vectors(count=3, shape=(6, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * fall
            for _ in range(count)]


def answers(change, covariances):
    return sum(torch.trace(change @ c @ change.T) for c in covariances)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_strength_gives_the_answers_of_all_tasks_their_size_back(shape):
    deltas = task_vectors(shape=shape)
    covariances = [d.T @ d for d in deltas]
    merged = sum(deltas) / 3
    wanted = sum(torch.trace(d @ c @ d.T) for d, c in zip(deltas, covariances, strict=True))
    found = matched(deltas, merged)
    assert answers(found * merged, covariances) == pytest.approx(wanted.item())
    solved = toward(deltas, readers(covariances), merged)
    assert strength(solved.answer, merged, solved.moment) == pytest.approx(found)
    assert matched(deltas, 2 * merged) == pytest.approx(found / 2)


def test_one_model_and_copies_of_it_keep_their_strength():
    (delta,) = task_vectors(1)
    assert matched([delta], delta) == matched([delta] * 3, delta) == pytest.approx(1)
    assert distinct([delta]) == distinct([delta] * 4) == pytest.approx(1)
    assert evening([delta]) == pytest.approx(0)


def test_nothing_that_answers_has_strength_1():
    zero = torch.zeros(3, 4)
    assert matched([zero], zero) == matched([zero], torch.ones(3, 4)) == 1
    assert matched([torch.ones(3, 4)], zero) == 1
    assert distinct([zero, zero]) == 1


def test_distinct_counts_directions_and_not_models():
    a, b = torch.zeros(2, 4, 5, dtype=torch.float64)
    a[0, 0] = b[1, 1] = 1
    assert distinct([a, b]) == pytest.approx(2)
    assert evening([a, b]) == pytest.approx(1 - 2**-0.5)
    assert distinct([a, a, b, b]) == pytest.approx(2)
    assert distinct([a, 1e-3 * b]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_regression_is_the_closed_form(shape, ridge):
    deltas = task_vectors(shape=shape)
    prior = sum(deltas)
    covariances = [d.T @ d for d in deltas]
    g = ridge * sum(covariances).diag().mean() * torch.eye(shape[1], dtype=torch.float64)
    top = sum(d @ c for d, c in zip(deltas, covariances, strict=True)) + prior @ g
    expected = top @ torch.linalg.inv(sum(covariances) + g)
    found = toward(deltas, [lambda d=d: estimated(d) for d in deltas], prior, ridge)
    assert torch.allclose(found.delta, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.moment, sum(covariances))


def test_nothing_beats_the_regression_on_its_own_objective():
    deltas = task_vectors()
    prior, covariances = sum(deltas), [d.T @ d for d in deltas]
    g = 0.1 * sum(covariances).diag().mean()

    def loss(m):
        far = [(m - d) @ c * (m - d) for d, c in zip(deltas, covariances, strict=True)]
        return sum(f.sum() for f in far) + g * (m - prior).square().sum()

    best = toward(deltas, readers(covariances), prior).delta
    generator = torch.Generator().manual_seed(1)
    assert all(loss(best) < loss(best + 0.01 * torch.randn(6, 9, generator=generator))
               for _ in range(20))


def test_where_all_task_vectors_are_the_prior_it_stays_to_the_last_bit():
    (delta,) = task_vectors(1)
    assert torch.equal(toward([delta] * 2, readers([estimated(delta)] * 2), delta).delta, delta)


def test_unusable_covariances_are_told():
    (delta,) = task_vectors(1)
    for bad in (torch.zeros(9, 9), torch.full((9, 9), torch.inf)):
        with pytest.raises(ValueError, match="empty or not finite"):
            toward([delta], readers([bad]), delta)
