"""Precision of the tensors that are computed with, and a look at whether they are numbers."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from mergekit_pave.errors import PaveError


def wide(tensor: Tensor) -> Tensor:
    """In float32, or its own dtype where that is better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def check_finite(tensor: Tensor, model: Hashable, name: str | None) -> None:
    """Raise `PaveError` where a weight of `model` holds NaN or Inf."""
    if not torch.isfinite(tensor).all():
        raise PaveError(
            f"{name} of {model} holds NaN or Inf; download or save that checkpoint again."
        )
