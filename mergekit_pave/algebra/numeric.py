"""Precision of the tensors that are computed with, and a look at whether they are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Columns that are factorised at once: wide enough for matrix products at full speed.
BLOCK = 384


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


def finite(tensor: Tensor) -> bool:
    """Whether it holds no NaN or Inf, by its least and largest value: a tenth of the time of a look
    at every one."""
    return not tensor.numel() or all(end.isfinite() for end in torch.aminmax(tensor))


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
    product, step = x.new_empty(width, width), max(128, -(-width // blocks))
    for i in range(0, width, step):
        torch.mm(x[:, i : i + step].mT, x[:, : i + step], out=product[i : i + step, : i + step])
    return product


def cholesky(moment: Tensor) -> Tensor:
    """Lower factor of a second moment (n, n) float64, which is overwritten by it; what lies above
    the diagonal is none of the factor's.

    One that has not full rank and was stored in float32 has eigenvalues below zero, of the size of
    its rounding: it gets the least damping, in powers of ten of its mean diagonal, that lifts them.

    Raises:
        torch.linalg.LinAlgError: it is not finite, or no second moment.
    """
    diagonal = moment.diagonal().clone()
    for damping in (0.0, *(10.0**power for power in range(-9, -3))):
        if damping:
            above = moment.triu(1)
            moment.copy_(above).add_(above.mT).diagonal().copy_(
                diagonal + damping * diagonal.mean())
        if _factorised(moment):
            return moment
    raise torch.linalg.LinAlgError("it is not positive definite")


def solved(moment: Tensor, right: Tensor) -> Tensor:
    """(m, n) `right moment^-1` for a second moment (n, n) float64, which is overwritten.

    Raises:
        torch.linalg.LinAlgError: the moment is not finite, or no second moment.
    """
    factor = cholesky(moment)
    half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def _factorised(moment: Tensor) -> bool:
    """Replace a matrix's lower triangle by its Cholesky factor; False where it has none.

    In blocks of columns, each from the ones before it. The library factorises a block alone: of a
    whole matrix it takes as long to clear what lies above the diagonal as to find the factor.
    """
    width = len(moment)
    step = width if moment.is_cuda else BLOCK
    for start in range(0, width, step):
        end = min(start + step, width)
        before = moment[start:end, :start]
        here, below = moment[start:end, start:end], moment[end:, start:end]
        factor, failed = torch.linalg.cholesky_ex(torch.addmm(here, before, before.mT, alpha=-1))
        if failed:
            return False
        # What lies above the diagonal stays, for another attempt.
        here.copy_(factor + here.triu(1))
        below.addmm_(moment[end:, :start], before.mT, alpha=-1)
        below.copy_(torch.linalg.solve_triangular(factor.mT, below, upper=True, left=False))
    return True
