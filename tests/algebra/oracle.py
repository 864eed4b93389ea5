"""The paper's purification, written straight from its formula, in extended precision.

Nothing here shares a line or an identity with the package: `A` is formed, decomposed, truncated,
and multiplied by an explicit inverse. The inverse costs as many digits as the covariance's
condition number has, so float64 could not judge a float64 result. `numpy.longdouble` can (on
x86), but LAPACK does not serve it: hence one-sided Jacobi and Gauss-Jordan, twenty lines each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EXTENDED = np.finfo(np.longdouble).eps < 1e-18
"False where longdouble is merely double: ill-conditioned cases cannot be judged there."


class Purified(NamedTuple):
    weight: np.ndarray
    "(out, in) W'"
    values: np.ndarray
    "(R,) singular values of `A`, descending"
    removed: np.ndarray
    "(out, in) W - W'"


def purified(weight, covariance, count: int) -> Purified:
    """`SVD_{R - count}(W C_e) C_e^-1` for a damped covariance."""
    w, c = np.asarray(weight, np.longdouble), np.asarray(covariance, np.longdouble)
    a = w @ c
    wide = a.shape[0] < a.shape[1]
    scaled, rotation = jacobi(a.T if wide else a)
    kept = len(rotation) - count
    truncated = scaled[:, :kept] @ rotation[:, :kept].T
    result = (truncated.T if wide else truncated) @ inverse(c)
    return Purified(result, np.sqrt((scaled**2).sum(0)), w - result)


def jacobi(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(G, J)` with `matrix = G J^T`, J orthogonal, G's columns orthogonal, longest first."""
    n, eps = matrix.shape[1], np.finfo(np.longdouble).eps
    # LAPACK's answer saves sweeps, once a Newton step has made it orthogonal to all digits.
    j = np.linalg.svd(matrix.astype(float))[2].T.astype(np.longdouble)
    j = 1.5 * j - 0.5 * j @ (j.T @ j)
    g = matrix @ j
    ring = list(range(n + n % 2))  # round robin: every pair meets once per sweep
    for _ in range(40):
        worst = 0.0
        for _ in range(len(ring) - 1):
            pairs = [sorted(x) for x in zip(ring[: len(ring) // 2], ring[::-1], strict=False)]
            p, q = np.array([x for x in pairs if x[1] < n], int).reshape(-1, 2).T
            worst = max(worst, _rotate(g, j, p, q, eps))
            ring = [ring[0], ring[-1], *ring[1:-1]]
        if worst < n * eps:
            break
    order = np.argsort(-(g**2).sum(0), kind="stable")
    return g[:, order], j[:, order]


def _rotate(g, j, p, q, eps) -> float:
    """Make columns `p` and `q` of `g` orthogonal, pairwise; return the worst cosine met."""
    a, b, c = (g[:, p] ** 2).sum(0), (g[:, q] ** 2).sum(0), (g[:, p] * g[:, q]).sum(0)
    live = np.abs(c) > eps * np.sqrt(a * b)
    p, q, a, b, c = p[live], q[live], a[live], b[live], c[live]
    if not len(p):
        return 0.0
    zeta = (b - a) / (2 * c)
    t = np.where(zeta >= 0, 1, -1) / (np.abs(zeta) + np.hypot(1, zeta))
    cos = 1 / np.hypot(1, t)
    for x in (g, j):
        x[:, p], x[:, q] = cos * (x[:, p] - t * x[:, q]), cos * (x[:, q] + t * x[:, p])
    return float((np.abs(c) / np.sqrt(a * b)).max())


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Gauss-Jordan with partial pivoting."""
    n = len(matrix)
    both = np.concatenate([matrix.astype(np.longdouble), np.eye(n, dtype=np.longdouble)], 1)
    for i in range(n):
        pivot = i + np.argmax(np.abs(both[i:, i]))
        both[[i, pivot]] = both[[pivot, i]]
        both[i] /= both[i, i]
        others = np.arange(n) != i
        both[others] -= np.outer(both[others, i], both[i])
    return both[:, n:]
