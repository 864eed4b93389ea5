"""Merges at any strength out of two that are on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tensor_writer import TensorWriter

from mergekit_pave.models.folder import companions, copy_companions


def at_strength(zero: Path, one: Path, strength: float, out: Path) -> None:
    """Write `M(0) + s (M(1) - M(0))` to a model folder, tensor by tensor.

    Args:
        zero: the merge at strength 0.
        one: the merge at strength 1, with the same tensors.
        strength: `s`.
        out: the folder to write; each tensor in its dtype, from float32 or better.
    """
    loaders = [LazyTensorLoader(ShardedTensorIndex.from_disk(str(folder)), lazy_unpickle=False)
               for folder in (zero, one)]
    writer = TensorWriter(str(out))
    for name in sorted(loaders[1].index.tensor_paths):
        start, end = (loader.get_tensor(name) for loader in loaders)
        if not end.is_floating_point():
            writer.save_tensor(name, end)
            continue
        wide = torch.promote_types(end.dtype, torch.float32)
        moved = torch.lerp(start.to(wide), end.to(wide), strength)
        writer.save_tensor(name, moved.to(end.dtype))
    writer.finalize()
    copy_companions(companions(one), out)
