"""The tensors between two blocks of a model, in memory up to a bound, beyond it on disk."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map


class States:
    """Keeps trees of tensors (a tensor, a tuple, a model's output) outside of the accelerator.

    Args:
        room: bytes that may stay in main memory; further tensors go to files.
        folder: where these files lie, made if need be; they go with the tensors they hold.
    """

    def __init__(self, room: int, folder: Path):
        self.room = room
        self.folder = folder
        self.used = 0

    def keep(self, *trees: Any) -> tuple[Any, ...]:
        """Trees with `_Kept` in place of tensors; a tensor that occurs in several is kept once."""
        kept: dict[int, _Kept] = {}

        def put(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in kept:
                kept[id(leaf)] = self._put(leaf)
            return kept[id(leaf)]

        return tuple(tree_map(put, tree) for tree in trees)

    def get(self, tree: Any) -> Any:
        """A copy of what was kept, on its first devices; changes to it leave the original alone."""
        return tree_map(lambda leaf: leaf.load() if isinstance(leaf, _Kept) else leaf, tree)

    def _put(self, tensor: Tensor) -> _Kept:
        device, size = tensor.device, tensor.nbytes
        # A view would keep all of what it looks at.
        tensor = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self.used + size <= self.room:
            self.used += size
            kept = _Kept(device, tensor)
            weakref.finalize(kept, self._let_go, size)
            return kept
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            path = Path(file.name)
        save_file({"x": tensor}, path)
        kept = _Kept(device, path)
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    def _let_go(self, size: int) -> None:
        self.used -= size


class _Kept:
    """One tensor in memory or in a file, and the device it came from."""

    def __init__(self, device: torch.device, where: Tensor | Path):
        self.device = device
        self.where = where

    def load(self) -> Tensor:
        if isinstance(self.where, Path):
            return load_file(self.where)["x"].to(self.device)
        return self.where.to(self.device, copy=True)
