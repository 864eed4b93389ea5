"""What it takes for a file to outlive a power cut."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        # What network and FUSE file systems say that cannot promise it.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def locked(path: Path, wait: bool = True):
    """Hold the lock file `path`; without `wait`, `PaveError` when another process holds it."""
    try:
        return FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise PaveError(
            f"Another process is writing a covariance store to {path.parent}; wait for it or "
            "choose another folder."
        ) from None
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> PaveError:
    return PaveError(
        f"Cannot write to the folder {folder} ({error.strerror}); name another one with "
        "--output or, for the cache of merges, with MERGEKIT_PAVE_CACHE."
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


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which gets its name when the block has ended well; where there
    is an empty one, its files then move into that, the config last.

    Raises:
        PaveError: what went wrong with the disk.
    """
    # A link to an empty folder stays one: a folder cannot take the place of the link itself.
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    left_over = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.iterdir():  # by a process that was killed
            if left_over.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            to_disk(file)
        if folder.exists():  # it may be the current one of a shell, which would lose it
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
            to_disk(folder)
        else:
            os.replace(temporary, folder)
            to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PaveError(f"Cannot finish {folder}: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, then give the file its name in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
    finally:
        temporary.unlink(missing_ok=True)
