"""Precision of the tensors that are computed with, and a look at whether they are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, added up in the first of them, which is overwritten; two exist at a time.

    Raises:
        ValueError: there are none.
    """
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("there is nothing to add up")
    return total


def wide(tensor: Tensor) -> Tensor:
    """In float32, or its own dtype where that is better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.to(torch.float64)


def rounding(weight: Tensor) -> float:
    """The largest singular value that the rounding of a matrix (m, n) to float32 may have.

    A task vector is a difference of such weights, however small it is itself: what lies below is
    noise, also where the weights have been widened since.
    """
    spacing = torch.finfo(torch.float32).eps
    size = torch.linalg.vector_norm(wide(weight)).item() / max(weight.numel(), 1) ** 0.5
    return spacing * size * sum(side**0.5 for side in weight.shape)


def lower_gram(x: Tensor, blocks: int = 8) -> Tensor:
    """(n, n) `x^T x` of `x` (m, n), for little more than half of the work: what lies above the
    diagonal is undefined."""
    width = x.shape[1]
    product, step = x.new_zeros(width, width), max(128, -(-width // blocks))
    for i in range(0, width, step):
        torch.mm(x[:, i : i + step].mT, x[:, : i + step], out=product[i : i + step, : i + step])
    return product


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
