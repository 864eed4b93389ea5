"""The report's measures against independent dense computation."""

from __future__ import annotations

import pytest
import torch
from helpers.reports import random_basis

from mergekit_pave.report import measure
from mergekit_pave.report.survey import depths, place


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_lost_energy_is_the_error_of_the_truncated_matrix(shape):
    a = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    lost = measure.lost_energy(s)
    for r in range(len(s) + 1):
        kept = (u[:, :r] * s[:r]) @ vh[:r]
        want = (a - kept).square().sum() / a.square().sum()
        assert lost[r].item() == pytest.approx(want.item(), abs=1e-14)


def test_knee_is_where_a_direction_holds_an_average_share():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    energy = values.square() / values.square().sum()
    above = int((energy > 1 / len(values)).sum())
    assert measure.knee(measure.lost_energy(values)) == pytest.approx(above / len(values))


def test_share_holding_counts_the_directions():
    lost = measure.lost_energy(torch.tensor([10.0, 1.0, 0.1, 0.01], dtype=torch.float64))
    assert measure.share_holding(lost) == 0.25
    assert measure.share_holding(lost, 0.9999) == 0.5


def test_output_energy_is_the_mean_over_inputs():
    x = torch.randn(200, 5, dtype=torch.float64)
    w = torch.randn(4, 5, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    want = (x @ w.T).square().sum(1).mean().item()
    assert measure.output_energy(w, covariance) == pytest.approx(want)
    basis = random_basis(4, 2, 0)
    want = (x @ w.T @ basis).square().mean(0)
    torch.testing.assert_close(measure.direction_energy(basis, w, covariance), want)


def test_effective_rank_counts_equal_directions():
    basis = random_basis(9, 4, 1)
    assert measure.effective_rank(3 * basis @ basis.T) == pytest.approx(4, rel=1e-6)


def test_overlap_is_the_mean_squared_cosine():
    a, b = random_basis(9, 3, 4), random_basis(9, 3, 5)
    cosines = torch.linalg.svdvals(a.T @ b)
    assert measure.overlap(a, b) == pytest.approx(cosines.square().mean().item())
    assert measure.overlap(a, a) == pytest.approx(1)


@pytest.mark.parametrize(("name", "block", "kind"), [
    ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
    ("model.layers.3.mlp.experts.7.up_proj.weight", 3, "mlp.experts.*.up_proj"),
    ("encoder.block.1.layer.0.SelfAttention.q.weight", 1, "layer.*.SelfAttention.q"),
    ("decoder.block.1.layer.0.SelfAttention.q.weight", 1, "decoder layer.*.SelfAttention.q"),
    ("h.0.attn.c_attn.weight", 0, "attn.c_attn"),
    ("pooler.dense.weight", None, "pooler.dense"),
])
def test_names_are_sorted_into_layers_and_kinds(name, block, kind):
    assert place(name) == (block, kind)


def test_gradients_run_over_the_layers_of_each_stack():
    found = depths(["text.layers.0.a.weight", "text.layers.4.a.weight", "head.weight",
                           "vision.layers.1.a.weight", "vision.layers.2.b.weight", "one.0.c.bias"])
    assert list(found.values()) == [0, 1, 0, 0.5, 1, 1]
