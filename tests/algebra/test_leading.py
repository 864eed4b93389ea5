"""TSV-Merge in float32: as exact as SVDs in float32 are, and float64 where that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_pave.algebra import tsv
from mergekit_pave.algebra.leading import gram_eigh, leading, strongest
from mergekit_pave.algebra.polar import polar, single_polar
from mergekit_pave.algebra.separation import flattened

SPECTRA = ("flat", "power", "spikes", "steep")


def basis(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator).double()).Q


def spectrum(kind: str, rank: int, kept: int) -> torch.Tensor:
    i = torch.arange(rank).double()
    return {
        "flat": 1 - 0.5 * i / rank,
        "power": (i + 1) ** -0.7,
        "spikes": torch.cat([torch.tensor([100.0, 50, 20, 10, 10]).double(),
                             1 - 0.5 * i[5:] / rank]),
        "steep": 10 ** (-4 * i / rank),
        "cluster": torch.where(i < kept + 5, torch.where(i < kept - 5, 2.0, 1 - 1e-5 * i), 0.5),
    }[kind]


def changes(shape, tasks: int, kind: str, seed: int = 0) -> list[torch.Tensor]:
    """Task vectors in float32 with one spectrum and directions drawn anew."""
    generator, rank = torch.Generator().manual_seed(seed), min(shape)
    s = spectrum(kind, rank, rank // tasks)
    return [(basis(shape[0], rank, generator) * s @ basis(shape[1], rank, generator).T).float()
            for _ in range(tasks)]


def published(deltas: list[torch.Tensor], kept: int) -> torch.Tensor:
    """The paper's procedure by SVDs in the deltas' own precision."""
    def whitened(x: torch.Tensor) -> torch.Tensor:
        p, _, qt = torch.linalg.svd(x, full_matrices=False)
        return p @ qt

    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = whitened(torch.cat([p.U[:, :kept] for p in parts], 1))
    v = whitened(torch.cat([p.Vh[:kept] for p in parts]))
    return u * torch.cat([p.S[:kept] for p in parts]) @ v


def error(found: torch.Tensor, truth) -> float:
    truth = torch.as_tensor(truth)
    return ((found.double() - truth).norm() / truth.norm()).item()


def merged(deltas, kept: int, weights=None) -> torch.Tensor:
    return tsv.merged_change(
        torch.zeros_like(deltas[0]), deltas, weights or [1.0] * len(deltas), kept)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("shape", [(288, 288), (520, 264), (264, 520)])
def test_as_exact_as_svds_in_float32(shape, tasks, kind):
    deltas, kept = changes(shape, tasks, kind), min(shape) // tasks
    truth = published([d.double() for d in deltas], kept)
    found = merged(deltas, kept)
    assert error(found, truth) < 1.5 * error(published(deltas, kept), truth)
    # The squares of what two or three tasks keep of the steep one are too far apart for float32.
    assert (found.dtype == torch.float64) == (kind == "steep" and tasks < 8)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_a_cluster_at_the_cut(tasks):
    """Ten singular values 1e-5 apart, five kept: an SVD in float32 loses three digits there."""
    deltas, kept = changes((288, 288), tasks, "cluster"), 288 // tasks
    truth = published([d.double() for d in deltas], kept)
    assert error(merged(deltas, kept), truth) < error(published(deltas, kept), truth) / 2


def test_orthonormal_bases_of_the_leading_part():
    for delta in changes((300, 260), 1, "power") + changes((260, 300), 1, "spikes"):
        part = leading(delta, 80)
        u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        best = u[:, :80] * s[:80] @ vt[:80]
        assert error(part.u @ part.core @ part.v.T, best) < 2e-6
        for side in (part.u, part.v):
            gap = side.double().T @ side.double() - torch.eye(80)
            assert gap.abs().max() < 2e-6


@pytest.mark.parametrize("second", [1.0, 3.0, 0.1])
@pytest.mark.parametrize("kept", [128, 40])
def test_one_task_twice_is_averaged(second, kept):
    """All directions coincide: what float32 cannot tell apart is computed in float64."""
    delta = changes((256, 256), 1, "flat")[0]
    u, s, vt = np.linalg.svd(delta.double().numpy())
    best = u[:, :kept] * s[:kept] @ vt[:kept]
    found = merged([delta, delta], kept, [1.0, second])
    assert error(found, (1 + second) / 2 * best) < 1e-6


def test_a_direction_in_common_among_others():
    """One direction of two tasks is the same, all else is not."""
    generator = torch.Generator().manual_seed(3)
    s = spectrum("flat", 256, 128)
    deltas = []
    first_u, first_v = basis(256, 1, generator), basis(256, 1, generator)
    for _ in range(2):
        u = torch.linalg.qr(torch.cat([first_u, basis(256, 255, generator)], 1)).Q
        v = torch.linalg.qr(torch.cat([first_v, basis(256, 255, generator)], 1)).Q
        u[:, :1], v[:, :1] = first_u, first_v
        deltas.append((u * s @ v.T).float())
    found = merged(deltas, 100)
    strength = (first_u.T @ found.double() @ first_v).item()
    assert strength == pytest.approx(1, abs=1e-3)  # not 2: shared, not added up
    exact = tsv.merged_delta([tsv.factors(d, 100) for d in deltas])
    assert error(found, exact) < 1e-5


@pytest.mark.parametrize("shape", [(300, 260), (260, 300)])
def test_the_order_of_large_tasks_does_not_matter(shape):
    deltas = changes(shape, 3, "power")
    assert error(merged(deltas, 80), merged(deltas[::-1], 80).double()) < 2e-5


@pytest.mark.parametrize("shape", [(300, 260), (260, 300)])
@pytest.mark.parametrize("rank", [4, 40])
def test_large_adapters(shape, rank):
    """All there is to find is found by a block of few columns; their rounding is no direction."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    deltas = [torch.randn(shape[0], rank, generator=generator).double()
              @ torch.randn(rank, shape[1], generator=generator).double() for _ in range(3)]
    deltas = [0.01 * d / d.norm() * base.norm() for d in deltas]
    truth = published(deltas, rank)
    tuned = [base + d.float() for d in deltas]
    found = tsv.merged_change(base, tuned, [1.0] * 3, 86)
    assert error(found, truth) < 1e-3
    exact = tsv.factors(deltas[0], 86)
    u, s, vt = np.linalg.svd(deltas[0].numpy(), full_matrices=False)
    assert len(exact.s) == rank and np.allclose(exact.s, s[:rank])
    assert error(exact.u * exact.s @ exact.v.T, deltas[0]) < 1e-9
    few = tsv.factors(deltas[0], 3)
    assert error(few.u * few.s @ few.v.T, u[:, :3] * s[:3] @ vt[:3]) < 1e-9


def test_a_large_change_that_is_rounding_is_none():
    base = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    nudged = base.clone()
    nudged[3, 4] = torch.nextafter(nudged[3, 4], torch.tensor(9.0))
    tuned = base + 0.01 * changes((256, 256), 1, "flat")[0]
    assert not tsv.merged_change(base, [nudged], [1.0], 128).any()
    alone = tsv.merged_change(base, [tuned], [1.0], 128)
    both = tsv.merged_change(base, [nudged, tuned], [1.0, 1.0], 128)
    assert error(both, alone.double()) < 1e-5


@pytest.mark.parametrize("shares", [[130, 130], [80, 100, 70], [32] * 8])
def test_polar_factors_in_float32(shares):
    generator = torch.Generator().manual_seed(1)
    blocks = [basis(260, share, generator).float() for share in shares]
    p, s, qt = np.linalg.svd(torch.cat(blocks, 1).double().numpy(), full_matrices=False)
    assert s[-1] < 0.1
    found = single_polar(blocks)
    assert error(found, p @ qt) < 5e-6
    assert error(polar(torch.cat(blocks, 1).double()), p @ qt) < 1e-9
    assert single_polar([*blocks[:-1], blocks[0]]) is None


def test_more_columns_than_rows_are_left_to_float64():
    deltas = changes((256, 256), 3, "flat")
    found = merged(deltas, 200)
    assert error(found, published([d.double() for d in deltas], 200)) < 1e-7


def test_squares_and_the_strongest_directions():
    delta = changes((310, 290), 1, "power")[0].double()
    values, vectors = gram_eigh(delta)
    torch.testing.assert_close(vectors * values @ vectors.T, delta.T @ delta)
    block = strongest(delta, 20)
    s = torch.linalg.svdvals(delta)
    assert torch.allclose(block.values[:6], s[:6], rtol=1e-5)
    torch.testing.assert_close(block.images, delta @ block.v)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("last", [1e-2, 1e-4, 1e-7])
def test_flattening_is_the_svds(shape, power, last):
    generator, rank = torch.Generator().manual_seed(0), min(shape)
    s = torch.logspace(0, float(np.log10(last)), rank, dtype=torch.float64)
    delta = basis(shape[0], rank, generator) * s @ basis(shape[1], rank, generator).T
    u, s, vt = np.linalg.svd(delta.numpy(), full_matrices=False)
    powers = s ** (1 - power)
    assert error(flattened(delta, power), u * (powers * s.mean() / powers.mean()) @ vt) < 1e-7
    noise = 0.3 * s[0]
    strong = np.where(s > noise, s, 0)
    powers = np.where(s > noise, s ** (1 - power), 0)
    wanted = u * (powers * strong.mean() / powers.mean()) @ vt
    assert error(flattened(delta, power, noise), wanted) < 1e-9


def test_one_tiny_singular_value_costs_no_second_decomposition(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    s = torch.logspace(0, -3, 40, dtype=torch.float64)
    s[-1] = 3e-7
    u, v = basis(60, 40, generator), basis(40, 40, generator)
    monkeypatch.delattr(torch.linalg, "svd")
    wanted = u * (s.sqrt() * s.mean() / s.sqrt().mean()) @ v.T
    assert error(flattened(u * s @ v.T, 0.5), wanted.numpy()) < 1e-7
