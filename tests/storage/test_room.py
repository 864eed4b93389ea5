"""The cache of decompositions: bounded, off on demand, and without an influence on any weight."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import config_of, merge
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.subspace import Tail, damped, purify, tail
from mergekit_pave.errors import PaveError
from mergekit_pave.storage import decompositions
from mergekit_pave.storage.decompositions import ROOM, remembered, room


@pytest.fixture
def some(tmp_path):
    """Keeps a tail under a name; how often it was computed."""
    computed = []

    def keep(name: str, rows: int = 100, dtype=torch.float32) -> Tail:
        def compute():
            computed.append(name)
            return Tail(torch.eye(rows, 10, dtype=torch.float64), torch.arange(10.0).double(), 7.5,
                        "direct")

        return remembered(tmp_path / "cache", name, 10, dtype, compute)

    keep.computed = computed
    decompositions._warn.cache_clear()
    return keep


def files(tmp_path) -> dict[str, int]:
    return {file.stem: file.stat().st_size for file in (tmp_path / "cache").glob("*/*")}


def test_what_was_not_used_for_longest_goes_first(tmp_path, some, monkeypatch):
    monkeypatch.setenv(ROOM, "15k")  # a tail takes a little more than 4 kB
    for moment, name in enumerate(("aa", "bb", "cc")):
        some(name)
        path = tmp_path / "cache" / name / f"{name}.safetensors"
        os.utime(path, (moment, moment))
    some("aa")  # reading is a use
    some("dd")
    assert files(tmp_path).keys() == {"aa", "cc", "dd"} and some.computed == ["aa", "bb", "cc",
                                                                              "dd"]
    assert sum(files(tmp_path).values()) <= 16_000


def test_files_of_others_are_not_taken_for_ours(tmp_path, some, monkeypatch):
    monkeypatch.setenv(ROOM, "6k")
    theirs = tmp_path / "cache" / "zz" / f"{'0' * 40}.safetensors"
    theirs.parent.mkdir(parents=True)
    save_file({"basis": torch.ones(4000)}, theirs)
    os.utime(theirs, (0, 0))
    some("aa")
    some("bb")
    assert theirs.exists()


def test_a_tail_that_is_larger_than_the_room_is_not_kept(tmp_path, some, monkeypatch):
    monkeypatch.setenv(ROOM, "6k")
    some("aa")
    some("bb", rows=1000)
    assert files(tmp_path).keys() == {"aa"}


def test_off(tmp_path, some, monkeypatch):
    some("aa")
    monkeypatch.setenv(ROOM, "0")
    some("aa")
    some("bb")
    assert some.computed == ["aa", "aa", "bb"] and files(tmp_path).keys() == {"aa"}


@pytest.mark.parametrize(("text", "size"), [
    ("", 8 * 2**30), ("0", 0), ("4GiB", 4 * 2**30), ("4 GB", 4 * 10**9), ("1.5g", 15 * 10**8),
    ("100M", 10**8), ("512kib", 2**19), ("12345", 12345), ("2Ti", 2**41)])
def test_room(monkeypatch, text, size):
    monkeypatch.setenv(ROOM, text)
    assert room() == size


@pytest.mark.parametrize("text", ["much", "-1", "4 apples", "GiB", "1e9", "9" * 400])
def test_no_room(monkeypatch, text):
    monkeypatch.setenv(ROOM, text)
    with pytest.raises(PaveError, match="must be a size such as 8GiB"):
        room()


def test_a_full_disk_is_told_once(tmp_path, some, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_pave.storage.files.os.replace", full)
    some("aa")
    some("aa")
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "No space left on device" in record.getMessage()
    assert "Decompositions are not kept" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_the_room_changes_no_weight(tmp_path, some, dtype):
    """A weight of up to float32 is purified in float32, so no digit of its directions is lost."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    rows = torch.randn(64, 32, generator=generator)
    exact = tail(weight, damped(rows.T @ rows / 64, dampening_frac=0.01), 8)
    kept = remembered(tmp_path, "ab", 8, dtype, lambda: exact)
    again = remembered(tmp_path, "ab", 8, dtype, None)
    assert kept.basis.dtype == again.basis.dtype == torch.float32
    assert torch.equal(purify(weight, exact.basis), purify(weight, again.basis))
    assert torch.equal(exact.values, again.values) and torch.equal(kept.basis, again.basis)


def test_a_float64_weight_keeps_all_digits(some):
    assert some("aa", dtype=torch.float64).basis.dtype == torch.float64
    assert some("aa", dtype=torch.float64).basis.dtype == torch.float64


def test_a_merge_is_the_same_with_and_without(families, texts, tmp_path, monkeypatch):
    paths = families("llama")
    first = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "0")
    again = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "1")
    (folder,) = (tmp_path / "cache").glob("decompositions")
    before = set(folder.rglob("*.safetensors"))
    assert before and all(load_file(f)["basis"].dtype == torch.float32 for f in before)
    monkeypatch.setenv(ROOM, "0")
    without = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "2")
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], without[n])
               for n in first)
