"""Folding, fingerprints and the store's refusal of anything incomplete or foreign."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import ABOUT, add_window, cached_repository, mean_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.second_moment import SecondMoment, fold, unfold
from mergekit_pave.calibration.stores import fetch_store
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.storage.covariances import (
    FINGERPRINTS,
    MANIFEST,
    CovarianceStore,
    StoreWriter,
    Weight,
)
from mergekit_pave.storage.identity import LENGTH, fingerprint, same, same_layer


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_folding_keeps_every_entry_in_half_the_space(n, seed):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    matrix = matrix + matrix.T
    folded = fold(matrix)
    assert folded.shape == ((n + 1) // 2, n + 1)
    assert torch.equal(unfold(folded), matrix)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64]))
def test_streamed_moments_equal_the_moment_of_all_rows(sizes, dtype):
    generator = torch.Generator().manual_seed(sum(sizes))
    chunks = [torch.randn(n, 2, 5, generator=generator).to(dtype) for n in sizes]
    moment = SecondMoment(5)
    for chunk in chunks:
        moment.add(chunk)
    rows = torch.cat(chunks).reshape(-1, 5).double()
    assert moment.count == len(rows) and moment.sum.dtype != torch.bfloat16
    expected = rows.T @ rows / len(rows)
    mean = mean_of(moment)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mean, mean.T)


def test_an_empty_moment_has_no_sum():
    with pytest.raises(ValueError, match="at least one row"):
        _ = SecondMoment(3).total


@pytest.mark.parametrize("shape", [(3,), (512,), (513,), (64, 64), (7, 1000), (5, 5, 50)])
def test_fingerprints_survive_casts_and_notice_changes(shape):
    tensor = torch.randn(shape)
    kept = fingerprint(tensor)
    assert kept.shape == (LENGTH,)
    assert same(fingerprint(tensor.clone()), kept, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        cast = fingerprint(tensor.to(dtype))
        assert same(cast, kept, torch.float32, dtype) and same(kept, cast, dtype, torch.float32)
        assert tensor.numel() < 3 or not same(cast, kept, torch.float32)
    assert not same(fingerprint(tensor * 1.001), kept, torch.float32)
    assert not same(fingerprint(tensor.flip(0)), kept, torch.float32)


def entry(name: str, tensor: torch.Tensor):
    return Weight(name, tuple(tensor.shape), False, "float32"), fingerprint(tensor)


@pytest.fixture
def store(tmp_path):
    torch.manual_seed(0)
    weights = {f"model.layers.{i}.up.weight": torch.randn(6, 4) for i in range(3)}
    writer = StoreWriter(tmp_path / "store", "run")
    for name in weights:
        add_window(writer, {name: (torch.eye(4) * len(writer.sites), 7)})
    made = writer.finish({n: entry(n, w) for n, w in weights.items()}, {"a.weight": "why"}, ABOUT)
    made.originals = weights
    return made


def test_a_store_gives_back_what_was_written(store):
    again = CovarianceStore(store.folder)
    assert again.skipped == {"a.weight": "why"}
    for i, name in enumerate(store.originals):
        assert torch.equal(again.covariance(name), torch.eye(4) * i)
        assert again.sites[name].count == 7


def test_values_decide_which_layer_it_is(store):
    first, second, third = store.originals
    w = store.originals
    assert store.find(first, w[first]) == first
    assert store.find(first, w[third]) == third  # a slice renamed it
    assert store.find("transformer." + second, w[second]) == second
    assert store.find(None, w[second].to(torch.bfloat16)) == second
    assert store.find(first, torch.randn(6, 4)) is None
    assert store.find(first, w[first].T) is None


@pytest.mark.parametrize(("a", "b", "same"), [
    ("model.layers.0.mlp.up.weight", "layers.0.mlp.up.weight", True),
    # Mistral3 and Gemma3, then Qwen2-VL: the class's name, the checkpoint's.
    ("model.language_model.layers.0.mlp.up.weight",
     "language_model.model.layers.0.mlp.up.weight", True),
    ("model.language_model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.weight", True),
    ("model.language_model.layers.*.mlp.up.weight", "model.layers.*.mlp.up.weight", True),
    ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight", True),
    ("model.language_model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", False),
    ("model.vision_tower.layers.0.mlp.up.weight",
     "language_model.model.layers.0.mlp.up.weight", False),
    ("encoder.block.0.layer.0.q.weight", "decoder.block.0.layer.0.q.weight", False),
    ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight", False),
    ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.gate.weight", False),
    ("lm_head.weight", "model.embed_tokens.weight", False),
])
def test_names_of_one_tensor(a, b, same):
    assert same_layer(a, b) is same and same_layer(b, a) is same


def test_rounded_weights_are_known_once_their_checkpoint_is(store):
    rounded = {name: w.to(torch.bfloat16) for name, w in store.originals.items()}
    first = next(iter(rounded))
    widened = rounded[first].float()
    assert store.find(first, widened) is None
    store.verify(iter(rounded.items()), "mine")
    assert store.find(first, widened) == first
    assert store.find(first, widened + 1e-3) is None


def test_other_weights_are_refused_when_opened(store):
    store.verify(iter(store.originals.items()), "mine")
    first = store.originals["model.layers.0.up.weight"]
    store.verify(iter([("layers.0.up.weight", first)]), "mine")
    with pytest.raises(PaveError, match="no weight in common with mine"):
        store.verify(iter([("other.weight", torch.randn(6, 4))]), "mine")
    changed = {n: w + 1e-3 * (i == 1) for i, (n, w) in enumerate(store.originals.items())}
    with pytest.raises(PaveError, match=r"other weights than those of mine .*layers\.1\.up"):
        store.verify(iter(changed.items()), "mine")


def test_a_folder_without_manifest_is_no_store(store):
    (store.folder / MANIFEST).unlink()
    with pytest.raises(PaveError, match="has no manifest.json"):
        CovarianceStore(store.folder)


def test_whose_a_store_is_can_be_told_without_its_covariances(store, tmp_path):
    """In the Hub's cache there is what `check` has downloaded."""
    snapshot = cached_repository(tmp_path / "hub" / "datasets--me--store")
    for name in (MANIFEST, FINGERPRINTS):
        shutil.copy(store.folder / name, snapshot)
    options = LoaderOptions(cache_dir=str(tmp_path / "hub"))
    assert fetch_store("me/store", options, covariances=False).weights == store.weights
    with pytest.raises(PaveError, match="damaged"):
        fetch_store("me/store", options)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", '{"kind": "other"}'])
def test_a_foreign_manifest_is_refused(store, text):
    (store.folder / MANIFEST).write_text(text)
    with pytest.raises(PaveError, match="not the manifest of a .*covariance store|is damaged"):
        CovarianceStore(store.folder)


def test_a_newer_format_is_refused(store):
    manifest = json.loads((store.folder / MANIFEST).read_text())
    (store.folder / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(PaveError, match="has format 99"):
        CovarianceStore(store.folder)


@pytest.mark.parametrize("name", [FINGERPRINTS, "covariance-00001.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_files_are_noticed_when_opened(store, name, damage):
    file = store.folder / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PaveError, match="is damaged .*recalibrate"):
        CovarianceStore(store.folder)


def test_flipped_bits_are_noticed_when_read(store):
    file = store.folder / "covariance-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(PaveError, match="wrong checksum of model.layers.1.up.weight"):
        CovarianceStore(store.folder).covariance("model.layers.1.up.weight")


def test_a_second_writer_goes_on_and_drops_damaged_windows(tmp_path, caplog):
    writer = StoreWriter(tmp_path, "run")
    add_window(writer, {"a": (torch.eye(2), 1)})
    add_window(writer, {"b": (torch.eye(2), 1)})
    assert set(StoreWriter(tmp_path, "run").sites) == {"a", "b"}
    file = tmp_path / "covariance-00001.safetensors"
    tensors = load_file(file)
    save_file({"b": tensors["b"] + 1}, file, metadata={"mergekit-pave": "{}"})
    assert set(StoreWriter(tmp_path, "run").sites) == {"a"}
    file.write_bytes(b"half")
    resumed = StoreWriter(tmp_path, "run")
    assert set(resumed.sites) == {"a"} and "is damaged or of another calibration" in caplog.text
    add_window(resumed, {"b": (torch.eye(2), 1)})
    assert set(StoreWriter(tmp_path, "run").sites) == {"a", "b"}
    (tmp_path / "covariance-00000.safetensors").write_bytes(b"half")
    resumed = StoreWriter(tmp_path, "run")
    add_window(resumed, {"a": (torch.eye(2), 2)})
    assert set(StoreWriter(tmp_path, "run").sites) == {"a", "b"}


def test_a_failed_write_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "s", "run")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_pave.storage.files.os.replace", full)
    with pytest.raises(PaveError, match="Cannot write .*No space left on device"):
        add_window(writer, {"a": (torch.eye(2), 1)})
    assert list((tmp_path / "s").iterdir()) == []
