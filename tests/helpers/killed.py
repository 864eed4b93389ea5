"""Processes that are killed, or run out of room, at a chosen moment of what they write."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

import pytest

from mergekit_pave.errors import PaveError

MANY = [12, pytest.param(50, marks=pytest.mark.slow)]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "fsync"}
GROWS = {"os.mkdir", "os.rename", "open", "fsync"}  # what a full disk refuses
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def counted(make: Callable[[], object], at: int | None = None, full: bool = False) -> int:
    """Run `make` in a process of its own; at its `at`th change of the disk it is killed, or the
    disk is `full` from then on.

    Returns:
        How many changes it made, or the negative signal or exit status that it ended with: 3 is a
        `PaveError`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        made = 0

        def change(event: str, arguments: tuple) -> None:
            nonlocal made
            if event not in CHANGES or (event == "open" and not (arguments[2] or 0) & WRITES):
                return
            made += 1
            if at is not None and made >= at:
                if not full:
                    os.kill(os.getpid(), signal.SIGKILL)
                elif event in GROWS:
                    raise OSError(errno.ENOSPC, "No space left on device")

        sync = os.fsync
        os.fsync = lambda descriptor: (change("fsync", ()), sync(descriptor))
        status = 1
        try:
            sys.addaudithook(change)
            make()
            status = 0
        except PaveError:
            status = 3
        finally:
            at = None
            os.write(writer, str(made).encode())
            os._exit(status)
    os.close(writer)
    text = os.read(reader, 20)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return -abs(status) if status else int(text)


def moments(total: int, many: int) -> list[int]:
    return sorted({1 + i * total // many for i in range(many)})
