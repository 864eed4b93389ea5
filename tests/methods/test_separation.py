"""`purify: separate` against its objective, its limits, and through stock merges."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, merge, moment, readers, reference, spec_of, tensors_of

from mergekit_pave.algebra.separation import regmean, separate
from mergekit_pave.algebra.subspace import damped
from mergekit_pave.errors import PaveError


def by_hand(delta, own, others, strength, fraction=0.01):
    """`D C (C + mu sum C_s + e I)^-1` in float64, as it is written."""
    allowed = own.double() + strength * sum(c.double() for c in others)
    allowed += fraction * allowed.diagonal().mean() * torch.eye(len(own))
    return delta.double() @ own.double() @ torch.linalg.inv(allowed)


def test_nothing_is_better_on_its_own_objective():
    torch.manual_seed(0)
    delta, own, other = torch.randn(6, 12).double(), moment(12).double(), moment(12, seed=1)
    mu, e = 0.5, 0.02

    def loss(x):
        gap = x - delta
        return (gap @ own * gap).sum() + mu * (x @ other.double() * x).sum() + e * x.square().sum()

    best = separate(delta, own, damped(own + mu * other, regularization=e))
    assert all(loss(best) < loss(best + 0.01 * torch.randn(6, 12)) for _ in range(20))
    assert loss(best) < min(loss(delta), loss(0 * delta))


def test_inputs_of_other_subspaces_cost_nothing():
    """Tasks that read disjoint features keep their task vectors there and lose the rest."""
    torch.manual_seed(1)
    delta = torch.randn(5, 8).double()
    own, other = torch.zeros(8, 8).double(), torch.zeros(8, 8).double()
    own[:4, :4], other[4:, 4:] = moment(4), moment(4)
    kept = separate(delta, own, damped(own + other, regularization=1e-9))
    assert torch.allclose(kept[:, :4], delta[:, :4], atol=1e-5)
    assert kept[:, 4:].abs().max() < 1e-6


def test_full_strength_sums_to_regmean():
    torch.manual_seed(2)
    deltas, moments = list(torch.randn(3, 5, 9).double()), [moment(9, seed=i) for i in range(3)]
    total = damped(sum(moments), regularization=1e-9)
    merged = sum(separate(d, c, total.clone()) for d, c in zip(deltas, moments, strict=True))
    expected = regmean(deltas, readers(moments), [1.0] * 3, 1.0)
    assert (merged - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_stock_merge_separates_every_linear_layer(families, texts, tmp_path, kind):
    paths = families(kind)
    config = config_of(paths, "pave_task_arithmetic", texts, purify="separate", separation=0.4,
                       num_calibration_samples=40)
    merged = merge(config, tmp_path / "out")
    base = tensors_of(paths["base"])
    experts = [tensors_of(paths[f"expert{i}"]) for i in range(2)]
    covariances = [reference(paths[f"expert{i}"], kind, spec_of(texts[i])) for i in range(2)]
    checked = 0
    for name in base:
        deltas = [expert[name] - base[name] for expert in experts]
        expected = 0.7 * sum(deltas)
        if name in covariances[0] and "lm_head" not in name:
            plain, own = expected, [c[name] for c in covariances]
            turned = [d.T if kind == "gpt2" else d for d in deltas]
            parts = [by_hand(d, own[i], own[1 - i :][:1], 0.4) for i, d in enumerate(turned)]
            expected = 0.7 * (sum(parts).T if kind == "gpt2" else sum(parts))
            assert (expected - plain).norm() > 0.05 * plain.norm()
            checked += 1
        got = merged[name] - base[name]
        assert (got - expected).norm() < 1e-4 * max(expected.norm(), 1e-3), name
    assert checked >= 8


def test_the_default_shares_one_among_the_other_models(families, texts, tmp_path):
    paths = families("llama")
    default = config_of(paths, "pave_ties", texts, purify="separate")
    told = config_of(paths, "pave_ties", texts, purify="separate", separation=1.0)
    a, b = merge(default, tmp_path / "default"), merge(told, tmp_path / "told")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_without_weight_is_still_spared(families, texts, tmp_path):
    """Its task vector is not merged, but its inputs count against the other's."""
    paths = families("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    both = config_of(paths, "pave_task_arithmetic", texts, purify="separate")
    both["models"][1]["parameters"]["weight"] = 0.0
    alone = config_of(paths, "pave_task_arithmetic", texts, experts=1, purify="separate")
    base = tensors_of(paths["base"])[name]
    kept = (merge(both, tmp_path / "both")[name] - base).norm()
    assert kept < 0.95 * (merge(alone, tmp_path / "alone")[name] - base).norm()


def test_ratio_one_switches_it_off(families, texts, tmp_path):
    paths = families("llama")
    off = merge(config_of(paths, "pave_ties", texts, purify="separate", rank_ratio=1.0),
                tmp_path / "off")
    plain = merge(config_of(paths, "ties", texts), tmp_path / "plain")
    assert all(torch.equal(off[name], plain[name]) for name in plain)


@pytest.mark.parametrize("shared, sentence", [
    ({"purify": "seperate"}, "purify.*must be one of weight, delta, separate"),
    ({"purify": "separate", "separation": -1}, "separation.*must be 0 or more"),
    ({"purify": "separate", "rank_ratio": 0.9}, "rank_ratio.*truncates nothing"),
    ({"purify": "separate", "subspace": "svd"}, "subspace.*covariance"),
    ({"separation": 0.5}, "separation.*purify: separate"),
])
def test_what_makes_no_sense_is_refused(families, texts, tmp_path, shared, sentence):
    config = config_of(families("llama"), "pave_ties", texts, **shared)
    with pytest.raises(PaveError, match=sentence):
        merge(config, tmp_path / "out")
