"""Polar factors: the matrix with orthonormal columns that is nearest to a given one.

For `X` (n, p), `n >= p`, of full rank it is `X (X^T X)^-1/2` (Procrustes), one symmetric
factorisation. Singular values of `X` that are small beside its largest lose their digits in the
square: in float64 below about 1e-7 of it, in float32 below about 1e-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_pave.algebra.leading import gram_eigh

# Eigenvalue of a Gram matrix over its largest: above, its root has as many digits as an SVD's.
WELL_CONDITIONED = 1e-7
# Singular value of a stack over its largest: below, directions of two tasks are the same one, as
# exactly as float32 can say. A higher bound would join directions of real tasks, which come close.
COINCIDENT = 1e-7
# The same where the directions were found in float32: below, they may be the same one.
DOUBTFUL = 1e-5
# Singular value over the largest: below, it and its directions are computed in float64.
SMALL = 0.08


def polar(x: Tensor, blur: float = 0.0) -> Tensor:
    """(n, p) float64: `U V^T` of the singular value decomposition of `x`, Procrustes' solution.

    Where the columns of `x` are dependent (tasks with the same directions, or more columns than
    rows) the nearest orthonormal matrix is not unique. The null directions then stay zero
    instead of being filled arbitrarily: what tasks have in common is shared out among them, and
    nothing that none of them has is added. Those that differ by less than `blur` are the same, too.
    """
    flat = x.shape[0] < x.shape[1]
    values, q = gram_eigh(x.mT if flat else x)
    if values[0] > max(WELL_CONDITIONED, blur**2) * values[-1]:
        root = (q * values.rsqrt()) @ q.mT
        return root @ x if flat else x @ root
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > max(COINCIDENT, blur) * s[0]
    return u[:, keep] @ vh[keep]


def single_polar(blocks: list[Tensor]) -> Tensor | None:
    """(n, p) float32 polar factor of blocks (n, k_t) with orthonormal columns, side by side.

    `None` where directions of two blocks may be the same one: float32 cannot tell.

    The square in float32 serves all singular values but the small ones, a few percent of them
    (the directions in which two blocks come close to each other). For those, singular triples
    are made exact in float64 from products with a few columns only.
    """
    x = torch.cat(blocks, 1)
    if x.shape[0] < x.shape[1]:
        return None
    values, q = _spectrum(blocks, x)
    small = int((values < SMALL**2 * values[-1]).sum())
    if small > len(values) // 4:
        return _mostly_small(x)
    rest, values = q[:, small:], values[small:]
    if not small:
        return x @ ((rest * values.rsqrt()) @ rest.mT)
    triples = _small(x, q[:, :small], rest, values)
    if triples is None:
        return None
    left, right = triples
    # The rest is orthogonal only to directions that have float32's error.
    rest = torch.addmm(rest, right, right.mT @ rest, alpha=-1)
    return torch.addmm(left @ right.mT, x, (rest * values.rsqrt()) @ rest.mT)


def _spectrum(blocks: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of `x^T x`.

    That of two blocks, `[[1, C], [C^T, 1]]`, has the eigenvalues `1 - c` and `1 + c` with the
    eigenvectors `[a, -b]` and `[a, b]`, where `C = a c b^T`: an SVD of half the size.
    """
    if len(blocks) == 2 and blocks[0].shape == blocks[1].shape:
        a, c, bh = torch.linalg.svd(blocks[0].mT @ blocks[1])
        a, b = a * 0.5**0.5, bh.mT * 0.5**0.5
        q = torch.cat([torch.cat([a, -b]), torch.cat([a.flip(1), b.flip(1)])], 1)
        return torch.cat([1 - c, 1 + c.flip(0)]), q
    return gram_eigh(x)


def _small(x: Tensor, q: Tensor, rest: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Left (n, small) and right (p, small) singular vectors that `q` has in float32's exactness.

    One step of a block Jacobi method: what the square of `x`, in float64, has between these
    directions and the others is removed by dividing it by the differences of eigenvalues.
    """
    exact, right = x.double(), q.double()
    images = exact @ right
    squares = images.square().sum(0).to(x.dtype)
    between = rest.mT @ (exact.mT @ images).to(x.dtype)
    turn = rest @ (between / (values[:, None] - squares))
    right = torch.linalg.qr(right - turn.double()).Q
    images = exact @ right
    squares, turn = torch.linalg.eigh(images.mT @ images)
    if not squares[0] > DOUBTFUL**2 * values[-1]:
        return None
    return (images @ (turn * squares.rsqrt())).to(x.dtype), (right @ turn).to(x.dtype)


def _mostly_small(x: Tensor) -> Tensor | None:
    exact = x.double()
    values, q = gram_eigh(exact)
    if not values[0] > DOUBTFUL**2 * values[-1]:
        return None
    return (exact @ ((q * values.rsqrt()) @ q.mT)).to(x.dtype)
