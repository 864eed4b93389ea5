"""The cache of decompositions: what it spares, and that it never changes a merge."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, merge

from mergekit_pave.algebra import subspace
from mergekit_pave.algebra.subspace import Tail
from mergekit_pave.storage import decompositions as tails

F32 = torch.float32


def test_sweeps_repeat_no_decomposition(families, texts, tmp_path, monkeypatch):
    paths = families("llama")
    first = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "0")
    fresh = merge(config_of(paths, "pave_dare_ties", texts, rank_ratio=0.9), tmp_path / "1")
    monkeypatch.setattr(subspace, "tail", None)
    again = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "2")
    assert all(torch.equal(first[name], again[name]) for name in first)
    swept = merge(config_of(paths, "pave_dare_ties", texts, rank_ratio=0.9), tmp_path / "3")
    assert all(torch.equal(fresh[name], swept[name]) for name in fresh)
    with pytest.raises(TypeError):  # a longer tail has to be computed
        merge(config_of(paths, "pave_ties", texts, rank_ratio=0.7), tmp_path / "4")


def test_data_damping_and_weights_have_tails_of_their_own(families, texts, tmp_path, monkeypatch):
    paths = families("llama")
    merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "0")
    monkeypatch.setattr(subspace, "tail", None)
    for changed in (
        config_of(paths, "pave_ties", texts, rank_ratio=0.8, dampening_frac=0.5),
        config_of(paths, "pave_ties", texts[::-1], rank_ratio=0.8),
        config_of({**paths, "expert0": paths["base"], "base": paths["expert0"]}, "pave_ties",
                  texts, rank_ratio=0.8),
    ):
        with pytest.raises(TypeError):
            merge(changed, tmp_path / "1")


def test_a_few_other_values_are_another_weight():
    weight = torch.ones(40, 60)  # 2400 values, of which a sample would look at 512
    names = {tails.address("c", weight, False, "d")}
    for row in range(40):
        other = weight.clone()
        other[row, 10:20] = 2
        names.add(tails.address("c", other, False, "d"))
    assert len(names) == 41


@pytest.fixture
def tail():
    return Tail(torch.eye(5, 3), torch.arange(3.0).double(), 7.5, "direct")


def test_a_longer_tail_serves_a_shorter_one(tmp_path, tail):
    tails.remembered(tmp_path, "ab", 3, F32, lambda: tail)
    found = tails.remembered(tmp_path, "ab", 2, F32, None)
    assert torch.equal(found.basis, tail.basis[:, :2]) and found.largest == 7.5
    with pytest.raises(TypeError):
        tails.remembered(tmp_path, "ab", 4, F32, None)


@pytest.mark.parametrize("content", [b"", b"half", b"\0" * 64])
def test_a_damaged_file_is_computed_again(tmp_path, tail, content):
    tails.remembered(tmp_path, "ab", 3, F32, lambda: tail)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(content)
    assert tails.remembered(tmp_path, "ab", 3, F32, lambda: tail) is tail
    assert tails.remembered(tmp_path, "ab", 3, F32, None).route == "direct"


def test_a_flipped_bit_is_noticed(tmp_path, tail):
    tails.remembered(tmp_path, "ab", 3, F32, lambda: tail)
    (file,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert tails.remembered(tmp_path, "ab", 3, F32, lambda: tail) is tail


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, tail, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_pave.storage.files.os.replace", full)
    assert tails.remembered(tmp_path, "ab", 3, F32, lambda: tail) is tail
    assert not list(tmp_path.glob("*/*.safetensors"))
