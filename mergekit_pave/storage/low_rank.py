"""A compressed fine-tune on disk, and the one tensor in it.

    manifest.json               base, settings, and how every tensor is kept
    tensors-NNNNN.safetensors   what the base does not have
    model/                      config and tokenizer
    lora/                       an adapter for peft, if asked for

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

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_pave.algebra.numeric import double, rounding
from mergekit_pave.algebra.tsv import ROUNDING, Factors, factors
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.covariances import MANIFEST
from mergekit_pave.storage.files import write_atomically

KIND = "mergekit-pave compressed model"
FORMAT = 2
MODEL, LORA = "model", "lora"
_STORED = {"base": (), "rows": ("", "::rows"), "factors": ("::u", "::s", "::v"), "whole": ("",)}


@dataclass(frozen=True)
class Kept:
    """How one tensor is kept.

    Attributes:
        how: `base`, `rows`, `factors` or `whole`.
        shape: of the tensor.
        dtype: of the tensor.
        base: `checksum` of the base's tensor, which is needed again, None for `whole`.
        file: where the rest lies, None for `base`.
        rank: triples, of `factors`.
        energy: `sum s_i^2` of those kept and of all, of `factors`.
    """

    how: str
    shape: tuple[int, ...]
    dtype: str
    base: str | None = None
    file: str | None = None
    rank: int | None = None
    energy: tuple[float, float] | None = None

    def __post_init__(self):
        """Raise `ValueError` for what no `compress` has written."""
        fits = (
            self.how in _STORED
            and isinstance(getattr(torch, self.dtype, None), torch.dtype)
            and (self.base is None) == (self.how == "whole")
            and (self.file is None) == (self.how == "base")
            # Nothing outside the folder is read.
            and (self.file is None or Path(self.file).name == self.file)
        )
        if not fits:
            raise ValueError(f"{self.how}, {self.dtype} and {self.file} do not fit together")


def pack(
    tuned: Tensor, base: Tensor | None, count: int, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor], tuple[float, float] | None]:
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
    how: str, stored: Mapping[str, Tensor], base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The tensor in `dtype`: the inverse of `pack`, the sum of factors in float32 or better."""
    if how == "whole":
        return stored[""]
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
        self._open: tuple[str, Any] = ("", None)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        except FileNotFoundError:
            raise PaveError(
                f"{folder} holds no compressed model (no {MANIFEST}): name a task's folder in "
                "what `mergekit-pave compress` wrote."
            ) from None
        except (OSError, ValueError) as error:
            raise self._damaged(f"{MANIFEST}: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
            raise PaveError(f"{folder} holds something else than a compressed model.")
        if manifest.get("format") != FORMAT:
            raise PaveError(
                f"{folder} is from another version of mergekit-pave; compress again."
            )
        try:
            self.base: dict[str, str | None] = {k: manifest["base"][k] for k in ("id", "hub")}
            if not (self.folder / MODEL / "config.json").is_file():
                raise ValueError(f"no {MODEL}/config.json")
            self.tensors = {name: Kept(**kept) for name, kept in manifest["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"{MANIFEST}: {error!r}") from error

    def _damaged(self, what: str) -> PaveError:
        return PaveError(f"{self.folder} is damaged ({what}); compress again.")

    def tensor(self, name: str, base: Tensor | None) -> Tensor:
        """The tensor as reconstructed on the base's."""
        kept = self.tensors[name]
        try:
            stored = {key: self._read(kept.file, name + key) for key in _STORED[kept.how]}
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{kept.file}: {error}") from error
        return restore(kept.how, stored, base, getattr(torch, kept.dtype))

    def _read(self, file: str, key: str) -> Tensor:
        if self._open[0] != file:
            self._open = (file, safe_open(self.folder / file, "pt"))
        return self._open[1].get_tensor(key)


# Bytes held in memory before they are written.
WINDOW = 2**30


class _Writer:
    """Fills a task's folder, a file at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Kept] = {}
        self.bytes = 0
        self._held: dict[str, Tensor] = {}
        self._files = 0

    def add(self, name: str, stored: Mapping[str, Tensor], kept: Mapping[str, Any]) -> None:
        file = f"tensors-{self._files:05d}.safetensors" if stored else None
        self.tensors[name] = Kept(file=file, **kept)
        self._held |= {name + suffix: tensor for suffix, tensor in stored.items()}
        if sum(tensor.nbytes for tensor in self._held.values()) >= WINDOW:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        path = self.folder / f"tensors-{self._files:05d}.safetensors"
        write_atomically(path, lambda temporary: save_file(self._held, temporary))
        self.bytes += path.stat().st_size
        self._files += 1
        self._held = {}
