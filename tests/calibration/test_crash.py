"""Killed at any moment, a calibration is resumed to the same bits; two share one cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  so that children need not
from helpers import add_window, source_of, spec_of

from mergekit_pave.calibration import run, stores
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.stores import cached_store
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore, StoreWriter
from mergekit_pave.storage.files import write_atomically

ONE_SITE = Resources(statistics_memory=1)  # many windows: many moments to die at


@pytest.mark.parametrize("when", ["load_model", "_collect"])
def test_a_model_that_is_replaced_meanwhile_gives_no_store(families, texts, tmp_path, monkeypatch,
                                                           when):
    """Its covariances would be kept under the name of the other weights, for good."""
    model = shutil.copytree(families("llama")["expert0"], tmp_path / "model")
    real = getattr(run, when)

    def replaced(*args, **kwargs):
        shutil.copy(families("llama")["expert1"] / "model.safetensors", model)
        return real(*args, **kwargs)

    monkeypatch.setattr(run, when, replaced)
    with pytest.raises(PaveError, match="were written anew while they were read"):
        cached_store(source_of(model), spec_of(texts[0]), Resources())
    assert not list(tmp_path.glob("cache/*/manifest.json"))
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
    cached_store(source_of(model), spec_of(texts[0]), Resources()).verify(
        source_of(model).tensors(), "model")


def _context():
    # Children are forked from a process that has made the imports, and nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_pave.calibration.run", __name__])
    return context


def _calibrate(path: Path, data: Path, cache: Path, began, log: Path | None = None) -> None:
    os.environ["MERGEKIT_PAVE_CACHE"] = str(cache)
    torch.set_num_threads(1)
    real = stores.compute

    def noted(*args):
        if log is not None:
            with log.open("a") as file:
                file.write("computed\n")
        began.set()
        return real(*args)

    stores.compute = noted
    cached_store(source_of(path), spec_of(data), ONE_SITE)
    began.set()  # also where there was nothing left to do


def _run(path: Path, data: Path, cache: Path, kill_after: float | None = None) -> float:
    """Calibrate in a process of its own; seconds from when data and model are known."""
    began = _context().Event()
    process = _context().Process(target=_calibrate, args=(path, data, cache, began))
    process.start()
    assert began.wait(120)
    start = time.monotonic()
    process.join(300 if kill_after is None else kill_after)
    process.kill()
    process.join()
    assert kill_after is not None or process.exitcode == 0
    return time.monotonic() - start


def _folder(cache: Path) -> Path | None:
    return next((folder for folder in cache.glob("*") if folder.is_dir()), None)


def _same(store: CovarianceStore, whole: CovarianceStore) -> bool:
    return store.manifest == whole.manifest and all(
        torch.equal(store.covariance(site), whole.covariance(site)) for site in whole.sites)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(families, texts, tmp_path, kills):
    path, data = families("llama")["expert0"], texts[0]
    seconds = _run(path, data, tmp_path / "whole")
    whole = CovarianceStore(_folder(tmp_path / "whole"))
    draw, partial, moments = random.Random(kills), 0, set()
    # On a busy machine the moments may all miss the short calibration: then some more.
    for number in range(8 * kills):
        if number >= kills and partial:
            break
        cache = tmp_path / str(number)
        _run(path, data, cache, kill_after=draw.uniform(0, seconds))
        folder = _folder(cache)
        if folder is not None and not (folder / MANIFEST).exists():
            partial += 1
            moments.add(len(list(folder.glob("covariance-*.safetensors"))))
            with pytest.raises(PaveError, match="has no manifest"):
                CovarianceStore(folder)
        elif folder is not None:
            assert _same(CovarianceStore(folder), whole)
        before = {f: f.stat().st_mtime_ns for f in cache.glob("*/covariance-*.safetensors")}
        _run(path, data, cache)
        assert _same(CovarianceStore(_folder(cache)), whole)
        assert before.items() <= {
            f: f.stat().st_mtime_ns for f in cache.glob("*/covariance-*.safetensors")}.items()
        # After the last file has its name, a kill may leave an empty folder.
        assert not list(cache.rglob(".mergekit-pave-*/content/*"))
    # The moments were not all before the first window or after the last.
    assert partial and (kills < 50 or len(moments) > 2), (partial, moments)


def test_two_processes_share_one_cache(families, texts, tmp_path):
    path, cache, log = families("llama")["expert0"], tmp_path / "shared", tmp_path / "log"
    context = _context()
    began = context.Event()
    processes = [
        context.Process(target=_calibrate, args=(path, texts[0], cache, began, log))
        for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert log.read_text() == "computed\n"
    _run(path, texts[0], tmp_path / "alone")
    assert _same(CovarianceStore(_folder(cache)), CovarianceStore(_folder(tmp_path / "alone")))


def test_no_merge_from_a_partial_store(families, texts, tmp_path):
    from mergekit_pave.calibration.stores import fetch_store
    from mergekit_pave.models.source import LoaderOptions

    add_window(StoreWriter(tmp_path / "s", "run"), {"a": (torch.eye(2), 1)})
    with pytest.raises(PaveError, match="has no manifest"):
        fetch_store(str(tmp_path / "s"), LoaderOptions())


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    """A power cut after the rename must find the content: fsync, rename, fsync the folder."""
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(os.readlink(f"/proc/self/fd/{fd}"))
                        or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    write_atomically(tmp_path / "x.json", lambda path: path.write_text("{}"))
    assert [Path(step).name for step in order] == [
        "x.json", "rename", tmp_path.name]


def test_a_mark_cut_short_is_no_other_calibration(families, texts, tmp_path, monkeypatch):
    """An empty calibration.json is what a power cut may leave of one written without fsync."""
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path))
    source, spec = source_of(families("llama")["expert0"]), spec_of(texts[0])
    folder = cached_store(source, spec, Resources()).folder
    assert json.loads((folder / "calibration.json").read_text())["model"]
    (folder / MANIFEST).unlink()
    (folder / "calibration.json").write_text("")
    assert cached_store(source, spec, Resources()).folder == folder
