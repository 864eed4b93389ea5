"""`calibrate` in a folder that is not empty: nothing of others is used, changed or deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import add_window, source_of, spec_of
from safetensors.torch import load_file, save_file

from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.calibration.stores import cached_store
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.archive import MANIFEST
from mergekit_pave.storage.covariances import FINGERPRINTS, CovarianceStore, StoreWriter
from mergekit_pave.storage.identity import checksum

MARK = "calibration.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def model(families, texts):
    return source_of(families("llama")["expert0"]), spec_of(texts[0])


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "store"
    calibrate_to(*model, folder, Resources(statistics_memory=1))
    return folder


def test_files_of_the_user_stay(model, tmp_path):
    (tmp_path / ".offload-0").mkdir()
    for name in (".note.tmp", ".offload-0/x.safetensors", "covariance-x.safetensors", "README.md",
                 "model.safetensors", ".covariance-00000.safetensors.77.tmp"):
        (tmp_path / name).write_bytes(b"mine")
    before = contents(tmp_path)
    store = calibrate_to(*model, tmp_path, Resources())
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() <= {*store.files, MARK, ".lock"}
    assert not list(tmp_path.glob(".mergekit-pave-*"))


@pytest.mark.parametrize("name", ["covariance-00000.safetensors", "covariance-00003.safetensors",
                                  FINGERPRINTS, MANIFEST])
@pytest.mark.parametrize("content", [b"mine", None])
def test_files_called_like_ours_are_refused_and_stay(model, finished, tmp_path, name, content):
    """Also those of another calibration whose mark is missing: they may be another model's."""
    if content is None:
        shutil.copy(finished / name, tmp_path)
    else:
        (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(PaveError, match="choose another folder"):
        calibrate_to(*model, tmp_path, Resources())
    assert contents(tmp_path).items() >= before.items()
    assert contents(tmp_path).keys() - before.keys() <= {".lock"}


@pytest.mark.parametrize("mark", [b"{}", b"\xff\xfe", b"mine"])
def test_a_mark_of_others_is_refused_and_stays(model, tmp_path, mark):
    (tmp_path / MARK).write_bytes(mark)
    with pytest.raises(PaveError, match="choose another folder"):
        calibrate_to(*model, tmp_path, Resources())
    assert (tmp_path / MARK).read_bytes() == mark


def test_windows_of_another_model_are_not_taken_over(families, texts, finished, tmp_path):
    """The mark says this model, the windows come from another one."""
    other = source_of(families("llama")["expert1"]), spec_of(texts[0])
    calibrate_to(*other, tmp_path / "right", Resources(statistics_memory=1))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(tmp_path / "right" / MARK, mixed)
    shutil.copy(finished / "covariance-00002.safetensors", mixed)
    theirs = (mixed / "covariance-00002.safetensors").read_bytes()
    store = calibrate_to(*other, mixed, Resources(statistics_memory=1))
    right = CovarianceStore(tmp_path / "right")
    assert all(torch.equal(store.covariance(s), right.covariance(s)) for s in right.sites)
    assert (mixed / "covariance-00002.safetensors").read_bytes() == theirs
    assert "covariance-00002.safetensors" not in store.files


def test_only_the_same_run_is_resumed(tmp_path):
    add_window(StoreWriter(tmp_path, "mine"), {"a": (torch.eye(2), 1)})
    assert set(StoreWriter(tmp_path, "mine").sites) == {"a"}
    other = StoreWriter(tmp_path, "other")
    assert not other.sites
    add_window(other, {"a": (torch.eye(2) * 2, 1)})
    assert len(list(tmp_path.glob("covariance-*.safetensors"))) == 2


def test_a_store_is_named_by_what_was_read_of_it(model, finished, tmp_path):
    """A manifest that borrows another store's checksums is refused when its values are read."""
    honest = CovarianceStore(finished)
    forged = tmp_path / "forged"
    shutil.copytree(finished, forged)
    (site, entry), = list(honest._archive.entries.items())[:1]
    tensors = load_file(forged / entry.file)
    save_file({name: tensor * 3 for name, tensor in tensors.items()}, forged / entry.file)
    store = CovarianceStore(forged)
    with pytest.raises(PaveError, match=f"wrong checksum of {site}"):
        store.covariance(site)
    manifest = json.loads((forged / MANIFEST).read_text())
    manifest["entries"][site]["sha256"] = checksum(tensors[site] * 3)
    (forged / MANIFEST).write_text(json.dumps(manifest))
    store = CovarianceStore(forged)
    assert torch.equal(store.covariance(site), honest.covariance(site) * 3)
    assert store.identity(site) != honest.identity(site)


def test_a_cached_store_of_an_earlier_format_is_computed_again(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path))
    monkeypatch.setattr("mergekit_pave.calibration.stores.FORMAT", 1)
    old = cached_store(*model, Resources()).folder
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path))
    assert cached_store(*model, Resources()).folder != old
