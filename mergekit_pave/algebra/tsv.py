"""Task singular vectors (Gargiulo et al., CVPR 2025, arXiv 2412.00081).

`D_t = W_t - W_0` (out, in) is the delta of task `t = 1 ... T`, `D_t = U_t S_t V_t^T` its singular
value decomposition and `R = min(out, in)`. Every task keeps its `k = R / T` leading triples, so
that all of them fit into `R` dimensions. Side by side they are

    U = [U_1 ... U_T] (out, Tk),  S = diag(S_1 ... S_T),  V = [V_1 ... V_T] (in, Tk).

Singular task interference (section 3.2) is the sum of absolute entries of

    (U^T U - I) S (V^T V - I),

0 when no two tasks share an input or an output direction. TSV-Merge (section 4.2, Algorithm 1)
replaces U and V by the nearest matrices with orthonormal columns, their polar factors
`X (X^T X)^-1/2`, and merges to `W_0 + lambda U' S V'^T`. TSV-Compress (section 4.1) stores the
`k` triples of each task instead.

Everything is computed in float64, from the smaller Gram matrix where squaring costs no digits
that matter: a half to a third of the time of an SVD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.algebra.numeric import double

# Relative to the largest singular value of a delta. Below are rounding errors (an adapter that was
# merged into a weight in float32 has rank 16, the delta full rank): as directions with the same
# rights as the others they would only turn those aside. `numeric.rounding` says the same of the
# weights, and matters where a delta is small beside them.
ROUNDING = 1e-5
# Eigenvalue of a Gram matrix over its largest: above, its root has as many digits as an SVD's.
WELL_CONDITIONED = 1e-7
# Singular value of a stack over its largest: below, directions of two tasks are the same one, as
# exactly as float32 can have it. No higher: directions of real tasks come close to each other.
COINCIDENT = 1e-7


@dataclass(frozen=True)
class Factors:
    """The leading singular triples of one task vector.

    Attributes:
        u: (out, k), orthonormal columns.
        s: (k,) descending.
        v: (in, k), orthonormal columns.
        blur: by what angle the directions may be off, where the rest of the delta was noise.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    blur: float = 0.0


def kept_rank(shape: Sequence[int], tasks: int, fraction: float | None = None) -> int:
    """Triples that each of `tasks` keeps: `fraction * R` rounded down, `R / tasks` without it.

    At least 1: with more tasks than `R` a share of 0 would make the merge the base.
    """
    rank = min(shape)
    count = rank // tasks if fraction is None else math.floor(fraction * rank + 1e-9)
    return max(1, count)


def factors(delta: Tensor, count: int, noise: float = 0.0) -> Factors:
    """The leading singular triples of `delta` (out, in), at most `count`, in float64.

    Triples below `ROUNDING` or `noise` are left out; a delta of zeros has none.
    """
    d = double(delta)
    if d.shape[0] < d.shape[1]:
        flipped = factors(d.mT, count, noise)
        return Factors(flipped.v, flipped.s, flipped.u, flipped.blur)
    values, v = torch.linalg.eigh(d.mT @ d)
    s = values.flip(0)[:count].clamp_min(0).sqrt()
    there = s[(s > ROUNDING * s[:1]) & (s > noise)]
    blur = noise / there[-1].item() if 0 < len(there) < len(s) else 0.0
    v = v.flip(1)[:, : len(there)].contiguous()
    return Factors(d @ v / there, there, v, blur)


def polar(x: Tensor, blur: float = 0.0) -> Tensor:
    """(n, p) float64: `U V^T` of the singular value decomposition of `x`, Procrustes' solution.

    Where the columns of `x` are dependent (tasks with the same directions, or more columns than
    rows) the nearest orthonormal matrix is not unique. The null directions then stay zero
    instead of being filled arbitrarily: what tasks have in common is shared out among them, and
    nothing that none of them has is added. Those that differ by less than `blur` are the same, too.
    """
    flat = x.shape[0] < x.shape[1]
    values, q = torch.linalg.eigh(x @ x.mT if flat else x.mT @ x)
    if values[0] > max(WELL_CONDITIONED, blur**2) * values[-1]:
        root = (q * values.rsqrt()) @ q.mT
        return root @ x if flat else x @ root
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > max(COINCIDENT, blur) * s[0]
    return u[:, keep] @ vh[keep]


def merged_delta(parts: Sequence[Factors]) -> Tensor:
    """(out, in) float64 `U' S V'^T` (section 4.2); the order of the tasks does not matter."""
    if not any(len(part.s) for part in parts):  # no change is more than rounding
        return parts[0].u.new_zeros(len(parts[0].u), len(parts[0].v))
    blur = max(part.blur for part in parts)
    u, v = (
        polar(torch.cat(side, 1), blur) for side in ([p.u for p in parts], [p.v for p in parts]))
    return (u * torch.cat([p.s for p in parts])) @ v.mT


def interference(parts: Sequence[Factors]) -> tuple[float, float]:
    """Singular task interference of truncated task vectors, and the same over `sum s_i`."""
    u, v = (torch.cat(side, 1) for side in ([p.u for p in parts], [p.v for p in parts]))
    s = torch.cat([p.s for p in parts])
    eye = torch.eye(len(s), dtype=u.dtype, device=u.device)
    value = ((u.mT @ u - eye) * s @ (v.mT @ v - eye)).abs().sum().item()
    return value, value / max(s.sum().item(), torch.finfo(s.dtype).tiny)


def singular_task_interference(
    deltas: Sequence[Tensor], rank_fraction: float | None = None
) -> float:
    """`|(U^T U - I) S (V^T V - I)|_1` of the deltas (out, in) of several tasks.

    Args:
        deltas: fine-tuned weight minus base, one per task.
        rank_fraction: of `R` that is looked at in each; one over the number of tasks without it.
    """
    parts = [factors(d, kept_rank(d.shape, len(deltas), rank_fraction)) for d in deltas]
    return interference(parts)[0]
