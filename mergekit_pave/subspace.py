"""The directions a fine-tuned weight hardly uses on its own task, and how to take them out.

`W` (out, in) is the weight, `C` (in, in) the uncentred second moment of its inputs, and
`A = W (C + eI) = U S V^T`. The paper keeps the top `r` components of `A` and multiplies by the
inverse of `C + eI`. The inverse cancels: `U_r U_r^T A (C + eI)^-1 = U_r U_r^T W`. With `U_k` the
`k = R - r` least activated left singular vectors (`R = min(out, in)`), that is

    W' = W - U_k (U_k^T W).

So nothing is inverted, and only the tail of the spectrum is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this size, or with a longer tail than this fraction of it, a full SVD is faster.
DIRECT_BELOW = 128
DIRECT_FRACTION = 0.15
# The Lanczos basis may fill this much of the space; then a full SVD is cheaper than going on.
LANCZOS_LIMIT = 0.6
# Angle (Davis-Kahan) allowed between the tail and its true subspace, and the relative gap
# assumed at least: no direction is better than its neighbour in a cluster tighter than that.
TOLERANCE = 1e-7
MIN_GAP = 1e-3
# Pivots this small, relative to the largest, cannot be told from zero after the QR.
SINGULAR = 1e-13


@dataclass(frozen=True)
class Tail:
    """The least activated end of one weight's spectrum.

    `values` are the true singular values of `A` within the span of `basis`, whichever route
    found it.
    """

    basis: Tensor
    "(out, k) float64, orthonormal columns, least activated first."
    values: Tensor
    "(k,) float64, ascending."
    largest: float
    "Largest singular value of `A`."
    route: str
    "'iterative', 'direct' (too small, too long a tail), 'fallback' (iteration gave up), 'random'."

    @property
    def normalised(self) -> Tensor:
        """(k,) `values / largest`: comparable between models, as rank allocation wants them."""
        return self.values / self.largest if self.largest > 0 else self.values


def damped(
    covariance: Tensor,
    *,
    dampening_frac: float | None = None,
    regularization: float | None = None,
) -> Tensor:
    """`C + eI` in float64, symmetrised; `e` is relative to the mean diagonal, or absolute."""
    if (dampening_frac is None) == (regularization is None):
        raise ValueError("give either dampening_frac or regularization")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square; got shape {tuple(covariance.shape)}")
    if not covariance.isfinite().all():
        raise ValueError("the covariance has NaN or infinite entries")
    c = covariance.to(torch.float64)
    c = (c + c.mT).div_(2)
    mean = c.diagonal().mean().item()
    if mean <= 0:
        raise ValueError("the covariance is empty: its trace is not positive")
    c.diagonal().add_(dampening_frac * mean if regularization is None else regularization)
    return c


def tail(
    weight: Tensor,
    covariance: Tensor | None = None,
    count: int = 0,
    *,
    subspace: str = "covariance",
    seed: int = 0,
) -> Tail:
    """The `count` least activated left singular vectors of `A`, and its largest singular value.

    For a tall weight they are taken inside the column space of `W`; the rest of the output space
    is never reached and has nothing to remove.

    Args:
        weight: (out, in), any floating dtype.
        covariance: (in, in), from `damped`; only "covariance" looks at it.
        count: at most `R - 1`.
        subspace: "covariance" ranks by `A = W C_e`, "svd" by `A = W`, "random" not at all.
        seed: of the random directions, and of the start of the iteration (the result of which
            does not depend on it beyond rounding).
    """
    _check(weight, covariance, count, subspace)
    w = weight.to(torch.float64)
    if subspace == "random":
        return _random_tail(w, count, seed)
    c = covariance.to(w) if subspace == "covariance" else None
    factor, lift = _reduce(w, c)
    basis, values, largest, route = _smallest(factor, count, seed)
    return Tail(lift(basis), values, largest, route)


def purify(weight: Tensor, basis: Tensor) -> Tensor:
    """`W - U (U^T W)` for `basis` U (out, k); float32, or float64 for a float64 weight."""
    if basis.ndim != 2 or basis.shape[0] != weight.shape[0]:
        raise ValueError(f"basis {tuple(basis.shape)} does not fit weight {tuple(weight.shape)}")
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u = basis.to(w)
    return torch.addmm(w, u, u.mT @ w, alpha=-1)


def spectrum(
    weight: Tensor, covariance: Tensor | None = None, subspace: str = "covariance"
) -> Tensor:
    """All `R` singular values of `A`, float64, descending."""
    _check(weight, covariance, 0, subspace)
    w = weight.to(torch.float64)
    if subspace == "random":
        return w.new_ones(min(w.shape))
    return torch.linalg.svdvals(w @ covariance.to(w) if subspace == "covariance" else w)


def _check(weight: Tensor, covariance: Tensor | None, count: int, subspace: str) -> None:
    if subspace not in ("covariance", "svd", "random"):
        raise ValueError(f"subspace must be covariance, svd or random; got {subspace!r}")
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"a weight is a real matrix; got {weight.dtype} {tuple(weight.shape)}")
    if not 0 <= count < min(weight.shape):
        raise ValueError(f"count must be in [0, {min(weight.shape) - 1}]; got {count}")
    if not weight.isfinite().all():
        raise ValueError("the weight has NaN or infinite entries")
    width = weight.shape[1]
    if subspace == "covariance" and (covariance is None or covariance.shape != (width, width)):
        found = None if covariance is None else tuple(covariance.shape)
        raise ValueError(f"the weight needs a {(width, width)} covariance; got {found}")


def _random_tail(w: Tensor, count: int, seed: int) -> Tail:
    """`count` random directions, uniform within the column space of a tall `w`."""
    rank = min(w.shape)
    basis = torch.linalg.qr(_noise(w, rank, count, seed)).Q
    if w.shape[0] > rank:
        basis = torch.linalg.qr(w).Q @ basis
    return Tail(basis, w.new_ones(count), 1.0, "random")


def _noise(like: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    # Drawn on the CPU, so that every device starts from the same numbers.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)


def _reduce(w: Tensor, c: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Upper triangular `T` (R, R) with the singular values of `A`, and the way back.

    `A A^T = T^T T` for a wide or square weight, so the right singular vectors of `T` are the
    left ones of `A`. A tall `W = Q R_w` is first replaced by `R_w`, and `Q` put back at the end.
    The Gram matrix `A A^T` itself would lose half the digits of the tail.
    """
    if w.shape[0] <= w.shape[1]:
        a = w if c is None else w @ c
        return torch.linalg.qr(a.mT, mode="r").R, lambda u: u
    q, r = torch.linalg.qr(w)
    if c is None:
        return torch.linalg.qr(r.mT, mode="r").R, lambda u: q @ u
    return torch.linalg.qr((r @ c).mT, mode="r").R, lambda u: q @ u


def _smallest(t: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, float, str]:
    """The `count` smallest right singular pairs of `t`, ascending, and the largest value."""
    size = t.shape[0]
    if size < DIRECT_BELOW or count > DIRECT_FRACTION * size:
        return *_direct(t, count), "direct"
    pivots = t.diagonal().abs()
    if pivots.min() > SINGULAR * pivots.max():
        block = count + max(8, count // 4)
        top = _leading(lambda q: t.mT @ (t @ q), _noise(t, size, 4, seed), 1)
        low = _leading(lambda q: _inverse_gram(t, q), _noise(t, size, block, seed), count)
        if top is not None and low is not None:
            # Rayleigh-Ritz on `t` itself, which the rounding of the inverse has not touched.
            _, values, v = torch.linalg.svd(t @ low, full_matrices=False)
            largest = torch.linalg.matrix_norm(t @ top, 2).item()
            return (low @ v.mT).flip(1)[:, :count], values.flip(0)[:count], largest, "iterative"
    return *_direct(t, count), "fallback"


def _direct(t: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    _, values, v = torch.linalg.svd(t)
    return v.mT.flip(1)[:, :count], values.flip(0)[:count], values[0].item()


def _inverse_gram(t: Tensor, x: Tensor) -> Tensor:
    """`(T^T T)^-1 X` by two triangular solves; its largest eigenvectors are the tail of `T`."""
    x = torch.linalg.solve_triangular(t.mT, x, upper=False)
    return torch.linalg.solve_triangular(t, x, upper=True)


def _leading(
    apply: Callable[[Tensor], Tensor], start: Tensor, count: int
) -> Tensor | None:
    """Block Lanczos: Ritz vectors of the largest eigenvalues of a symmetric positive operator.

    A block wider than `count` finds repeated eigenvalues, and makes the speed depend on the gap
    behind the whole block instead of the one behind `count`.

    Returns:
        (n, block) orthonormal, of which the first `count` have converged; None if they did not
        before the basis filled `LANCZOS_LIMIT` of the space.
    """
    size, block = start.shape
    limit = int(LANCZOS_LIMIT * size)
    basis, projected = start.new_empty(limit, size).mT, start.new_zeros(limit, limit)
    q = torch.linalg.qr(start).Q
    for old in range(0, limit - block + 1, block):
        new = old + block
        basis[:, old:new] = q
        known = basis[:, :new]
        z = apply(q)
        for _ in range(2):  # one pass of Gram-Schmidt leaves rounding behind, two do not
            overlap = known.mT @ z
            z -= known @ overlap
            projected[:new, old:new] += overlap
        q, r = torch.linalg.qr(z)
        if new // block < 3:
            continue
        values, y = torch.linalg.eigh(projected[:new, :new], UPLO="U")
        values, y = values.flip(0), y.flip(1)
        residual = torch.linalg.matrix_norm(r @ y[old:, :count])
        gap = torch.maximum(values[count - 1] - values[count], MIN_GAP * values[count - 1])
        if residual <= TOLERANCE * gap:
            return known @ y[:, :block]
    return None
