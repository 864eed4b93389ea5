"""`compress`, `reconstruct` and `materialize`, killed or out of room at any moment."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from helpers import tensors_of
from helpers.compress import raw
from helpers.emr import equal
from helpers.killed import MANY, counted, moments

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import check_finished
from mergekit_pave.storage.low_rank import Compressed
from mergekit_pave.tasks.compress import compress
from mergekit_pave.tasks.emr import materialize
from mergekit_pave.tasks.reconstruct import reconstruct


@pytest.fixture(params=["compress", "reconstruct", "materialize"])
def command(request, families, emr_trio, emr_merged, tmp_path):
    """What a command writes, the folder in it that is whole or absent, and its reader."""
    if request.param == "compress":
        config = raw(families("llama"))
        return lambda out: compress(config, out), "expert1", Compressed
    if request.param == "reconstruct":
        base = str(families("llama")["base"])
        compress(raw(families("llama")), tmp_path / "compressed")
        task = tmp_path / "compressed" / "expert0"
        return lambda out: reconstruct(task, out, base=base), "", check_finished
    base = str(emr_trio("llama")["base"])
    return lambda out: materialize(emr_merged, 1, out, base=base), "", check_finished


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
def test_what_is_left_of_a_command(tmp_path, command, full, used, many):
    make, inner, read = command
    mine = Path("..", "notes.txt")
    make(tmp_path / "whole" / "out")
    expected = tensors_of(tmp_path / "whole" / "out" / inner)
    total = counted(lambda: make(tmp_path / "counted" / "out"))
    refused = 0
    for moment in moments(total, many):
        out = tmp_path / str(moment) / "out"
        (out if used else out.parent).mkdir(parents=True)
        (out / mine).resolve().write_text("mine")
        status = counted(lambda out=out: make(out), moment, full)
        assert status in ((-3,) if full else (-signal.SIGKILL,)) or status >= 0, (moment, status)
        try:
            read(out / inner)
            assert equal(tensors_of(out / inner), expected)
        except (PaveError, FileNotFoundError):
            refused += 1
            assert not (out / inner / "config.json").exists()
            if not used:  # a kill while files move into a folder that was there leaves some of them
                make(out)
                assert equal(tensors_of(out / inner), expected)
        assert (out / mine).resolve().read_text() == "mine"
        shutil.rmtree(out.parent)
    assert refused
