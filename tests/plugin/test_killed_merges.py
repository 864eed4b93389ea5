"""Whole merges that are killed, or meet a full disk: what is left is whole, or refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from helpers import emr_config, make_family, merge
from mergekit.io.tensor_writer import TensorWriter

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import check_finished
from mergekit_pave.plugin import output
from mergekit_pave.storage.masks import TaskMasks

WRITES = {"write_model_card": True, "out_shard_size": 20_000}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def wholes(paths, tmp_path_factory):
    """What `emr` and `tsv_m` leave in a new folder, by method."""
    folder, found = tmp_path_factory.mktemp("wholes"), {}
    for method in ("emr", "tsv_m"):
        out = folder / method / "out"
        merge(emr_config(paths, method), out, **WRITES)
        found[method] = out
    return found


def contents(out: Path) -> dict[str, bytes]:
    """The visible files below a folder, but for the user's own."""
    files = (f for f in out.rglob("*") if f.is_file())
    return {str(f.relative_to(out)): _said(f) for f in files
            if ".mergekit-pave-" not in str(f) and f.name != "notes.txt"}


def _said(file: Path) -> bytes:
    """What a file holds: safetensors orders its metadata, mergekit's card its models, by chance."""
    content = file.read_bytes()
    if file.name == "README.md":
        return b"\n".join(sorted(content.splitlines()))
    if file.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def assert_whole_or_refused(out: Path, allowed: list[dict[str, bytes]]) -> None:
    """A folder that is not whole has no config, and our readers refuse it."""
    found = contents(out) if out.exists() else {}
    if found in allowed:
        return
    assert "config.json" not in found, sorted(found)
    for reader in (check_finished, TaskMasks):
        try:
            reader(out)
        except PaveError:
            continue
        # Weights without a config are no model to transformers or mergekit.
        assert not (out / "config.json").exists()


def _merge(config, out: Path, began) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    began.set()
    merge(config, out, **WRITES)


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_killed_at_random_moments(paths, wholes, tmp_path, used, method):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit.merge", "mergekit_pave.plugin.run_merge", "helpers"])
    draw = random.Random(int(used))
    config = emr_config(paths, method)
    allowed = [contents(wholes[method]), *([contents(wholes["emr"])] if used else [{}])]
    seconds, cut = 1.0, 0
    for turn in range(50):
        out = tmp_path / str(turn) / "out"
        out.parent.mkdir()
        if used:
            shutil.copytree(wholes["emr"], out)
            (out / "notes.txt").write_text("mine")
        began = context.Event()
        process = context.Process(target=_merge, args=(config, out, began))
        process.start()
        assert began.wait(120)
        start = time.monotonic()
        process.join(120 if turn == 0 else draw.uniform(0, seconds))
        if process.exitcode is None:
            cut += 1
        else:  # it takes this long while the machine is as busy as now
            seconds = time.monotonic() - start
        process.kill()
        process.join()
        assert_whole_or_refused(out, allowed)
        assert not used or (out / "notes.txt").read_text() == "mine"
        # The next merge makes it whole, and leaves nothing of the killed one.
        merge(config, out, **WRITES)
        assert contents(out) == allowed[0] and not list(out.glob(".mergekit-pave-*"))
    assert cut > 10, "hardly any merge was cut short"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_a_disk_that_is_full_at_any_moment(paths, wholes, tmp_path, monkeypatch, used, method):
    config, calls, limit = emr_config(paths, method), [0], [0]

    def failing(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == limit[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)
        return call

    monkeypatch.setattr(TensorWriter, "_save_st", failing(TensorWriter._save_st))
    monkeypatch.setattr(output.os, "replace", failing(os.replace))
    allowed = [contents(wholes[method]), *([contents(wholes["emr"])] if used else [{}])]
    moments = 0
    while True:
        out = tmp_path / str(moments) / "out"
        if used:
            shutil.copytree(wholes["emr"], out)
            (out / "notes.txt").write_text("mine")
        calls[0], limit[0] = 0, moments + 1
        try:
            merge(config, out, **WRITES)
            assert contents(out) == allowed[0]
            break
        except (OSError, PaveError):
            assert_whole_or_refused(out, allowed)
            assert not used or (out / "notes.txt").read_text() == "mine"
            assert not list(out.glob(".mergekit-pave-*"))
        moments += 1
    assert moments > 8
