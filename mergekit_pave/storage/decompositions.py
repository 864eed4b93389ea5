"""A cache of decompositions: sweeping ratio, density, strength or method repeats none of them.

Of purifications, one small file per weight and damping, addressed by the content of weight and
covariance: `(out, k)` directions in float32, which is what weights of up to float32 are purified
in, or in float64 for a float64 weight, with their singular values. A longer tail serves every
shorter one. Of methods that merge by factorising, one file per merged change of a weight.

`MERGEKIT_PAVE_DECOMPOSITIONS` is the room for all of them, such as `4GiB`; those that were not
used for longest go first, and 0 switches the cache off.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_pave.algebra.subspace import Tail
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.archive import Archive, Kind, read_header, write_tensors
from mergekit_pave.storage.files import make_folder
from mergekit_pave.storage.identity import checksum
from mergekit_pave.storage.sizes import from_environment

logger = logging.getLogger(__name__)
KIND = Kind("mergekit-pave decomposition", 3, "The decomposition {} is", "it is computed again")
ROOM = "MERGEKIT_PAVE_DECOMPOSITIONS"
DEFAULT_ROOM = 8 * 2**30
_FAULTS = (PaveError, OSError, LookupError, TypeError, ValueError)
_lock = threading.Lock()
# Seconds after its last use for which nothing is pushed out by a merged change.
_RECENT = 24 * 3600


def room() -> int:
    """Bytes that the cache may fill.

    Raises:
        PaveError: the environment variable is no size.
    """
    size = from_environment(ROOM)
    return DEFAULT_ROOM if size is None else size


def address(covariance: str, weight: Tensor, transposed: bool, damping: str) -> str:
    """Names a decomposition: what `Layer.identity` says, the weight's values, the damping."""
    about = f"{KIND.format}|{covariance}|{checksum(weight)}|{transposed}|{damping}"
    return hashlib.sha256(about.encode()).hexdigest()[:40]


def remembered(
    folder: Path, name: str, count: int, dtype: torch.dtype, compute: Callable[[], Tail]
) -> Tail:
    """The tail of at least `count` directions under that address, computed if it is not there.

    A cache that cannot be read or written costs time, never a merge.

    Args:
        folder: of the cache.
        name: `address` of the tail.
        count: directions needed.
        dtype: of the weight.
        compute: finds the tail.

    Returns:
        The tail with directions in float32, or in float64 for a float64 weight: with the cache
        and without it the same.

    Raises:
        PaveError: `MERGEKIT_PAVE_DECOMPOSITIONS` is no size.
    """
    limit, path = room(), folder / name[:2] / f"{name}.safetensors"
    if limit and (found := _read(path, count)) is not None:
        return found
    tail = compute()
    stored = torch.promote_types(dtype, torch.float32)
    if tail.basis.dtype != stored:
        tail = replace(tail, basis=tail.basis.to(stored))
    if limit:
        try:
            tensors = {"basis": tail.basis, "values": tail.values}
            _keep(folder, path, tensors, limit, largest=tail.largest, route=tail.route)
        except (OSError, PaveError) as error:
            _warn(str(error))
    return tail


def remembered_change(folder: Path, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """The change of a weight (m, n) under that name, computed if it is not there.

    All changes of a merge are as large as a model in float32. None pushes out what was used within
    a day: a merge that pushed out its own would leave nothing for the next.

    Raises:
        PaveError: `MERGEKIT_PAVE_DECOMPOSITIONS` is no size.
    """
    limit, path = room(), folder / name[:2] / f"{name}.safetensors"
    if limit and (header := read_header(path, KIND)) is not None:
        try:
            change = Archive(path.parent, KIND, header["entries"]).tensor("change")
            os.utime(path)  # the time of its last use
            return change
        except _FAULTS:
            pass
    change = compute()
    if limit:
        try:
            _keep(folder, path, {"change": change}, limit, _RECENT, of="methods")
        except (OSError, PaveError) as error:
            _warn(str(error))
    return change


@functools.cache
def _warn(what: str) -> None:
    logger.warning("Decompositions are not kept, and the next merge repeats them: %s", what)


def _keep(
    folder: Path, path: Path, tensors: dict[str, Tensor], limit: int, spared: float = 0.0,
    **about: object,
) -> None:
    """Write tensors, where there is room without files used in the last `spared` seconds."""
    here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in here.values())
    if size > limit:
        return
    make_folder(path.parent)
    with _lock:
        fits = _make_room(folder, limit - size, spared)
    if fits:
        write_tensors(path, KIND, here, **about)


def _make_room(folder: Path, limit: int, spared: float) -> bool:
    """Remove the files that were not used for longest, but none of the last `spared` seconds,
    until the others fill at most `limit`; False where they cannot.
    """
    found = []
    for file in folder.glob("*/*.safetensors"):
        try:
            seen = file.stat()
        except OSError:  # removed by another process meanwhile
            continue
        found.append((seen.st_mtime_ns, seen.st_size, file))
    total = sum(size for _, size, _ in found)
    newest = time.time_ns() - int(spared * 10**9)
    free = [one for one in sorted(found) if not spared or one[0] < newest]
    if total - sum(size for _, size, _ in free) > limit:
        return False
    for _, size, file in free:
        if total <= limit:
            break
        if read_header(file, KIND) is not None:
            file.unlink(missing_ok=True)
            total -= size
    return total <= limit


def _read(path: Path, count: int) -> Tail | None:
    header = read_header(path, KIND)
    if header is None:
        return None
    try:
        archive = Archive(path.parent, KIND, header["entries"])
        if archive.entries["values"].shape[0] < count:
            return None
        basis, values = archive.tensor("basis"), archive.tensor("values")
        tail = Tail(basis[:, :count], values[:count], float(header["largest"]), header["route"])
        os.utime(path)  # the time of its last use
    except _FAULTS:
        return None
    return tail
