"""Folders that several processes may want to fill, and what to say when one cannot."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_pave.errors import PaveError


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
