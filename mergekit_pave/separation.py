"""What a task vector may keep when the other tasks' inputs are to stay as they are.

`D_t` (out, in) is the task vector of a linear layer, `C_s` (in, in) the second moment of its inputs
on task `s`. Added to the base, `D_t` does its work on its own inputs, `E |D_t x_t|^2`, and harm on
those of the others, `E |D_t x_s|^2 = tr(D_t C_s D_t^T)`. The matrix that is closest to it on its
own inputs while doing little on theirs,

    min_D'  E |(D' - D_t) x_t|^2  +  mu sum_{s != t} E |D' x_s|^2  +  e |D'|^2,

is, by its normal equations,

    D_t' = D_t C_t (C_t + mu sum_{s != t} C_s + e I)^-1.

`mu = 0` is the task vector itself, as far as its data reaches. With `mu = 1` the denominator is the
same for all tasks, and the sum of all `D_t'` is RegMean's closed form (arXiv 2212.09849).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_pave.numeric import cholesky


@torch.no_grad()
def separate(delta: Tensor, own: Tensor, allowed: Tensor) -> Tensor:
    """`D_t C_t M^-1` (out, in) float64.

    Args:
        delta: `D_t` (out, in).
        own: `C_t` (in, in).
        allowed: `M = C_t + mu sum C_s`, damped (`subspace.damped`), float64; overwritten.

    Raises:
        torch.linalg.LinAlgError: `M` is not positive definite.
    """
    factor = cholesky(allowed)
    moved = own.to(factor) @ delta.to(factor).mT
    return torch.cholesky_solve(moved, factor).mT
