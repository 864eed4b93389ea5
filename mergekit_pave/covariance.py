"""Streaming uncentred second moments of a linear layer's inputs.

Only the running sum `X^T X` and the number of rows are kept; a layer's activations are
never retained. On disk a symmetric matrix is folded into half its size (`fold`).
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Sum of `x x^T` over rows, and their count.

    Attributes:
        sum: `(width, width)`, float32, or float64 when rows come in float64.
        count: rows added so far.
    """

    def __init__(self, width: int):
        self.width = width
        self.count = 0
        self.sum: Tensor | None = None

    def add(self, rows: Tensor) -> SecondMoment:
        """Add every row of `rows`, `(..., width)` of any float dtype, on its own device."""
        rows = rows.detach().reshape(-1, self.width)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.sum is None:
            self.sum = rows.new_zeros(self.width, self.width)
        # With a model spread over devices one site may be fed from several of them.
        self.sum.addmm_(rows.T.to(self.sum.device), rows.to(self.sum.device))
        self.count += rows.shape[0]
        return self

    @property
    def mean(self) -> Tensor:
        """The second moment `X^T X / n`, `(width, width)`, exactly symmetric."""
        if not self.count:
            raise ValueError("a second moment needs at least one row")
        mean = self.sum / self.count
        return (mean + mean.T) / 2


def fold(matrix: Tensor) -> Tensor:
    """Pack a symmetric `(n, n)` matrix into `(ceil(n / 2), n + 1)`.

    Row `i` of the lower triangle has `i + 1` entries and row `n - 1 - i` has `n - i`:
    together always `n + 1`, so the two share one row of the result.
    """
    n = matrix.shape[0]
    half = (n + 1) // 2
    folded = matrix.new_zeros(half, n + 1)
    folded[:, :n] = matrix[:half].tril()
    # Reversing the columns puts the last rows' entries to the right of the first rows',
    # where `tril` left zeros.
    folded[:, 1:] += matrix.flip((0, 1))[:half].triu()
    return folded


def unfold(folded: Tensor) -> Tensor:
    """Inverse of `fold`: the symmetric `(n, n)` matrix."""
    half, n = folded.shape[0], folded.shape[1] - 1
    lower = folded.new_zeros(n, n)
    # The middle row of an odd `n` is stored twice; the second writing wins.
    lower[n - half :] = folded[:, 1:].triu().flip(1).flip(0)
    lower[:half] = folded[:, :n].tril()
    return lower + lower.tril(-1).T
