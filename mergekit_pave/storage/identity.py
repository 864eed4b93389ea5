"""Recognising weights: by a sample of their values, or by all of them.

Statistics belong to one exact set of weights. A tensor's fingerprint is a few hundred of its
values at fixed places: small enough to be kept with the statistics, independent of the file layout
and of the tensor's name, and comparable after mergekit has cast the tensor to another dtype. What
a cache keeps is named by all values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNKS, _CHUNK = 8, 64
LENGTH = _CHUNKS * _CHUNK


def fingerprint(tensor: Tensor) -> Tensor:
    """`(512,)` float32 values of `tensor` at fixed places, zero-padded when it has fewer.

    Eight runs of 64 neighbours, spread evenly, so that a memory-mapped shard is touched in
    eight places only. Values keep their dtype's precision (float64 is rounded to float32).
    """
    flat = tensor.detach().reshape(-1)
    if flat.numel() > LENGTH:
        last = flat.numel() - _CHUNK
        starts = [last * i // (_CHUNKS - 1) for i in range(_CHUNKS)]
        flat = torch.cat([flat[start : start + _CHUNK] for start in starts])
    out = torch.zeros(LENGTH, device="cpu")  # a worker's default device may be another
    out[: flat.numel()] = flat.to("cpu", torch.float32)
    return out


def same(seen: Tensor, kept: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Which rows of `kept`, `(n, 512)`, are the fingerprint `seen`, `(512,)`: bool `(n,)`.

    Both are first rounded to every dtype of `dtypes`, the ones they have lived in: rounding
    is what a cast between checkpoint and merge does, and nothing else is forgiven.
    """
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in (torch.float32, torch.float64):
            seen, kept = seen.to(dtype).float(), kept.to(dtype).float()
    return (seen == kept).all(dim=-1)


def checksum(tensor: Tensor) -> str:
    """sha256 of all of a tensor: its shape, its dtype and its values."""
    state = hashlib.sha256(f"{tuple(tensor.shape)}|{tensor.dtype}|".encode())
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names and all values: the identity of a checkpoint."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name}|{checksum(tensor)}|".encode())
    return state.hexdigest()


# A number stands for the layer, or a `*` for any.
_NUMBERED = re.compile(r"(?P<before>.+?)\.(?P<layer>[^.]+\.(?:\d+|\*)\..+)")


def same_layer(a: str, b: str) -> bool:
    """Whether two names can be those of one tensor.

    One may have a prefix more, and what stands before the layers' number another order: class
    `model.language_model.layers.0.x`, checkpoint `language_model.model.layers.0.x`.
    """
    shorter, longer = sorted((a, b), key=len)
    if longer == shorter or longer.endswith("." + shorter):
        return True
    one, other = _NUMBERED.fullmatch(shorter), _NUMBERED.fullmatch(longer)
    return bool(one and other and one["layer"] == other["layer"]
                and {*one["before"].split(".")} <= {*other["before"].split(".")})
