"""Files and folders that appear complete or not at all, and survive a power cut."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mergekit_pave.errors import PaveError


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's names survive a power cut.

    Else a disk may keep the rename and lose the content: a manifest of files that are empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders.
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems that cannot promise it answer with these.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def locked(path: Path, wait: bool = True) -> AbstractContextManager[Any]:
    """Hold the lock file `path`; without `wait`, `PaveError` when another process holds it."""
    try:
        return FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise PaveError(
            f"Another process is writing a covariance store to {path.parent}; wait for it or "
            "choose another folder."
        ) from None
    except OSError as error:
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: OSError) -> PaveError:
    """The sentence about a folder that cannot be written to."""
    return PaveError(
        f"Cannot write to the folder {folder} ({error.strerror}); name another one (that "
        "of the cache is set by MERGEKIT_PAVE_CACHE)."
    )


def cache_folder() -> Path:
    """`MERGEKIT_PAVE_CACHE`, or `mergekit-pave` in the user's cache folder."""
    if own := os.environ.get("MERGEKIT_PAVE_CACHE"):
        return Path(os.path.expanduser(own))
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(caches)) / "mergekit-pave"


def refuse_used(folder: Path) -> None:
    """Raise `PaveError` unless a model can become that folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PaveError(f"{folder} exists already; choose another folder for the model.")
    if os.path.ismount(os.path.realpath(folder)):  # written beside it, and renamed
        raise PaveError(f"{folder} is a mount point; name a folder in it for the model.")


# Names of a scratch folder and of the files in it.
_SCRATCH, _MARK, _LOCK, _CONTENT = ".mergekit-pave-", "mark.json", "lock", "content"
_CLAIM = f"{_SCRATCH}claim"
_MOMENT = 60.0  # seconds, far more than making such a folder takes
_MARKED = json.dumps({"kind": "mergekit-pave scratch"})


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for what is not finished; it is gone after the block.

    A process that is killed leaves its folder behind, and the next call for the same `parent`
    removes it. A folder is known as ours by the mark in it, and as left by its lock, which the
    system releases when a process dies: this holds between containers that share a disk, too,
    where process ids say nothing.

    Raises:
        PaveError: there is no room for it.
    """
    _remove_left(parent)
    with ExitStack() as held:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
            held.callback(_remove, folder)
            with suppress(NotImplementedError, Timeout):  # without locks nobody takes it for left
                held.enter_context(FileLock(folder / _LOCK).acquire(timeout=0))
            (folder / _MARK).write_text(_MARKED, "utf-8")
            (folder / _CONTENT).mkdir()
        except OSError as error:
            raise unwritable(parent, error) from error
        yield folder / _CONTENT


def _remove_left(parent: Path) -> None:
    for folder in parent.glob(f"{_SCRATCH}*"):
        with suppress(OSError, NotImplementedError, Timeout, ValueError):
            if folder.is_symlink():
                continue
            mark, lock = folder / _MARK, folder / _LOCK
            if not mark.exists():
                _remove_unmarked(folder)
            # A folder from elsewhere may hold links: to lock through one would empty its target.
            elif mark.is_file() and not lock.is_symlink() and mark.read_text("utf-8") == _MARKED:
                with FileLock(lock).acquire(timeout=0):
                    _remove(folder)


def _remove_unmarked(folder: Path) -> None:
    """Remove what a process left that was killed before it wrote the mark, if that is empty."""
    names = {entry.name for entry in folder.iterdir()}
    # The process that made a young folder may be about to write the mark.
    if names <= {_LOCK} and time.time() - folder.stat().st_mtime > _MOMENT:
        if names and not (folder / _LOCK).stat().st_size:
            (folder / _LOCK).unlink()
        folder.rmdir()


def _remove(folder: Path) -> None:
    """Remove the content first: a kill in between leaves the mark for the next call."""
    shutil.rmtree(folder / _CONTENT, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which gets its name when the block has ended well; where there
    is an empty one, its files then move into that, the config last.

    Of two processes that write the same folder the first to end has it, and the other fails.

    Raises:
        PaveError: what went wrong with the disk, or the folder is in use meanwhile.
    """
    # A link to an empty folder stays one: a folder cannot take the place of the link itself.
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch(folder.parent) as temporary:
            yield temporary
            for file in temporary.rglob("*"):
                to_disk(file)
            refuse_used(folder)
            if folder.exists():  # it may be the current one of a shell, which would lose it
                _move_into(folder, temporary)
            else:
                temporary.rename(folder)
                to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PaveError(f"Cannot finish {folder}: {reason}.") from error


def _move_into(folder: Path, temporary: Path) -> None:
    """Move everything, the config last, into a folder that is empty."""
    claim = folder / _CLAIM
    claim.mkdir()  # fails where another process has begun to move
    try:
        if [entry.name for entry in folder.iterdir()] != [_CLAIM]:
            raise FileExistsError(errno.EEXIST, "another process has written to it")
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        to_disk(folder)
    finally:
        claim.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread is in this block for the folder.

    The lock is on the folder itself and ends with its process, so that it leaves nothing behind.
    Systems that cannot lock a folder (Windows, some network disks) do without.
    """
    descriptor = None
    with suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, then give the file its name in one step.

    Raises:
        PaveError: what went wrong with the disk.
    """
    try:
        with scratch(path.parent) as folder:
            temporary = folder / path.name
            write(temporary)
            to_disk(temporary)
            os.replace(temporary, path)
            to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PaveError(
            f"Cannot write {path}: {reason}; what is finished is kept, run it again once there "
            "is room."
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step; errors as `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 in one step; errors as `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
