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
TOLERANCE = 3e-7
MIN_GAP = 1e-2
# Pivots this small, relative to the largest, cannot be told from zero after the QR.
SINGULAR = 1e-13
# A tall weight's own factor may come from `W^T W` while that costs it no digits that matter.
WELL_CONDITIONED = 1e-2


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
    directions, largest, route = _smallest(factor, count, seed)
    basis = lift(directions)
    # Rayleigh-Ritz on `A` itself: whatever the way here did to the digits of the factor, the
    # values are those of these directions, and spare directions are put to use.
    image = w.mT @ basis if c is None else c @ (w.mT @ basis)
    _, values, v = torch.linalg.svd(image, full_matrices=False)
    return Tail((basis @ v.mT).flip(1)[:, :count], values.flip(0)[:count], largest, route)


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
    Forming `A A^T` instead would lose half the digits of the tail.
    """
    r, lift = (w, lambda x: x) if w.shape[0] <= w.shape[1] else _column_space(w)
    a = r if c is None else r @ c
    return torch.linalg.qr(a.mT, mode="r").R, lift


def _column_space(w: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`R_w` (in, in) of a tall `W = Q R_w`, and multiplication by `Q`."""
    r = torch.linalg.cholesky_ex(_lower_gram(w)).L.mT
    pivots = r.diagonal()
    if pivots.min() > WELL_CONDITIONED * pivots.max():
        # `W R_w^-1` stays in the column space of W whatever R_w is; the QR only tidies up.
        return r, lambda x: torch.linalg.qr(
            w @ torch.linalg.solve_triangular(r, x, upper=True)
        ).Q
    q, r = torch.linalg.qr(w)
    return r, lambda x: q @ x


def _lower_gram(w: Tensor, blocks: int = 4) -> Tensor:
    """The lower triangle of `W^T W` (and some of the upper one), for 5/8 of the work."""
    width = w.shape[1]
    gram, step = w.new_zeros(width, width), -(-width // blocks)
    for i in range(0, width, step):
        torch.mm(w[:, i:].mT, w[:, i : i + step], out=gram[i:, i : i + step])
    return gram


def _smallest(t: Tensor, count: int, seed: int) -> tuple[Tensor, float, str]:
    """(R, >= count) right singular vectors of `t` for its smallest values, the largest value."""
    size = t.shape[0]
    if size < DIRECT_BELOW or count > DIRECT_FRACTION * size:
        return *_direct(t, count), "direct"
    pivots = t.diagonal().abs()
    if pivots.min() > SINGULAR * pivots.max():
        block = count + max(8, count // 4)
        top = _leading(lambda q: t.mT @ (t @ q), _noise(t, size, 4, seed), 1)
        low = _leading(lambda q: _inverse_gram(t, q), _noise(t, size, block, seed), count)
        if top is not None and low is not None:
            return low, torch.linalg.matrix_norm(t @ top, 2).item(), "iterative"
    return *_direct(t, count), "fallback"


def _direct(t: Tensor, count: int) -> tuple[Tensor, float]:
    _, values, v = torch.linalg.svd(t)
    return v.mT[:, len(values) - count :], values[0].item()


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
