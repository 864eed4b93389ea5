"""Folders that cannot be written and a full disk: nothing half-made is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers import emr_config
from helpers import merge as write_merge
from helpers.refusals import merge, refused
from safetensors import SafetensorError
from safetensors.torch import save_file

from mergekit_pave.errors import PaveError
from mergekit_pave.storage.covariances import MANIFEST


def test_a_home_that_nobody_has(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", "~nobody-of-that-name/cache")
    good["models"][0]["parameters"]["covariance"] = "~nobody-of-that-name/store"
    assert "~nobody-of-that-name/store" in refused(good, tmp_path / "out")


def test_cache_that_cannot_be_made(good, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "file" / "cache"))
    text = refused(good, tmp_path / "out")
    assert "Cannot write to the folder" in text and "MERGEKIT_PAVE_CACHE" in text


def test_cache_that_cannot_be_written(good, tmp_path, monkeypatch):
    """Another user's folder: it is there, but no lock can be put into it."""

    class Denied:
        def __init__(self, path):
            pass

        def acquire(self, timeout):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("mergekit_pave.storage.files.FileLock", Denied)
    text = refused(good, tmp_path / "out")
    assert "Permission denied" in text and "MERGEKIT_PAVE_CACHE" in text


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("files", [0, 2])
def test_disk_full(good, tmp_path, monkeypatch, error, files):
    """Whichever file is the one too many: windows first, then fingerprints."""
    written = []

    def save(tensors, path, **kwargs):
        if len(written) == files:
            Path(path).write_bytes(b"half")
            raise error
        written.append(path)
        return save_file(tensors, path, **kwargs)

    monkeypatch.setattr("mergekit_pave.storage.archive.save_file", save)
    monkeypatch.setenv("MERGEKIT_PAVE_STATISTICS_MEMORY", "16000")
    good["parameters"]["num_calibration_samples"] = 4
    text = refused(good, tmp_path / "out")
    assert "No space left on device" in text and "Cannot write" in text
    left = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert MANIFEST not in left and not list((tmp_path / "cache").rglob(".mergekit-pave-*"))
    assert len([name for name in left if name.endswith(".safetensors")]) == files
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
    assert merge(good, tmp_path / "out")


@pytest.mark.parametrize("name", [MANIFEST, "calibration.json"])
def test_disk_full_for_a_small_file(good, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr("mergekit_pave.storage.files.os.replace", full)
    text = refused(good, tmp_path / "out")
    assert name in text and "No space left on device" in text
    assert not list((tmp_path / "cache").rglob(MANIFEST))
    assert not list((tmp_path / "cache").rglob(".mergekit-pave-*"))


@pytest.mark.parametrize("safe", [True, False])
def test_no_room_for_the_weights(families, tmp_path, safe):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config, out = emr_config(families("llama"), "tsv_m"), tmp_path / "out"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(PaveError, match="There is no room for the merge in .*out"):
            write_merge(config, out, safe_serialization=safe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
