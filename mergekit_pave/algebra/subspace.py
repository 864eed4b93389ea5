"""The directions a fine-tuned weight hardly uses on its own task, and how to take them out.

`W` (out, in) is the weight, `C` (in, in) the uncentred second moment of its inputs, and
`A = W (C + eI) = U S V^T`. The paper keeps the top `r` components of `A` and multiplies by the
inverse of `C + eI`. The inverse cancels: `U_r U_r^T A (C + eI)^-1 = U_r U_r^T W`. With `U_k` the
`k = R - r` least activated left singular vectors (`R = min(out, in)`), that is

    W' = W - U_k (U_k^T W).

So nothing is inverted, and only the tail of the spectrum is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.algebra.numeric import lower_gram

# Below this size, or with a longer tail than this fraction of it, a full SVD is faster.
DIRECT_BELOW = 128
DIRECT_FRACTION = 0.1
# Products with a block before a full SVD is the better way to spend the time.
MAX_APPLIES = 100
# One filter may favour the best direction of a block over its worst by this much, not more: the
# worst has to keep some digits of its own.
MAX_GROWTH = 1e11
# Rounding of a product leaves this share of other directions even in an exact vector.
ROUNDING = 1e-15
MAX_DEGREE = 10
# Angle (Davis-Kahan) allowed between the tail and its true subspace, and the relative gap
# assumed at least: no direction is better than its neighbour in a cluster tighter than that.
TOLERANCE = 2e-7
MIN_GAP = 1e-2
# The error of a singular value is the square of its vector's angle.
VALUE_TOLERANCE = 1e-5
# Pivots this small, relative to the largest, may be zero: the QR's rounding hides the difference.
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
    """A copy of `C` (n, n), symmetric, as `C + eI` in float64; `e` is relative to the mean
    diagonal, or absolute."""
    if (dampening_frac is None) == (regularization is None):
        raise ValueError("give either dampening_frac or regularization")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square; got shape {tuple(covariance.shape)}")
    c = covariance.to(torch.float64, copy=True)
    if not c.sum().isfinite():  # far cheaper than a look at every entry
        raise ValueError("the covariance has NaN or infinite entries")
    mean = c.diagonal().mean().item()
    if mean <= 0:
        raise ValueError("the covariance is empty: its trace is not positive")
    c.diagonal().add_((dampening_frac or 0.0) * mean + (regularization or 0.0))
    return c


@torch.no_grad()
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
    w, c = _checked(weight, covariance, count, subspace)
    if subspace == "random":
        return _random_tail(w, count, seed)
    factor, lift = _reduce(w, c)
    directions, largest, route = _smallest(factor, count, seed)
    basis = lift(directions)
    # Rayleigh-Ritz on `A` itself: whatever the way here did to the digits of the factor, the
    # values are those of these directions, and spare directions are put to use.
    image = basis.mT @ w if c is None else basis.mT @ w @ c
    u, values, _ = torch.linalg.svd(image, full_matrices=False)
    return Tail((basis @ u).flip(1)[:, :count], values.flip(0)[:count], largest, route)


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
    w, c = _checked(weight, covariance, 0, subspace)
    if subspace == "random":
        return w.new_ones(min(w.shape))
    return torch.linalg.svdvals(w if c is None else w @ c)


def _checked(
    weight: Tensor, covariance: Tensor | None, count: int, subspace: str
) -> tuple[Tensor, Tensor | None]:
    """Weight and covariance in float64; `None` where no covariance is looked at."""
    if subspace not in ("covariance", "svd", "random"):
        raise ValueError(f"subspace must be covariance, svd or random; got {subspace!r}")
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"a weight is a real matrix; got {weight.dtype} {tuple(weight.shape)}")
    if not 0 <= count < min(weight.shape):
        raise ValueError(f"count must be in [0, {min(weight.shape) - 1}]; got {count}")
    if not weight.sum(dtype=torch.float64).isfinite():
        raise ValueError("the weight has NaN or infinite entries")
    w, width = weight.to(torch.float64), weight.shape[1]
    if subspace != "covariance":
        return w, None
    if covariance is None or covariance.shape != (width, width):
        found = None if covariance is None else tuple(covariance.shape)
        raise ValueError(f"the weight needs a {(width, width)} covariance; got {found}")
    return w, covariance.to(w)


def _random_tail(w: Tensor, count: int, seed: int) -> Tail:
    """`count` random directions, uniform within the column space of a tall `w`."""
    rank = min(w.shape)
    basis = torch.linalg.qr(_noise(w, rank, count, seed)).Q
    if w.shape[0] > rank:
        basis = torch.linalg.qr(w).Q @ basis
    return Tail(basis, w.new_ones(count), 1.0, "random")


def _noise(like: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    # Drawn on the CPU, so that every device starts from the same numbers.
    drawn = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(
        rows, columns, dtype=torch.float64, generator=drawn, device="cpu").to(like)


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
    lower, failed = torch.linalg.cholesky_ex(lower_gram(w))
    r, pivots = lower.mT, lower.diagonal()
    if not failed and pivots.min() > WELL_CONDITIONED * pivots.max():
        # `W R_w^-1` stays in the column space of W whatever R_w is; the QR only tidies up.
        solve = torch.linalg.solve_triangular
        return r, lambda x: torch.linalg.qr(_thin(w, solve(r, x, upper=True))).Q
    q, r = torch.linalg.qr(w)
    return r, lambda x: q @ x


def _smallest(t: Tensor, count: int, seed: int) -> tuple[Tensor, float, str]:
    """(R, >= count) right singular vectors of `t` for its smallest values, the largest value."""
    size = t.shape[0]
    if size < DIRECT_BELOW or count > DIRECT_FRACTION * size:
        return *_direct(t, count), "direct"
    pivots = t.diagonal().abs()
    if pivots.min() > SINGULAR * pivots.max():
        some = _noise(t, size, min(4, size), seed)
        top = _leading(lambda x: _thin(t.mT, _thin(t, x)), some, 1, VALUE_TOLERANCE)
        block = min(size, count + max(8, count // 2))
        low = _leading(lambda x: _inverse_gram(t, x), _noise(t, size, block, seed), count)
        if top is not None and low is not None:
            return low, torch.linalg.matrix_norm(_thin(t, top), 2).item(), "iterative"
    return *_direct(t, count), "fallback"


def _direct(t: Tensor, count: int) -> tuple[Tensor, float]:
    _, values, v = torch.linalg.svd(t)
    return v.mT[:, len(values) - count :], values[0].item()


def _thin(a: Tensor, x: Tensor) -> Tensor:
    """`A X` for a few columns X, written as rows: some BLAS are ten times slower with columns."""
    return (x.mT @ a.mT).mT


def _inverse_gram(t: Tensor, x: Tensor) -> Tensor:
    """`(T^T T)^-1 X` by two triangular solves; its largest eigenvectors are the tail of `T`."""
    x = torch.linalg.solve_triangular(t.mT, x, upper=False)
    return torch.linalg.solve_triangular(t, x, upper=True)


def _leading(
    apply: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float = TOLERANCE
) -> Tensor | None:
    """The largest eigenvectors of a positive operator, by Chebyshev-filtered block iteration.

    Each round diagonalises the operator within the block (Rayleigh-Ritz), then multiplies the
    block by the polynomial of the operator that is flat on `[0, edge]`, where `edge` is the
    block's own smallest eigenvalue, and grows fastest beyond. A block wider than `count` finds
    repeated eigenvalues, and its speed depends on the gap behind the whole block.

    Returns:
        (n, block) orthonormal, of which the first `count` have converged; None if they did not
        within `MAX_APPLIES`.
    """
    if count == 0:
        return start[:, :0]
    x, applies = torch.linalg.qr(apply(start)).Q, 1
    while applies < MAX_APPLIES:
        image = apply(x)
        values, v = torch.linalg.eigh(x.mT @ image)
        values, v = values.flip(0), v.flip(1)
        x, image = x @ v, image @ v
        wanted, edge = values[:count], values[-1]
        # Davis-Kahan, vector by vector: the angle to the wanted subspace is at most the residual
        # over the distance to the first unwanted eigenvalue.
        gaps = torch.maximum(wanted - values[min(count, len(values) - 1)], MIN_GAP * wanted)
        angles = torch.linalg.vector_norm((image[:, :count] - x[:, :count] * wanted) / gaps, dim=0)
        angle = torch.linalg.vector_norm(angles)
        if angle <= tolerance:
            # The filter treats all unwanted directions alike. One bare product damps the far
            # ones, where what little is left would weigh most.
            return torch.linalg.qr(image).Q
        if not edge > 0:
            return None
        degree = _degree((wanted / edge).tolist(), angles.tolist(), angle.item() / tolerance)
        x = torch.linalg.qr(_chebyshev(apply, x, image, 2 / edge, degree)).Q
        applies += degree
    return None


def _degree(eigenvalues: list[float], angles: list[float], reduction: float) -> int:
    """The degree that shrinks the residual by `reduction`, within what the digits allow.

    `eigenvalues`, descending, are over `edge`. `T_m(z)` is about `exp(m acosh(z)) / 2`.
    """
    rates = [math.acosh(max(2 * value - 1, 1 + 1e-9)) for value in eigenvalues]
    enough = math.log(2 * reduction) / rates[-1]
    # A direction that one vector has all but found hardly contaminates the others, so the filter
    # may raise it further above them.
    most = min(
        (math.log(2 * MAX_GROWTH) - math.log(min(max(angle, ROUNDING), 1))) / rate
        for angle, rate in zip(angles, rates, strict=True)
    )
    return max(1, min(MAX_DEGREE, math.ceil(enough), int(most)))


def _chebyshev(
    apply: Callable[[Tensor], Tensor], x: Tensor, image: Tensor, scale: Tensor, degree: int
) -> Tensor:
    """`T_degree(scale * M - 1) x` where `image = M x` is known already."""
    before, now = x, scale * image - x
    for _ in range(degree - 1):
        before, now = now, 2 * (scale * apply(now) - now) - before
    return now
