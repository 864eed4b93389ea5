"""A compressed fine-tune on disk, and the one tensor in it.

    manifest.json               base, settings, and how every tensor is kept
    tensors-NNNNN.safetensors   what the base does not have
    model/                      config and tokenizer

The folder is an `archive`.

A tensor is kept in the first of these ways that fits:

    base      as the base has it: nothing is stored
    rows      a matrix of which few rows changed (embeddings of seen tokens): NAME::rows, and
              these rows under NAME, where that takes no more room than the factors
    factors   a matrix: NAME::u (m, k), NAME::s (k,), NAME::v (n, k), where that is smaller than it
    whole     all else (norms, biases, convolutions, small heads): NAME

Only `factors` lose anything: they are the k leading singular triples of the difference from the
base (TSV-Compress, arXiv 2412.00081, section 4.1), `k (m + n + 1) / (m n)` of the numbers of an
m x n matrix. With 8 tasks that is 25 % of a square one, 15.6 % of one that is 4 times as long as
wide. Where the change has fewer triples than that (an adapter that was merged into the matrix), k
is their number, so that a square matrix may become factors with two tasks, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_pave.algebra.numeric import double, rounding
from mergekit_pave.algebra.tsv import ROUNDING, Factors, factors
from mergekit_pave.storage.archive import (
    MANIFEST,
    Archive,
    Count,
    Dtype,
    Entry,
    Filling,
    Kind,
    Reference,
    inside,
)

FORMAT = 3
KIND = Kind(
    "mergekit-pave compressed model", FORMAT, "The compressed model in {} is", "compress again"
)
MODEL = "model"
Way = Literal["base", "rows", "factors", "whole"]
_STORED: dict[Way, tuple[str, ...]] = {
    "base": (), "rows": ("", "::rows"), "factors": ("::u", "::s", "::v"), "whole": ("",)}


@dataclass(frozen=True)
class Kept:
    """How one tensor is kept.

    Attributes:
        how: one of the four ways.
        shape: of the tensor.
        dtype: of the tensor.
        base: `checksum` of the base's tensor, which is needed again, None for `whole`.
        rank: triples, of `factors`.
        energy: `sum s_i^2` of those kept and of all, of `factors`.
    """

    how: Way
    shape: tuple[Count, ...]
    dtype: Dtype
    base: str | None = None
    rank: Count | None = None
    energy: tuple[float, float] | None = None

    def check(self, parts: Mapping[str, Entry | None]) -> None:
        """Raise `ValueError` unless these parts, by suffix, are what `compress` has written."""
        found = {key: part for key, part in parts.items() if part is not None}
        shapes = {key: part.shape for key, part in found.items()}
        expected: dict[str, tuple[int | None, ...]]
        if self.how == "factors":
            m, n = self.shape
            expected = {"::u": (m, self.rank), "::s": (self.rank,), "::v": (n, self.rank)}
        elif self.how == "rows":
            rows = shapes.get("::rows", ())
            expected = {"": (*rows, *self.shape[1:]), "::rows": rows[:1]}
        else:
            expected = {"": self.shape} if self.how == "whole" else {}
        if shapes != expected or (self.base is None) != (self.how == "whole"):
            raise ValueError(f"{self.how} of {list(self.shape)} does not fit {shapes}")
        dtypes = {"": self.dtype, "::rows": "int32"}
        if any(part.dtype != dtypes.get(key, part.dtype) for key, part in found.items()):
            raise ValueError(f"{self.how} in {self.dtype} does not fit {parts}")


@dataclass(frozen=True)
class _About:
    """What the manifest says beside its entries."""

    base: Reference
    tensors: dict[str, Kept]


def pack(
    tuned: Tensor, base: Tensor | None, count: int, dtype: torch.dtype
) -> tuple[Way, dict[str, Tensor], tuple[float, float] | None]:
    """How a tensor is kept, what is stored (suffix of its name -> tensor), and its energy.

    Args:
        tuned: the fine-tune's tensor.
        base: the base's of the same shape, None where it has none.
        count: triples to keep of a matrix, at most.
        dtype: of the singular vectors; the values stay in float32.
    """
    if base is None or not tuned.is_floating_point():
        same = base is not None and torch.equal(tuned, base)
        return ("base", {}, None) if same else ("whole", {"": tuned}, None)
    if torch.equal(tuned, base.to(tuned.dtype)):
        return "base", {}, None
    if tuned.ndim == 2:
        room = count * (sum(tuned.shape) + 1)
        rows = (tuned != base.to(tuned.dtype)).any(1).nonzero()[:, 0]
        if len(rows) * (tuned.shape[1] + 1) < min(room + 1, tuned.numel()):
            return "rows", {"": tuned[rows], "::rows": rows.to(torch.int32)}, None
        part, total = _low_rank(tuned, base, count)
        if part is not None:
            stored = {"::u": part.u.to(dtype), "::s": part.s.float(), "::v": part.v.to(dtype)}
            return "factors", stored, (part.s.square().sum().item(), total)
    return "whole", {"": tuned}, None


def _low_rank(tuned: Tensor, base: Tensor, count: int) -> tuple[Factors | None, float]:
    """The leading `count` triples of the change, or all it has, where these are fewer numbers
    than the matrix; and the energy of the change."""
    most = (tuned.numel() - 1) // (sum(tuned.shape) + 1)
    if not min(count, most):
        return None, 0.0
    delta = double(tuned) - double(base)
    total = delta.square().sum().item()
    if not isfinite(total):
        raise ValueError("holds NaN or Inf")
    noise = rounding(base)
    if count > most and _exceeds(delta, most, max(ROUNDING**2 * total, noise**2)):
        return None, total
    # One more than there may be tells whether there are more.
    part = factors(delta, min(count, most + 1), noise)
    return (part if 0 < len(part.s) <= most else None), total


def _exceeds(delta: Tensor, most: int, noise: float) -> bool:
    """Whether `delta` is certain to have more than `most` triples of which the square is above
    `noise`.

    Nearly every change of a full fine-tuning has, and need not be decomposed in vain after this
    look at a part of its columns: none of their singular values is larger than the matrix's own one
    of the same number.
    """
    long = delta if delta.shape[0] > delta.shape[1] else delta.mT
    some = long[:, : most + 1]
    return bool(torch.linalg.eigvalsh(some.mT @ some)[0] > noise)


def restore(
    how: Way, stored: Mapping[str, Tensor], base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The tensor in `dtype`: the inverse of `pack`, the sum of factors in float32 or better.

    Raises:
        ValueError: the base's tensor is needed, and there is none.
    """
    if how == "whole":
        return stored[""]
    if base is None:
        raise ValueError("the base has no such tensor")
    if how == "base":
        return base.to(dtype)
    if how == "rows":
        return base.to(dtype).index_copy(0, stored["::rows"].long(), stored[""])
    common = torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32)
    u, s, v = (stored[key].to(common) for key in ("::u", "::s", "::v"))
    return torch.addmm(base.to(common), u * s, v.mT).to(dtype)


class Compressed:
    """One task's folder.

    Raises:
        PaveError: it is not complete, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._archive, about = Archive.opened(
            self.folder, KIND, _About,
            f"{folder} holds no compressed model (no {MANIFEST}): name a task's folder in what "
            "`mergekit-pave compress` wrote.")
        self.base, self.tensors = about.base, about.tensors
        with self._archive.guard(f"{MANIFEST}: "):
            entries = self._archive.entries
            for name, kept in self.tensors.items():
                kept.check({key: entries.get(name + key) for key in _STORED[kept.how]})
            if not inside(self.folder, f"{MODEL}/config.json").is_file():
                raise ValueError(f"no {MODEL}/config.json")
        self._archive.check()

    def tensor(self, name: str, base: Tensor | None) -> Tensor:
        """The tensor as reconstructed on the base's.

        Raises:
            PaveError: it is not as it was written, or `base` is of another shape.
        """
        kept = self.tensors[name]
        stored = {key: self._archive.tensor(name + key) for key in _STORED[kept.how]}
        with self._archive.guard(f"{name}: "):
            if base is not None and tuple(base.shape) != kept.shape:
                raise ValueError(f"the base's is {list(base.shape)}, and {list(kept.shape)} needed")
            return restore(kept.how, stored, base, getattr(torch, kept.dtype))


# Bytes held in memory before they are written.
WINDOW = 2**30


class Writer:
    """Fills a task's folder, a file at a time."""

    def __init__(self, folder: Path):
        self.files = Filling(folder, KIND, "tensors", WINDOW)
        self.tensors: dict[str, Kept] = {}

    def add(self, name: str, stored: Mapping[str, Tensor], kept: Kept) -> None:
        """Take what is stored of a tensor, by the suffix of its name."""
        self.tensors[name] = kept
        self.files.hold({name + suffix: tensor for suffix, tensor in stored.items()})

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the manifest, with the JSON `about` in it, which makes the folder complete."""
        tensors = {name: asdict(kept) for name, kept in self.tensors.items()}
        self.files.finish(**about, tensors=tensors)
