"""Leading singular subspaces of a float32 matrix from one float32 symmetric factorisation.

TSV-Merge (`tsv`) needs of a task vector `D` (m, n), `m >= n`, only its leading `k` directions, and
of those only what they span: `U' S V'^T` stays the same when the columns of `U_t` and `V_t` are
rotated and `S_t` with them. So orthonormal `U` (m, k), `V` (n, k) and the core `C` (k, k) with

    U C V^T = D V V^T,   V spanning the leading k right singular vectors,

do, and `V` comes from the eigenvectors of `D^T D`: a third of the time of an SVD.

Squaring costs digits: the rounding of `D^T D` in float32 is relative to the square of the largest
singular value, and a fine-tuned weight has a few that are fifty times the `k`-th. Those few are
found by subspace iteration beforehand and scaled down to the size of the others. That leaves every
singular vector as it is, so that the spectrum of the square fits into float32's digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.algebra.numeric import lower_gram

# Rounds of subspace iteration, `D^T D` times a block.
ROUNDS = 4
# Its block has one column for so many directions that are kept, and no fewer than these.
SHARE, LEAST = 6, 16
# Eigenvalues of `D^T D` that are more than so many times the block's last one have converged after
# `ROUNDS`, and are scaled down.
CONVERGED = 4.0
# Singular values over the block's last: above, the block's directions have all of float32's digits.
EXACT = 6.0
# Largest eigenvalue over the `k`-th: beyond, float32 does not tell the `k`-th from its neighbours.
SPREAD = 400.0
# One in so many directions on either side of the `k`-th is separated a second time.
WINDOW = 8
# Columns from which on float32 pays. Below, everything takes milliseconds.
LARGE = 256


@dataclass(frozen=True)
class Leading:
    """The leading directions of a matrix (m, n): `u @ core @ v.T` is what they hold of it.

    Attributes:
        u: (m, k), orthonormal columns.
        core: (k, k).
        v: (n, k), orthonormal columns.
    """

    u: Tensor
    core: Tensor
    v: Tensor


@dataclass(frozen=True)
class Block:
    """Singular triples of a matrix (m, n) by subspace iteration, the strongest first.

    Attributes:
        images: (m, p) `D v`: orthogonal columns.
        values: (p,) their norms, the estimates of the singular values.
        v: (n, p), orthonormal columns.
    """

    images: Tensor
    values: Tensor
    v: Tensor


def gram_eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of `x^T x` for `x` (m, n)."""
    # LAPACK is column-major: its upper triangle is the lower one that was computed.
    values, vectors = torch.linalg.eigh(lower_gram(x).mT, UPLO="U")
    return values, vectors


def strongest(d: Tensor, count: int) -> Block:
    """About the `count` strongest singular triples of `d` (m, n); the last of them are rough."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(d.shape[1], count, generator=generator, dtype=d.dtype).to(d.device)
    for _ in range(ROUNDS):
        v = torch.linalg.qr(d.mT @ (d @ v)).Q
    images = d @ v
    values, turn = torch.linalg.eigh(images.mT @ images)
    turn = turn.flip(1)
    return Block(images @ turn, values.flip(0).clamp_min(0).sqrt(), v @ turn)


def leading(d: Tensor, count: int, floor: float = 0.0) -> Leading | None:
    """The leading `count` directions of `d` (m, n) float32.

    `None` where float32 cannot tell them from the others: where the `count`-th singular value is
    not well above `floor`, or too small beside those that precede it.
    """
    if d.shape[0] < d.shape[1]:
        flipped = leading(d.mT.contiguous(), count, floor)
        return flipped and Leading(flipped.v, flipped.core.mT, flipped.u)
    columns = d.shape[1]
    even, strong = _even(d, count)
    values, vectors = gram_eigh(even)
    cut = columns - count
    if not values[cut] > values[-1] / SPREAD:
        return None
    # The directions beside the cut are separated again, from products whose rounding is relative
    # to their own size.
    start, stop = max(0, cut - columns // WINDOW), min(columns, cut + columns // WINDOW)
    near = vectors[:, start:stop]
    turn = _apart(near.double(), (d @ near).double()).to(d.dtype)
    vectors[:, cut:stop] = near @ turn[:, cut - start :]
    v = vectors[:, cut:]
    # Scaled down, the strongest have lost digits; `v` is tilted until it holds them as they were.
    along = v.mT @ strong
    v = torch.addmm(v, strong - v @ along, along.mT)
    images = d @ v
    sizes = torch.linalg.vector_norm(images, dim=0)
    if not sizes.min() > 2 * floor:
        return None
    # Orthonormal columns by Cholesky factorisation, which is exact for columns that almost are.
    images /= sizes
    factor, failed = torch.linalg.cholesky_ex(images.mT @ images)
    if failed:
        return None
    u = torch.linalg.solve_triangular(factor.mT, images, upper=True, left=False)
    return Leading(u, factor.mT * sizes, v)


def _even(d: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`d` with the strongest of its `count` leading directions scaled down, and those of them that
    are exact (n, p)."""
    block = strongest(d, max(LEAST, count // SHARE))
    level = CONVERGED**0.5 * block.values[-1]
    converged = min(int((block.values > level).sum()), count // 2)
    # They stay above the directions that are not scaled, so that they still lead.
    level = torch.maximum(level, block.values[converged])
    weaker = level / block.values[:converged]
    strong = block.v[:, :converged]
    even = torch.addmm(d, block.images[:, :converged] * (1 - weaker), strong.mT, alpha=-1)
    return even, strong[:, : int((block.values > EXACT * block.values[-1]).sum())]


def _apart(v: Tensor, images: Tensor) -> Tensor:
    """What turns columns that are orthonormal up to rounding into singular vectors, ascending."""
    factor = torch.linalg.cholesky(v.mT @ v)
    images = torch.linalg.solve_triangular(factor.mT, images, upper=True, left=False)
    turn = torch.linalg.eigh(images.mT @ images).eigenvectors
    return torch.linalg.solve_triangular(factor.mT, turn, upper=True)
