"""A cache of decompositions: sweeping ratio, density or method repeats none of them.

One small file per weight and damping, `(out, k)` float64 directions with their singular values,
addressed by the content of weight and covariance. A longer tail serves every shorter one.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_pave.algebra.subspace import Tail
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.files import write_atomically
from mergekit_pave.storage.identity import checksum

logger = logging.getLogger(__name__)


def address(covariance: str, weight: Tensor, transposed: bool, damping: str) -> str:
    """Names a decomposition: what `Layer.identity` says, the weight's values, the damping."""
    about = f"2|{covariance}|{checksum(weight)}|{transposed}|{damping}"
    return hashlib.sha256(about.encode()).hexdigest()[:40]


def remembered(folder: Path, name: str, count: int, compute: Callable[[], Tail]) -> Tail:
    """The tail of at least `count` directions under that address, computed if it is not there.

    A cache that cannot be read or written costs time, never a merge.
    """
    path = folder / name[:2] / f"{name}.safetensors"
    if (found := _read(path, count)) is not None:
        return found
    tail = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"basis": tail.basis.cpu().contiguous(), "values": tail.values.cpu()}
        about = {"largest": repr(tail.largest), "route": tail.route, "crc32": _crc32(tail.basis)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))
    except (OSError, PaveError) as error:
        logger.info("The decomposition is not kept: %s", error)
    return tail


def _read(path: Path, count: int) -> Tail | None:
    try:
        with safe_open(path, "pt") as file:
            values = file.get_tensor("values")
            if len(values) < count:
                return None
            about = file.metadata()
            basis = file.get_tensor("basis")
            if about["crc32"] != _crc32(basis) or not torch.isfinite(values).all():
                return None
            return Tail(basis[:, :count], values[:count], float(about["largest"]), about["route"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _crc32(basis: Tensor) -> str:
    return str(zlib.crc32(basis.cpu().contiguous().numpy()))
