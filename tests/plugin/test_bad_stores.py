"""Stores that do not fit, are damaged, or are of another version."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.refusals import calibrated, merge, refused, rewrite

from mergekit_pave.storage.covariances import MANIFEST


def test_stores_alone_suffice(published, tmp_path):
    assert merge(published, tmp_path / "out")
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_store_of_another_model(published, stores, tmp_path, untouched):
    published["models"][0]["parameters"]["covariance"] = str(stores[1])
    text = refused(published, tmp_path / "out")
    assert "other weights than those of expert0" in text and "models[0]" in text


def test_store_of_another_architecture(published, families, texts, tmp_path):
    other = calibrated(families("gpt2")["base"], texts[0], tmp_path / "gpt2")
    published["models"][0]["parameters"]["covariance"] = str(other)
    text = refused(published, tmp_path / "out")
    assert "expert0" in text and "gpt2" in text and "recalibrate" in text


@pytest.mark.parametrize("layer", [0, 1])
def test_store_of_weights_that_have_changed(published, families, tmp_path, layer):
    """In the last layer only the merge itself notices."""

    def edit(weights):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] += 1

    newer = rewrite(families("llama")["expert0"], tmp_path / "newer", edit)
    published["models"][0]["model"] = str(newer)
    text = refused(published, tmp_path / "out")
    assert "newer" in text and f"layers.{layer}.mlp.up_proj" in text and "recalibrate" in text


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda s: _flip(next(s.glob("covariance-*")), -10),
    "cut short": lambda s: os.truncate(next(s.glob("covariance-*")), 500),
    "file gone": lambda s: next(s.glob("covariance-*")).unlink(),
    "fingerprints gone": lambda s: (s / "fingerprints.safetensors").unlink(),
    "fingerprints cut": lambda s: os.truncate(s / "fingerprints.safetensors", 20),
    "key missing": lambda s: _edit_manifest(s, lambda m: m.pop("weights")),
    "weight missing": lambda s: _edit_manifest(s, lambda m: m["weights"].update(
        ghost=dict(site="x", shape=[2, 2], transposed=False, dtype="float32"))),
}


def _edit_manifest(store: Path, edit) -> None:
    manifest = json.loads((store / MANIFEST).read_text())
    edit(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_store(published, tmp_path, damage):
    DAMAGE[damage](tmp_path / "store")
    text = refused(published, tmp_path / "out")
    assert "is damaged" in text and "delete the folder and recalibrate" in text


def test_store_of_a_later_version(published, tmp_path, untouched):
    _edit_manifest(tmp_path / "store", lambda m: m.update(format=99))
    assert "format 99" in refused(published, tmp_path / "out")


def test_unfinished_store(published, tmp_path, untouched):
    (tmp_path / "store" / MANIFEST).unlink()
    assert "it has no manifest.json" in refused(published, tmp_path / "out")
