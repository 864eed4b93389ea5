"""How `compress` keeps one tensor."""

from __future__ import annotations

import pytest
import torch
from helpers.compress import truncated

from mergekit_pave.algebra.tsv import kept_rank
from mergekit_pave.storage import low_rank as compressed
from mergekit_pave.storage.low_rank import pack, restore


def test_each_tensor_is_kept_in_the_cheapest_way():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    tuned = base + torch.randn(40, 30, generator=generator)
    some = base.clone()
    some[[3, 7]] = tuned[[3, 7]]

    def how(new, old, k=4):
        way, stored, _ = pack(new, old, k, torch.float32)
        if way != "factors":
            assert torch.equal(restore(way, stored, old, new.dtype), new)
        return way, sum(part.numel() for part in stored.values())

    assert how(base.clone(), base) == ("base", 0)
    assert how(some, base) == ("rows", 2 * 31)
    assert how(tuned, base) == ("factors", 4 * 71)
    assert how(tuned, base, 17) == ("whole", 1200)  # 17 * 71 numbers would be more
    assert how(tuned[:2], base[:2], 1) == ("factors", 33)
    assert how(tuned[0], base[0]) == ("whole", 30)
    assert how(tuned.reshape(4, 10, 30), base.reshape(4, 10, 30))[0] == "whole"
    assert how(tuned, None)[0] == "whole"
    assert how(torch.arange(3), torch.arange(3))[0] == "base"
    assert how(torch.arange(3), torch.arange(3) + 1)[0] == "whole"
    assert how(base.bfloat16(), base)[0] == "base"


@pytest.mark.parametrize("shape", [(32, 32), (40, 30), (30, 40), (90, 30)])
@pytest.mark.parametrize("spectrum", ["flat", "steep", "exact", "one more"])
def test_a_matrix_becomes_factors_where_all_its_triples_are_smaller(shape, spectrum, monkeypatch):
    """Whatever rank it may have; a look at a part of it only saves time."""
    generator = torch.Generator().manual_seed(0)
    most = (shape[0] * shape[1] - 1) // (sum(shape) + 1)
    full = min(shape)
    s = {"flat": torch.ones(full), "steep": torch.logspace(0, -9, full),
         "exact": (torch.arange(full) < most).double(),
         "one more": (torch.arange(full) < most + 1).double()}[spectrum]
    u, v = (torch.linalg.qr(torch.randn(n, full, generator=generator, dtype=torch.float64)).Q
            for n in shape)
    base = torch.zeros(shape, dtype=torch.float64)
    tuned = (u * s) @ v.T
    there = int((s > 1e-5).sum())
    for look in (compressed._exceeds, lambda *_: False):
        monkeypatch.setattr(compressed, "_exceeds", look)
        way, stored, _ = pack(tuned, base, full, torch.float64)
        assert way == ("factors" if there <= most else "whole")
        if way == "factors":
            assert len(stored["::s"]) == there
            assert (restore(way, stored, base, tuned.dtype) - tuned).norm() < 1e-4 * tuned.norm()


def test_full_matrices_are_not_decomposed_in_vain(monkeypatch):
    monkeypatch.setattr(compressed, "factors", None)
    generator = torch.Generator().manual_seed(0)
    tuned, base = (torch.randn(40, 40, generator=generator) for _ in range(2))
    assert pack(tuned, base, 20, torch.float32)[0] == "whole"


def test_the_shares_that_are_documented():
    for shape, share in (((768, 768), 0.25), ((3072, 768), 0.156)):
        k = kept_rank(shape, 8)
        assert k * (sum(shape) + 1) / (shape[0] * shape[1]) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_in_every_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    tuned = base + 1e-3 * torch.randn(40, 30, generator=generator)
    way, stored, energy = pack(tuned, base, 6, dtype)
    found = restore(way, stored, base, torch.float32)
    want = truncated(tuned, base, 6)
    assert stored["::u"].dtype == stored["::v"].dtype == dtype
    assert (found - want).norm() <= 2 * torch.finfo(dtype).eps * (want - base).norm() + 1e-6
    assert energy[0] / energy[1] == pytest.approx(
        ((want - base).norm() / (tuned - base).double().norm()).item() ** 2, rel=1e-6)
