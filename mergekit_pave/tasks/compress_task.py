"""TSV-Compress of one fine-tune: from its checkpoint and the base's to its folder (`compressed`).

Tensors are read one at a time from the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.algebra.tsv import kept_rank
from mergekit_pave.errors import PaveError
from mergekit_pave.models.checkpoint import checkpoint
from mergekit_pave.models.folder import companions, copy_companions
from mergekit_pave.models.source import LoaderOptions, ModelSource, tokenizer_folder
from mergekit_pave.storage.archive import dtype_of
from mergekit_pave.storage.identity import checksum
from mergekit_pave.storage.low_rank import MODEL, Kept, Writer, pack


@dataclass(frozen=True)
class Settings:
    """The options of `compress`; `dtype` None keeps the fine-tune's own."""

    tasks: int
    rank_fraction: float | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Summary:
    """What compression did to one task.

    Attributes:
        task: name of its folder.
        stored: bytes of its safetensors files.
        model: bytes of the fine-tune's tensors.
        share: numbers kept of those in the matrices that became factors.
        energy: `sum s_i^2` kept, of all those matrices together.
        worst: the matrix that keeps the least of it, and how much; None without one.
        ways: number of tensors kept in each way.
        too_large: matrices whose change would be no smaller as factors.
    """

    task: str
    stored: int
    model: int
    share: float
    energy: float
    worst: tuple[str, float] | None
    ways: dict[str, int]
    too_large: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.task}: {self.stored:,} bytes, {self.stored / max(self.model, 1):.1%} of the "
            f"model's {self.model:,}; "
        )
        if self.worst:
            text += (
                f"{self.ways['factors']} matrices as factors, {self.share:.1%} of their numbers "
                f"with {self.energy:.1%} of the energy of their change (least: "
                f"{self.worst[1]:.1%} of {self.worst[0]}); "
            )
        text += f"{self.ways['whole']} tensors whole, {self.ways['rows']} by their changed rows, "
        text += f"{self.ways['base']} as in the base."
        if self.too_large and not self.ways["factors"]:
            text += (
                f" The factors of {self.too_large} changed matrices would be no smaller than these "
                "are: lower --rank-fraction."
            )
        return text


def compress_task(
    tuned: ModelSource, base: ModelSource, folder: Path, header: Mapping[str, Any],
    settings: Settings, device: torch.device,
) -> None:
    """Fill `folder`, the manifest last.

    Args:
        tuned: the fine-tune.
        base: the model that it was tuned from.
        folder: new and empty.
        header: what the manifest says of the run, `task` and `base` among it.
        settings: of the run.
        device: where to decompose.

    Raises:
        PaveError: models that do not fit, or broken weights.
    """
    writer, copies = Writer(folder), _copies(tuned)
    origin = ShardedTensorIndex.from_disk(base.path)
    loader, size, too_large = LazyTensorLoader(origin, lazy_unpickle=False), 0, 0
    own = LazyTensorLoader.from_disk(tuned.path, lazy_unpickle=False)
    names = own.index.tensor_paths.keys()
    if names.isdisjoint(origin.tensor_paths):
        raise PaveError(
            f"{tuned.label} shares no tensor's name with the base {base.label}: name the model "
            "that it was fine-tuned from (where that is this one, save both by one class of "
            "transformers: AutoModel leaves a prefix out)."
        )
    progress = tqdm(tuned.tensors(), header["task"], len(names), unit="tensor", leave=False)
    for name, tensor in progress:
        if name in copies and torch.equal(tensor, own.get_tensor(copies[name])):
            continue
        there = loader.get_tensor(name) if name in origin.tensor_paths else None
        if there is not None and there.shape != tensor.shape:
            raise PaveError(
                f"{name} of {tuned.label} is {tuple(tensor.shape)} and {tuple(there.shape)} in the "
                f"base {base.label}: compress needs fine-tunes of that base, of the same size."
            )
        size += tensor.nbytes
        rank = kept_rank(tensor.shape, settings.tasks, settings.rank_fraction) if (
            tensor.ndim == 2) else 0
        dtype = dtype_from_name(settings.dtype) or tensor.dtype
        try:
            here = None if there is None else there.to(device)
            how, stored, energy = pack(tensor.to(device), here, rank, dtype)
        except ValueError as error:
            raise PaveError(
                f"{name} of {tuned.label} or of its base {error}; download or save that "
                "checkpoint again."
            ) from error
        # Tensors of a pickled checkpoint may share their memory, so they are copied.
        stored = {key: value.to("cpu", copy=True).contiguous() for key, value in stored.items()}
        writer.add(name, stored, Kept(
            how, tuple(tensor.shape), _held_dtype(name, tensor), energy=energy,
            base=None if how == "whole" or there is None else checksum(there),
            rank=len(stored["::s"]) if how == "factors" else None,
        ))
        too_large += how == "whole" and there is not None and tensor.ndim == 2
    writer.files.flush()
    copy_companions(_companions(tuned), folder / MODEL)
    summary = _summary(header["task"], writer, size, too_large)
    writer.finish({"version": version("mergekit-pave"), **header, "summary": asdict(summary)})


def _copies(model: ModelSource) -> dict[str, str]:
    """The stored tensors that the class ties to other stored ones (tensor -> its original).

    Two copies that were not restored to the very same values would no longer be tied.
    """
    options = LoaderOptions(trust_remote_code=model.trust_remote_code)
    return checkpoint(Path(model.path), model.label, model.config(), options).copies


def _companions(model: ModelSource) -> dict[str, Path]:
    """Config and tokenizer; a merged adapter's folder has no tokenizer."""
    found = companions(Path(model.path))
    if any("tokenizer" in name for name in found):
        return found
    folder = tokenizer_folder(model)
    return companions(folder) | found if folder else found


def _held_dtype(name: str, tensor: Tensor) -> str:
    try:
        return dtype_of(tensor)
    except ValueError as error:
        raise PaveError(f"{name} cannot be compressed: {error}.") from error


def _summary(task: str, writer: Writer, size: int, too_large: int) -> Summary:
    ways = Counter(kept.how for kept in writer.tensors.values())
    parts = [(name, kept.shape, kept.rank, *kept.energy) for name, kept in writer.tensors.items()
             if kept.rank is not None and kept.energy is not None]
    numbers = sum(prod(shape) for _, shape, *_ in parts)
    left, total = sum(part[3] for part in parts), sum(part[4] for part in parts)
    return Summary(
        task=task, stored=writer.files.bytes, model=size,
        share=sum(k * (sum(shape) + 1) for _, shape, k, *_ in parts) / max(numbers, 1),
        energy=left / total if parts else 1.0,
        worst=min(((name, own / whole) for name, _, _, own, whole in parts),
                  key=lambda item: item[1], default=None),
        ways={way: ways[way] for way in ("base", "rows", "factors", "whole")},
        too_large=too_large,
    )
