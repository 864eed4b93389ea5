"""Killed, or out of room, at any moment of writing: what is left is whole or refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch  # noqa: F401  before the fork
from helpers.archives import FORMATS
from helpers.cards import HUB, make_output
from helpers.killed import MANY, counted, moments

from mergekit_pave.errors import PaveError
from mergekit_pave.publish.card import write_card
from mergekit_pave.storage.files import appearing


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_left_of_an_archive(tmp_path, name, full, many):
    make, read = FORMATS[name]
    if name == "compressed":  # as `compress` writes it

        def make(folder, fill=make):
            with appearing(folder / "task") as inside:
                fill(inside)

        def read(folder, whole=read):
            whole(folder / "task")

    total = counted(lambda: make(tmp_path / "whole"))
    read(tmp_path / "whole")
    wholes = refused = 0
    for moment in moments(total, many):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for mine in ("notes.txt", ".x.tmp", "covariance-mine.safetensors"):
            (folder / mine).write_text("mine")
        status = counted(lambda folder=folder: make(folder), moment, full)
        assert status in ((-3,) if full else (-signal.SIGKILL,)) or status >= 0, (moment, status)
        try:
            read(folder)
            wholes += 1
        except PaveError:
            refused += 1
        # Written again, and all of it is there; what was half-written is not.
        make(folder) if name != "compressed" or not (folder / "task").exists() else None
        read(folder)
        assert not list(folder.rglob(".mergekit-pave-*/content"))
        for mine in ("notes.txt", ".x.tmp", "covariance-mine.safetensors"):
            assert (folder / mine).read_text() == "mine"
    assert refused > wholes


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
def test_what_is_left_of_a_card(tmp_path, full, many):
    """Every file is the old one or the new one, and the next run leaves no path."""
    private = str(tmp_path / "private folder" / "math.jsonl")
    source = HUB.replace("code.jsonl", f'"{private}"')
    new = make_output(tmp_path / "whole" / "out", source)
    old = {file.name: file.read_bytes() for file in new.iterdir()}
    total = counted(lambda: write_card(new))
    complete = {file.name: file.read_bytes() for file in new.iterdir()}
    for moment in moments(total, many):
        out = make_output(tmp_path / str(moment) / "out", source)
        status = counted(lambda out=out: write_card(out), moment, full)
        assert status in ((-3,) if full else (-signal.SIGKILL,)) or status >= 0, (moment, status)
        for file in out.iterdir():
            if file.is_file():
                assert file.read_bytes() in (old.get(file.name), complete[file.name])
        write_card(out)
        found = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
        assert found == complete and str(tmp_path).encode() not in b"".join(found.values())
        assert not list(out.glob(".mergekit-pave-*/content"))


def test_moments_are_where_they_are_said_to_be(tmp_path: Path):
    def write():
        for name in ("a", "b", "c"):
            (tmp_path / name).write_text("x")

    assert counted(write) == 3
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    assert counted(write, 2) == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
