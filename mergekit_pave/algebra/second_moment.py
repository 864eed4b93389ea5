"""Streaming uncentred second moments of a linear layer's inputs.

Only the running sum `X^T X` and the number of rows are kept; a layer's activations are
never retained. The matrix is symmetric, so only its lower triangle is summed, and on disk it
is folded into half its size (`fold`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The triangle is summed in at most eight rows of blocks: 56 % of the work of the whole
# product, and blocks wide enough for a matrix product to run at full speed.
_BLOCK, _BLOCKS = 256, 8
# Rows that are folded, unfolded or mirrored at a time: what these need besides their result.
_ROWS = 256


class SecondMoment:
    """Sum of `x x^T` over rows, and their count.

    Attributes:
        sum: `(width, width)`, float32, or float64 when rows come in float64; only its lower
            triangle holds the sum. `None` before the first row.
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
        rows = rows.to(self.sum.device)
        for block in _runs(self.width, max(_BLOCK, -(-self.width // _BLOCKS))):
            target = self.sum[block, : block.stop]
            target.addmm_(rows[:, block].T, rows[:, : block.stop])
        self.count += rows.shape[0]
        return self

    def finite(self) -> Tensor:
        """Whether all rows so far were finite, and not too large to square: bool, a scalar.

        A sum of squares cannot lose an Inf or NaN again, so the diagonal tells without
        another look at the rows.
        """
        return self.total.diagonal().isfinite().all()

    @property
    def total(self) -> Tensor:
        """`sum`; raises `ValueError` before the first row."""
        if self.sum is None:
            raise ValueError("a second moment needs at least one row")
        return self.sum


def fold(matrix: Tensor) -> Tensor:
    """Pack a symmetric `(n, n)` matrix into `(ceil(n / 2), n + 1)`; reads the lower triangle.

    Row `i` of the lower triangle has `i + 1` entries and row `n - 1 - i` has `n - i`:
    together always `n + 1`, so the two share one row of the result.
    """
    n = matrix.shape[0]
    folded = matrix.new_zeros((n + 1) // 2, n + 1)
    for rows in _runs(folded.shape[0], _ROWS):
        folded[rows, :n] = matrix[rows].tril(rows.start)
        # Reversed, the last rows' entries lie to the right of the first rows', where `tril`
        # left zeros.
        last = matrix[n - rows.stop : n - rows.start].flip((0, 1))
        folded[rows, 1:] += last.triu(rows.start)
    return folded


def unfold(folded: Tensor) -> Tensor:
    """Inverse of `fold`: the symmetric `(n, n)` matrix."""
    half, n = folded.shape[0], folded.shape[1] - 1
    matrix = folded.new_empty(n, n)
    # The middle row of an odd `n` is stored twice; the second writing wins.
    for rows in _runs(half, _ROWS):
        last = folded[rows, 1:].triu(rows.start).flip((0, 1))
        matrix[n - rows.stop : n - rows.start] = last
    for rows in _runs(half, _ROWS):
        matrix[rows] = folded[rows, :n].tril(rows.start)
    return _mirrored(matrix)


def _mirrored(matrix: Tensor) -> Tensor:
    """Write the lower triangle of `(n, n)` over the upper one, in place."""
    for rows in _runs(matrix.shape[0], _ROWS):
        corner = matrix[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[rows, rows.stop :] = matrix[rows.stop :, rows].T
    return matrix


def _runs(length: int, step: int) -> Iterator[slice]:
    """`length` indices as slices of `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
