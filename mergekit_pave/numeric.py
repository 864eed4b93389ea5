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


def cholesky(moment: Tensor) -> Tensor:
    """Lower factor of a second moment (n, n) float64, which is overwritten.

    One that has not full rank and was stored in float32 has eigenvalues below zero, of the size of
    its rounding: it gets the least damping, in powers of ten of its mean diagonal, that lifts them.

    Raises:
        torch.linalg.LinAlgError: it is not finite, or no second moment.
    """
    mean, damping = moment.diagonal().mean(), 0.0
    for more in (0.0, *(10.0**power for power in range(-9, -3))):
        moment.diagonal().add_((more - damping) * mean)
        damping = more
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return factor
    raise torch.linalg.LinAlgError("it is not positive definite")


def check_finite(tensor: Tensor, model: Hashable, name: str | None) -> None:
    """Raise `PaveError` where a weight of `model` holds NaN or Inf."""
    if not torch.isfinite(tensor).all():
        raise PaveError(
            f"{name} of {model} holds NaN or Inf; download or save that checkpoint again."
        )
