"""EMR-Merging (Huang et al., arXiv 2405.17461): one elected task vector, a mask for each task.

With task vectors d_t = w_t - w_0, elementwise (the paper's Elect, Mask and Rescale):

    elect     s = +1 where sum_t d_t > 0, else -1
              u = s * max over the t with d_t s > 0 of |d_t|, and 0 where there is none
    mask      M_t = d_t s > 0
    rescale   l_t = sum |d_t| / sum |M_t u|
    task t    w_0 + l_t M_t u

The merged model is w_0 + u. At every place it is the weight of one of the models or of the
base, so `elect` picks instead of adding: in any dtype the result has no rounding error, and u
follows from it and the base exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.algebra.numeric import summed, wide


def elect(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """`w_0 + u`: of the models on the elected side of the base, the one furthest from it."""
    positive = summed(_task_vector(base, model) for model in models) > 0
    merged = base
    for model in models:
        merged = torch.where(torch.where(positive, model > merged, model < merged), model, merged)
    return merged


def trace(base: Tensor, model: Tensor, merged: Tensor) -> Trace:
    """What recovers one task from the merged weight: its mask, and the sums of the rescaler."""
    own, unified = _task_vector(base, model), _task_vector(base, merged)
    # Where d_t has the elected sign, u is at least as large, so the sign of u is s. A product
    # of the two could underflow.
    mask = (own > 0) & (unified > 0) | (own < 0) & (unified < 0)
    return Trace(mask, own.abs().sum().item(), unified.abs().mul_(mask).sum().item())


@dataclass(frozen=True)
class Sums:
    """Of one tensor: `sum |d_t|`, `sum |M_t u|`, and its number of entries."""

    own: float
    unified: float
    count: int


def scale(sums: Iterable[Sums], rescaler: str) -> float:
    """`l_t`, from all tensors of a task.

    `tensor_mean` adds the means of the tensors, so that a bias counts as much as a matrix, as
    the authors' code does; `global` adds everything, as the paper writes it.
    """
    own = unified = 0.0
    for tensor in sums:
        divisor = tensor.count if rescaler == "tensor_mean" else 1
        own += tensor.own / divisor
        unified += tensor.unified / divisor
    # With an empty mask the task's model is the base, whatever the factor.
    return own / unified if unified else 1.0


def task_weight(base: Tensor, merged: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`w_0 + l_t M_t u`, in float32 or better.

    Written from the merged side, so that with a factor of 1 nothing is rounded.
    """
    unified = _task_vector(base, merged)
    return torch.where(mask, wide(merged) + (scale - 1) * unified, wide(base))


def _task_vector(base: Tensor, model: Tensor) -> Tensor:
    return wide(model) - wide(base)


@dataclass(frozen=True)
class Trace:
    """One task at one tensor: its mask (bool), `sum |d_t|` and `sum |M_t u|`."""

    mask: Tensor
    own: float
    unified: float
