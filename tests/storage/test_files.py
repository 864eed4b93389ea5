"""What is half-written: whose it is, who removes it, and that nothing else is touched."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_pave.errors import PaveError
from mergekit_pave.storage.files import appearing, scratch, write_text

HOLD = """
import sys, time
from pathlib import Path
from mergekit_pave.storage.files import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process in the middle of writing; its scratch folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    process.folder = Path(process.stdout.readline().decode().strip())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_process_is_cleaned_up_after_and_a_live_one_is_not(tmp_path, holder):
    write_text(tmp_path / "x", "x")
    assert (holder.folder / "half").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    write_text(tmp_path / "x", "y")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_process_ids_say_nothing(tmp_path, holder, monkeypatch):
    """In another container the writer has the same host name and process id as this one."""
    monkeypatch.setattr(os, "getpid", lambda: holder.pid)
    with appearing(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert (holder.folder / "half").exists() and (tmp_path / "model" / "config.json").exists()


def test_a_link_in_a_folder_from_elsewhere_is_not_locked_through(tmp_path):
    theirs = tmp_path / "out" / ".mergekit-pave-x"
    theirs.mkdir(parents=True)
    (theirs / "mark.json").write_text('{"kind": "mergekit-pave scratch"}')
    (tmp_path / "mine").write_text("mine")
    (theirs / "lock").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "out" / "x", "x")
    assert (tmp_path / "mine").read_text() == "mine" and theirs.exists()
    (theirs / "mark.json").unlink()
    os.mkfifo(theirs / "mark.json")  # nor is a pipe waited for
    write_text(tmp_path / "out" / "x", "x")


@pytest.mark.parametrize("name", [".x.1234.tmp", ".model.77.tmp", ".offload-0", ".mergekit-pave-x",
                                  ".mergekit-pave-abcdefgh"])
def test_files_of_others_stay_whatever_they_are_called(tmp_path, name):
    for made in (tmp_path / name, tmp_path / "model" / name):
        made.mkdir(parents=True)
        (made / "mark.json").write_text('{"kind": "mine"}')
        (made / "note").write_text("mine")
    write_text(tmp_path / "model" / "x", "x")
    with appearing(tmp_path / "other") as folder:
        (folder / "config.json").write_text("{}")
    assert len(list(tmp_path.rglob("note"))) == 2


def test_a_process_killed_before_its_mark_is_cleaned_up_after_a_while(tmp_path):
    young, old, theirs = (tmp_path / f".mergekit-pave-{name}" for name in ("aa", "bb", "cc"))
    for folder in (young, old, theirs):
        folder.mkdir()
        (folder / "lock").write_bytes(b"mine" if folder is theirs else b"")
    for folder in (old, theirs):
        os.utime(folder, (0, 0))
    write_text(tmp_path / "x", "x")
    assert young.exists() and not old.exists() and (theirs / "lock").read_bytes() == b"mine"


def test_a_link_that_looks_like_ours_is_not_followed(tmp_path):
    with scratch(tmp_path) as content:
        target = tmp_path / "theirs"
        target.mkdir()
        (target / "mark.json").write_text((content.parent / "mark.json").read_text())
        (tmp_path / ".mergekit-pave-link").symlink_to(target)
    write_text(tmp_path / "x", "x")
    assert (target / "mark.json").exists()


def test_of_two_writers_the_first_to_end_has_the_folder(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(PaveError, match="exists already"), appearing(out) as late:
        (late / "config.json").write_text("late")
        with appearing(out) as early:
            (early / "config.json").write_text("early")
        assert (late / "config.json").exists()
    assert (out / "config.json").read_text() == "early"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def _race(out: Path, number: int, start) -> None:
    start.wait()
    try:
        with appearing(out) as folder:
            for name in ("config.json", "a", "b", "c"):
                (folder / name).write_text(str(number))
    except PaveError:
        sys.exit(3)


@pytest.mark.parametrize("empty", [False, True])
def test_writers_at_once_leave_one_whole_folder(tmp_path, empty):
    context = multiprocessing.get_context("fork")
    out, start = tmp_path / "model", context.Event()
    if empty:
        out.mkdir()
    writers = [context.Process(target=_race, args=(out, i, start)) for i in range(4)]
    for writer in writers:
        writer.start()
    time.sleep(0.1)
    start.set()
    for writer in writers:
        writer.join(60)
    assert sorted(writer.exitcode for writer in writers) == [0, 3, 3, 3]
    assert len({file.read_text() for file in out.iterdir()}) == 1
    assert len(list(out.iterdir())) == 4 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["mkdir", "replace", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(PaveError, match="No space left on device"):
        write_text(tmp_path / "x", "after")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"
