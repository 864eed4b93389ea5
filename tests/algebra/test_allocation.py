from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_pave.algebra.allocation import allocate, cap

ratios = st.one_of(st.floats(0.01, 1), st.sampled_from([0.5, 0.75, 0.875, 0.9, 0.98, 1.0]))


@st.composite
def pools(draw):
    """(ascending normalised spectra, R, rank_ratio), small enough for brute force."""
    rank, models = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    # Few distinct values, so that ties are common.
    value = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0])
    spectrum = st.lists(value, min_size=rank, max_size=rank).map(sorted)
    spectra = draw(st.lists(spectrum, min_size=models, max_size=models))
    return [torch.tensor(x, dtype=torch.float64) for x in spectra], rank, draw(ratios)


def cost(spectra, drops):
    return sum((s[:d] ** 2).sum().item() for s, d in zip(spectra, drops, strict=True))


@settings(deadline=None)
@given(pools())
def test_no_feasible_choice_is_cheaper(pool):
    spectra, rank, ratio = pool
    drops = allocate(spectra, rank, ratio)
    most = cap(rank, ratio)
    choices = [c for c in product(range(most + 1), repeat=len(spectra)) if sum(c) == sum(drops)]
    assert max(drops) <= most
    assert cost(spectra, drops) <= min(cost(spectra, c) for c in choices) + 1e-12


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 12), ratios)
def test_the_budget_is_met_exactly_and_the_last_component_stays(rank, models, ratio):
    most = cap(rank, ratio)
    spectrum = torch.linspace(0, 1, rank, dtype=torch.float64)[:most]
    drops = allocate([spectrum] * models, rank, ratio)
    budget = (1 - ratio) * rank * models
    assert abs(sum(drops) - budget) <= 0.5 + 1e-6 or sum(drops) == models * (rank - 1)
    assert all(0 <= d <= rank - 1 for d in drops)
    assert max(drops) - min(drops) <= 1, "equal spectra lose equally"


@pytest.mark.parametrize(
    "rank, ratio, most",
    [(768, 0.98, 23), (768, 0.984375, 18), (4096, 4089 / 4096, 11), (768, 1.0, 0), (1, 0.1, 0),
     (4, 0.01, 3), (8, 0.99, 1), (10, 0.9, 2)],
)  # fmt: skip
def test_cap(rank, ratio, most):
    assert cap(rank, ratio) == most


def test_the_paper_s_budget_without_its_extra_component():
    drops = allocate([torch.zeros(cap(768, 0.984375))] * 8, 768, 0.984375)
    assert sum(drops) == 8 * 768 - 6048


def test_the_model_with_the_smallest_values_pays_up_to_its_cap():
    cheap, dear = torch.linspace(0, 0.1, 15), torch.linspace(0.5, 1, 15)
    assert allocate([dear, cheap], 100, 0.9) == [5, 15]


def test_a_layer_too_small_for_half_a_component_keeps_everything():
    assert allocate([torch.zeros(1)], 8, 0.98) == [0]
    assert allocate([torch.zeros(1)] * 8, 8, 0.98) == [1, 0, 0, 0, 0, 0, 0, 0]


def test_uniform_cuts_alike_whatever_the_spectra():
    assert allocate([torch.zeros(0)] * 3, 768, 0.98, "uniform") == [15, 15, 15]
    assert allocate([torch.zeros(0)] * 2, [768, 4], 0.98, "uniform") == [15, 0]
    assert allocate([torch.zeros(0)], 4, 0.01, "uniform") == [3]


def test_models_of_different_rank_share_one_budget():
    assert allocate([torch.ones(15), torch.zeros(30)], [100, 200], 0.9) == [0, 30]


@pytest.mark.parametrize(
    "spectra, ranks, ratio, method, message",
    [
        ([torch.zeros(9)], 10, 0.0, "spectral", "rank_ratio"),
        ([torch.zeros(9)], 10, 1.1, "uniform", "rank_ratio"),
        ([torch.zeros(9)], 10, 0.5, "fair", "method"),
        ([torch.zeros(9)], [10, 10], 0.5, "spectral", "1 spectra but 2"),
        ([torch.zeros(2)], 10, 0.5, "spectral", "offers 2 values; 8"),
        ([torch.linspace(1, 0, 9)], 10, 0.5, "spectral", "ascending"),
        ([torch.full((9,), torch.nan)], 10, 0.5, "spectral", "NaN"),
    ],
)
def test_misuse(spectra, ranks, ratio, method, message):
    with pytest.raises(ValueError, match=message):
        allocate(spectra, ranks, ratio, method)


@settings(max_examples=25, deadline=None)
@given(pools())
def test_order_of_models_does_not_change_the_cost(pool):
    spectra, rank, ratio = pool
    forward = cost(spectra, allocate(spectra, rank, ratio))
    backward = cost(spectra[::-1], allocate(spectra[::-1], rank, ratio))
    assert forward == pytest.approx(backward)
