"""Task singular vectors against the paper's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make_family, merge, tensors_of
from helpers.tsv import draw, family, off, orthonormal, ours, papers_merge
from safetensors.torch import save_file

import mergekit_pave
from mergekit_pave.algebra.numeric import rounding
from mergekit_pave.algebra.polar import polar
from mergekit_pave.algebra.tsv import (
    Factors,
    factors,
    interference,
    kept_rank,
    merged_delta,
)
from mergekit_pave.errors import PaveError

mergekit_pave.register()


def papers_interference(deltas: list[np.ndarray], k: int) -> float:
    us, ss, vs = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas),
                     strict=True)
    u = np.concatenate([x[:, :k] for x in us], 1)
    v = np.concatenate([x[:k] for x in vs], 0).T
    s = np.diag(np.concatenate([x[:k] for x in ss]))
    eye = np.eye(len(s))
    return np.abs((u.T @ u - eye) @ s @ (v.T @ v - eye)).sum()


# --- algebra -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (64, 7)])
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_the_merge_is_the_papers(shape, tasks):
    base, models, deltas = family(*shape, tasks=tasks)
    want = papers_merge(deltas, min(shape) // tasks)
    found = merged_delta([factors(torch.from_numpy(d), min(shape) // tasks)
                              for d in deltas])
    assert np.linalg.norm(found.numpy() - want) <= 1e-8 * np.linalg.norm(want)
    # A float32 weight of size 1 itself is only exact to 1e-7, its delta of 0.02 to 1e-5.
    merged = ours(base.double(), [m.double() for m in models])
    assert off(merged, base, want) <= 1e-8
    assert (ours(base, models) - merged).abs().max() <= 1e-6


@pytest.mark.parametrize("last", [0.9, 1e-2, 1e-4])
def test_a_steep_spectrum_costs_no_digits_that_matter(last):
    """`s_k` from almost `s_1` to just above what counts as rounding."""
    deltas = []
    for i in range(4):
        s = torch.logspace(0, 4 * np.log10(last), 48, dtype=torch.float64)
        deltas.append((orthonormal(64, 48, i) * s @ orthonormal(48, 48, 10 + i).T).numpy())
    want = papers_merge(deltas, 12)
    found = merged_delta([factors(torch.from_numpy(d), 12) for d in deltas])
    assert np.linalg.norm(found.numpy() - want) <= 1e-8 * np.linalg.norm(want)


def test_orthogonal_tasks_are_added():
    u, v = orthonormal(12, 6, 0), orthonormal(10, 6, 1)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    deltas = [u[:, :3] * s @ v[:, :3].T, 2 * u[:, 3:] * s @ v[:, 3:].T]
    found = merged_delta([factors(d, 3) for d in deltas])
    torch.testing.assert_close(found, sum(deltas))


def test_the_order_of_the_tasks_does_not_matter():
    base, models, _ = family(20, 12)
    torch.testing.assert_close(ours(base, models), ours(base, models[::-1]))


def test_one_task_alone_comes_back():
    base, models, deltas = family(20, 12, tasks=1)
    torch.testing.assert_close(ours(base, models), models[0])
    torch.testing.assert_close(ours(base, models, rank_fraction=1.0), models[0])
    u, s, v = np.linalg.svd(deltas[0], full_matrices=False)
    half = ours(base.double(), [models[0].double()], rank_fraction=0.5)
    assert off(half, base, u[:, :6] * s[:6] @ v[:6]) < 1e-9


def test_all_directions_of_all_tasks():
    """More columns than rows: the polar factor of a wide stack has orthonormal rows."""
    base, models, deltas = family(12, 12, tasks=3)
    found = ours(base.double(), [m.double() for m in models], rank_fraction=1.0)
    assert off(found, base, papers_merge(deltas, 12)) < 1e-9


def test_more_tasks_than_rank():
    """A head of two rows and eight tasks: a share of 0 would make the merge the base."""
    base, models, deltas = family(2, 30, tasks=8)
    found = ours(base.double(), [m.double() for m in models])
    assert off(found, base, papers_merge(deltas, 1)) < 1e-9
    # No direction of the merge is stronger than the sum of what went into it.
    assert np.linalg.norm(found.numpy() - base.double().numpy(), 2) <= sum(
        np.linalg.norm(d, 2) for d in deltas)


def test_polar_of_dependent_columns():
    x = orthonormal(9, 3, 0)
    twice = polar(torch.cat([x, x], 1))
    torch.testing.assert_close(twice, torch.cat([x, x], 1) / 2**0.5)
    spectrum = torch.linalg.svdvals(polar(torch.cat([x, x @ x[:3, :3], draw(9, 2)], 1)))
    assert all(min(abs(s), abs(s - 1)) < 1e-9 for s in spectrum.tolist())


@pytest.mark.parametrize("second", [1.0, 3.0, 1 + 1e-9])
def test_tasks_with_the_same_directions_are_averaged(second):
    delta = orthonormal(16, 4, 0) * torch.tensor([4.0, 3, 2, 1]) @ orthonormal(12, 4, 1).T
    found = merged_delta([factors(scale * delta, 4) for scale in (1.0, second)])
    torch.testing.assert_close(found, (1 + second) / 2 * delta)


def test_what_is_only_rounding_turns_nothing_aside():
    """A merged adapter has rank 2; the rest of its delta is the rounding of the sum."""
    base = draw(48, 32, seed=9, scale=0.5)
    deltas = [draw(48, 2, seed=i) @ draw(2, 32, seed=10 + i, scale=1.0) for i in range(2)]
    exact = papers_merge([d.double().numpy() for d in deltas], 2)
    rounded = [base + d for d in deltas]
    part = factors(rounded[0] - base, 16)
    assert len(part.s) == 2 and part.u.shape == (48, 2) and part.v.shape == (32, 2)
    assert off(ours(base, rounded), base, exact) < 1e-5


def _in_float32(weight, deltas):
    return [(weight + delta.float()).double() - weight.double() for delta in deltas]


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_rounding_of_the_weights_is_no_direction(size):
    """Truncated task vectors, and adapters, stored in float32: small beside their weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 192, generator=generator)
    deltas = []
    for rank in (20, 48, 76):
        part = torch.randn(192, rank, generator=generator).double() @ torch.randn(
            rank, 192, generator=generator).double()
        deltas.append(part / part.norm() * weight.norm() * size)
    expected = merged_delta([factors(delta, 64) for delta in deltas])
    parts = [factors(delta, 64, rounding(weight)) for delta in _in_float32(weight, deltas)]
    assert [len(part.s) for part in parts] == [20, 48, 64]
    assert (merged_delta(parts) - expected).norm() < 1e-5 / size * expected.norm()
    models = [(weight.double() + delta).float() for delta in deltas]
    found = ours(weight.double(), [m.double() for m in models]) - weight.double()
    assert (found - expected).norm() < 2e-5 / size * expected.norm()


@pytest.mark.parametrize("size", [1e-1, 1e-2])
def test_directions_that_tasks_share_stay_shared_in_float32(size):
    """Adapters with one frozen A: nothing may leave its row space."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    a = torch.randn(16, 128, generator=generator).double()
    deltas = [torch.randn(128, 16, generator=generator).double() @ a for _ in range(2)]
    deltas = [delta / delta.norm() * weight.norm() * size for delta in deltas]
    expected = merged_delta([factors(delta, 16) for delta in deltas])
    found = merged_delta([
        factors(delta, 64, rounding(weight)) for delta in _in_float32(weight, deltas)])
    assert (found - found @ torch.linalg.pinv(a) @ a).norm() < 1e-3 * found.norm()
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(64, 64), (48, 32), (32, 48)])
def test_a_change_of_one_rounding_is_none(shape):
    base = draw(*shape)
    nudged = base.clone()
    nudged[3, 4] = torch.nextafter(nudged[3, 4], torch.tensor(9.0))
    assert not torch.equal(base, nudged)
    assert torch.equal(ours(base, [nudged]), base)
    changed = base + draw(*shape, seed=1)
    alone = ours(base, [changed], rank_fraction=0.5)
    torch.testing.assert_close(ours(base, [nudged, changed], rank_fraction=0.5), alone)


@pytest.mark.parametrize("method", ["tsv_m", "regmean", "tsv_regmean", "pave_regmean",
                                    "pave_tsv_m", "matched_regmean"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_broken_weights_outside_linear_layers_are_named(tmp_path, method, name):
    paths = make_family(tmp_path, "llama")
    state = tensors_of(paths["expert1"])
    state[name].view(-1)[5] = float("nan")
    save_file(state, paths["expert1"] / "model.safetensors", metadata={"format": "pt"})
    shared = {} if method == "tsv_m" else {"calibration_dataset": "none"}
    config = {"merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
              "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)],
              "parameters": shared}
    with pytest.raises(PaveError, match=f"{name} of .*expert1 holds NaN or Inf"):
        merge(config, tmp_path / "out")


def test_factors_are_the_leading_triples():
    for shape in ((9, 14), (14, 9)):
        delta = draw(*shape)
        found = factors(delta, 4)
        u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        assert np.allclose(found.s, s[:4])
        assert np.allclose((found.u * found.s @ found.v.T).numpy(), u[:, :4] * s[:4] @ vt[:4])
        torch.testing.assert_close(found.u.T @ found.u, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(found.v.T @ found.v, torch.eye(4, dtype=torch.float64))
    nothing = factors(torch.zeros(5, 3), 2)
    assert nothing.u.shape == (5, 0) and nothing.v.shape == (3, 0) and not len(nothing.s)


@pytest.mark.parametrize(("shape", "tasks", "fraction", "count"), [
    ((768, 768), 8, None, 96), ((3072, 768), 8, None, 96), ((768, 768), 5, None, 153),
    ((49, 49), 49, None, 1), ((49, 60), 1, 1 / 49, 1), ((2, 768), 8, None, 1),
    ((768, 768), 8, 0.5, 384), ((10, 10), 3, 0.29, 2), ((10, 10), 3, 0.01, 1),
    ((768, 768), 3, 0.1 + 0.2, 230), ((10, 10), 1, 0.7, 7),
])
def test_kept_rank(shape, tasks, fraction, count):
    assert kept_rank(shape, tasks, fraction) == count


# --- interference --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "tasks", "fraction", "k"), [
    ((6, 5), 2, None, 2), ((5, 9), 3, None, 1), ((12, 12), 3, 0.5, 6), ((4, 4), 2, 1.0, 4),
])
def test_interference_is_the_published_formula(shape, tasks, fraction, k):
    deltas = [draw(*shape, seed=i) for i in range(tasks)]
    want = papers_interference([d.double().numpy() for d in deltas], k)
    assert kept_rank(shape, tasks, fraction) == k
    value, relative = interference([factors(d, k) for d in deltas])
    assert value == pytest.approx(want, rel=1e-9)
    total = sum(np.linalg.svd(d.double(), compute_uv=False)[:k].sum() for d in deltas)
    assert (value, relative) == pytest.approx((want, want / total), rel=1e-6)


def test_orthogonal_tasks_do_not_interfere():
    u, v = orthonormal(8, 4, 2), orthonormal(7, 4, 3)
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    parts = [Factors(u[:, i:i + 2], s, v[:, i:i + 2]) for i in (0, 2)]
    assert interference(parts)[0] == pytest.approx(0, abs=1e-12)
    assert interference([parts[0], parts[0]])[0] > 1
    deltas = [p.u * s @ p.v.T for p in parts]
    assert interference([factors(d, 2) for d in deltas])[0] < 1e-9
