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

`merged_change` works in float32 where that carries the leading part (`leading`, `polar`), and
otherwise in float64, from the smaller Gram matrix where squaring costs no digits that matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_pave.algebra.leading import LARGE, gram_eigh, leading, strongest
from mergekit_pave.algebra.numeric import double, rounding, wide
from mergekit_pave.algebra.polar import polar, single_polar

# Relative to the largest singular value of a delta. Below are rounding errors (an adapter that was
# merged into a weight in float32 has rank 16, the delta full rank), which would push the true
# directions aside if they counted alike. `numeric.rounding` bounds the rounding of the weights,
# which matters where a delta is small beside them.
ROUNDING = 1e-5
# Adapters: columns of the block that finds all of a delta of low rank, those of them that must turn
# out to be empty, and by how much the weakest direction stands out of them.
FEW, SPARE, GAP = 72, 8, 30.0


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
    return _of_low_rank(d, count, noise) or _of_any_rank(d, count, noise)


def _of_any_rank(d: Tensor, count: int, noise: float) -> Factors:
    values, v = gram_eigh(d)
    s = values.flip(0)[:count].clamp_min(0).sqrt()
    there = s[(s > ROUNDING * s[:1]) & (s > noise)]
    blur = noise / there[-1].item() if 0 < len(there) < len(s) else 0.0
    v = v.flip(1)[:, : len(there)].contiguous()
    return Factors(d @ v / there, there, v, blur)


def _of_low_rank(d: Tensor, count: int, noise: float) -> Factors | None:
    """The same where all but a few singular values are noise, as an adapter's are.

    `None` where they are not, or where the last of them does not stand out.
    """
    if d.shape[1] < LARGE:
        return None
    block = strongest(d, FEW)
    floor = max(ROUNDING * block.values[0].item(), noise)
    rank = int((block.values > floor).sum())
    if rank > FEW - SPARE or block.values[rank] > floor / 2:
        return None
    if rank and block.values[rank - 1] < GAP * block.values[rank]:
        return None
    u, s, vh = torch.linalg.svd(block.images[:, :rank], full_matrices=False)
    kept = min(rank, count)
    blur = noise / s[-1].item() if 0 < rank < count else 0.0
    return Factors(u[:, :kept], s[:kept], block.v[:, :rank] @ vh[:kept].mT, blur)


def merged_delta(parts: Sequence[Factors]) -> Tensor:
    """(out, in) float64 `U' S V'^T` (section 4.2); the order of the tasks does not matter."""
    if not any(len(part.s) for part in parts):  # no change is more than rounding
        return parts[0].u.new_zeros(len(parts[0].u), len(parts[0].v))
    blur = max(part.blur for part in parts)
    u, v = (
        polar(torch.cat(side, 1), blur) for side in ([p.u for p in parts], [p.v for p in parts]))
    return (u * torch.cat([p.s for p in parts])) @ v.mT


def merged_change(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], count: int
) -> Tensor:
    """(out, in) `U' S V'^T` of the weighted changes `w_t (W_t - W_0)`, float32 or float64.

    Args:
        base: `W_0` (out, in), whose rounding says what is noise.
        tuned: `W_t`, the same shape each, different from the base.
        weights: `w_t`, not 0.
        count: triples that each task keeps.
    """
    noise = rounding(base)
    if wide(base).dtype == torch.float32 and min(base.shape) >= LARGE and base.device.type != "mps":
        merged = _in_single(base, tuned, weights, count, noise)
        if merged is not None:
            return merged
    origin = double(base)
    return merged_delta([
        factors((double(w) - origin) * weight, count, noise * abs(weight))
        for w, weight in zip(tuned, weights, strict=True)
    ])


def _in_single(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], count: int, noise: float
) -> Tensor | None:
    """`merged_change` in float32; `None` where that cannot tell directions apart."""
    parts = []
    for weight, w in zip(weights, tuned, strict=True):
        part = leading((wide(w) - wide(base)).mul_(weight), count, noise * abs(weight))
        if part is None:
            return None
        parts.append(part)
    u, v = single_polar([part.u for part in parts]), single_polar([part.v for part in parts])
    if u is None or v is None:
        return None
    blocks = zip(u.split(count, 1), parts, strict=True)
    return torch.cat([block @ part.core for block, part in blocks], 1) @ v.mT


def interference(parts: Sequence[Factors]) -> tuple[float, float]:
    """Singular task interference of truncated task vectors, and the same over `sum s_i`."""
    u, v = (torch.cat(side, 1) for side in ([p.u for p in parts], [p.v for p in parts]))
    s = torch.cat([p.s for p in parts])
    eye = torch.eye(len(s), dtype=u.dtype, device=u.device)
    value = ((u.mT @ u - eye) * s @ (v.mT @ v - eye)).abs().sum().item()
    return value, value / max(s.sum().item(), torch.finfo(s.dtype).tiny)
