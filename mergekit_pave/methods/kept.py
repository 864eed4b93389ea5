"""Changes of weights that a method has computed before, for the next merge of the same models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from mergekit.merge_methods import TensorEntry, TensorGroup
from torch import Tensor

from mergekit_pave.methods.layers import Layer
from mergekit_pave.storage import decompositions
from mergekit_pave.storage.files import cache_folder
from mergekit_pave.storage.identity import checksum

# The shorter side of a weight from which on its change is kept: smaller ones take milliseconds.
_LARGE = 256


@dataclass(frozen=True)
class Kept:
    """The changes of one group of weights.

    Attributes:
        dtype: of the weights.
        device: of the weights.
        identity: of their values; `None` where nothing is kept.
    """

    dtype: torch.dtype
    device: torch.device
    identity: str | None

    @classmethod
    def of(cls, group: TensorGroup) -> Kept:
        base, identity = group.base.tensor, None
        if min(base.shape) >= _LARGE and decompositions.room():
            tensors = [base, *(entry.tensor for entry in group.non_base)]
            identity = "|".join(map(checksum, tensors))
        return cls(base.dtype, base.device, identity)

    def change(self, compute: Callable[[], Tensor], *about: object) -> Tensor:
        """(m, n) what `compute` finds, in float32, or in float64 for such weights.

        Args:
            compute: finds it, where it is not kept.
            about: all that it depends on beside the weights.
        """
        def rounded() -> Tensor:
            return compute().to(torch.promote_types(self.dtype, torch.float32))

        if self.identity is None:
            return rounded()
        written = repr((decompositions.KIND.format, self.identity, *about))
        name = hashlib.sha256(written.encode()).hexdigest()[:40]
        folder = cache_folder() / "decompositions"
        return decompositions.remembered_change(folder, name, rounded).to(self.device)

    def moments(self, layers: Iterable[Layer]) -> list[object]:
        """What tells the covariances of layers apart, for `change`."""
        if self.identity is None:
            return []
        return [(layer.transposed, layer.identity if layer.estimated_from is None
                 else checksum(layer.estimated_from)) for layer in layers]


def places(group: TensorGroup, entries: Iterable[TensorEntry]) -> list[int]:
    """Which of a group's models these are, whatever they are called."""
    ids = [entry.id for entry in entries]
    return [i for i, entry in enumerate(group.non_base) if entry.id in ids]
