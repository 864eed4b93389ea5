"""Merges repeat no factorisation, and the cache changes none of them."""

from __future__ import annotations

import os
import time

import pytest
import torch
from mergekit.merge_methods import merge_tensors

from mergekit_pave.methods import kept as module
from mergekit_pave.storage import decompositions

METHODS = {"tsv_m": {}, "regmean": {"averaging": 0.5}, "tsv_regmean": {}, "matched_regmean": {}}
CHANGED = {"tsv_m": {"flattening": 0.3, "strength": "matched", "lambda": 2.0},
           "regmean": {"flattening": 0.3, "lambda": 2.0},
           "tsv_regmean": {"flattening": 0.3, "balance": 0.2, "lambda": 2.0},
           "matched_regmean": {"lambda": 2.0}}


def weights(seed: int = 0) -> list[torch.Tensor]:
    base, *deltas = torch.randn(4, 40, 32, generator=torch.Generator().manual_seed(seed))
    return [base, *(base + 0.1 * delta for delta in deltas)]


def merged(method: str, tensors: list[torch.Tensor], **parameters) -> torch.Tensor:
    free = {} if method == "tsv_m" else {"calibration_dataset": "none"}
    return merge_tensors(tensors, method=method, base_index=0, parameters=free | parameters)


@pytest.fixture(autouse=True)
def small_ones_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_second_merge_factorises_nothing_and_is_the_same(method, monkeypatch, tmp_path):
    tensors = weights()
    monkeypatch.setenv(decompositions.ROOM, "0")
    first = merged(method, tensors, **METHODS[method])
    other = merged(method, tensors, **METHODS[method], **CHANGED[method])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.delenv(decompositions.ROOM)
    assert torch.equal(merged(method, tensors, **METHODS[method]), first)
    # Flattening is one of its own, of what is kept.
    for name in ("merged_change", "regmean", "solved"):
        for owner in ("tsv", "regmean", "matched_regmean"):
            path = f"mergekit_pave.methods.{owner}.{name}"
            monkeypatch.setattr(path, None, raising=False)
    assert torch.equal(merged(method, tensors, **METHODS[method]), first)
    assert torch.equal(merged(method, tensors, **METHODS[method], **CHANGED[method]), other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["weights", "order", "weight"])
def test_other_merges_are_told_apart(method, what):
    tensors = weights()
    first = merged(method, tensors, **METHODS[method])
    base, a, b, c = tensors
    new = {"weights": [base, a, b, c + 0.01 * a], "order": [base, b, a, c]}.get(what, tensors)
    scale = {"weight": [1.0, 2.0, 1.0]} if what == "weight" else {}
    found = merged(method, new, **METHODS[method], **scale)
    expected = 1e-4 if what == "order" else None
    gap = (found - first).norm() / (first - base).norm()
    assert gap < expected if expected else gap > 1e-3


def test_more_than_there_is_room_for_pushes_nothing_out(monkeypatch, tmp_path):
    monkeypatch.setenv(decompositions.ROOM, "8kB")  # one of these is 5 kB
    for seed in range(3):
        merged("tsv_m", weights(seed))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_what_was_not_used_for_a_day_makes_room(monkeypatch, tmp_path):
    monkeypatch.setenv(decompositions.ROOM, "8kB")
    merged("tsv_m", weights(0))
    (old,) = (tmp_path / "cache").rglob("*.safetensors")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    merged("tsv_m", weights(1))
    (new,) = (tmp_path / "cache").rglob("*.safetensors")
    assert new != old


def test_a_damaged_file_costs_time_only(tmp_path):
    first = merged("tsv_m", weights())
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    assert torch.equal(merged("tsv_m", weights()), first)
