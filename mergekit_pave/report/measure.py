"""The report's numbers for one weight: tensors in, floats out.

`W` (out, in) is a fine-tuned weight, `W_0` the base's, `C` the second moment of the inputs,
`A = W (C + eI)` and `R = min(out, in)`. Directions are left singular vectors of `A`, the
ones PAVE drops (arXiv 2510.14697). Task vectors are `W - W_0`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Where curves are kept: shares of the rank, denser where PAVE cuts.
SHARES = (
    0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99,
    0.995, 0.998, 1.0,
)

# "Nearly all" of the energy, for the share of directions that hold it.
NEARLY_ALL = 0.99


def sample_spectrum(values: Tensor) -> list[float]:
    """Singular values (R,), descending, over the largest, at `SHARES` of their index."""
    top = values[0].clamp_min(torch.finfo(values.dtype).tiny)
    places = torch.tensor(SHARES, dtype=torch.float64) * (len(values) - 1)
    return _rounded((values / top)[places.round().long().to(values.device)])


def lost_energy(values: Tensor) -> Tensor:
    """(R + 1,) share of `sum s_i^2` that is lost when the first `r` are kept, `r = 0 ... R`.

    This is the paper's activated pruning error `|A - A_r|^2` over `|A|^2`.
    """
    energy = values.to(torch.float64).square()
    # The sum starts at the small end: differences of a sum from the large end would be noise.
    tails = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)]) / tails[0].clamp_min(torch.finfo().tiny)


def sample_lost(lost: Tensor) -> list[float]:
    """`lost_energy` at the rank ratios `SHARES`."""
    places = torch.tensor(SHARES, dtype=torch.float64) * (len(lost) - 1)
    return _rounded(lost[places.round().long().to(lost.device)])


def knee(lost: Tensor) -> float:
    """The kept share where the error curve bends: most energy above the diagonal.

    There, one more direction holds exactly an average share of the energy; all beyond hold
    less. (The maximum of Kneedle's difference curve, for which no smoothing is needed here:
    the curve is convex.)
    """
    rank = len(lost) - 1
    kept = torch.arange(rank + 1, dtype=lost.dtype, device=lost.device) / rank
    return (torch.argmax(1 - lost - kept) / rank).item()


def share_holding(lost: Tensor, energy: float = NEARLY_ALL) -> float:
    """The smallest share of the directions that hold `energy` of the energy."""
    rank = len(lost) - 1
    return ((lost > 1 - energy).sum() / rank).item()


def output_energy(weight: Tensor, covariance: Tensor) -> float:
    """`E |W x|^2 = tr(W C W^T)` over the inputs behind `covariance` (in, in)."""
    w = weight.to(torch.float64)
    return ((w @ covariance.to(w)) * w).sum().item()


def direction_energy(basis: Tensor, weight: Tensor, covariance: Tensor) -> Tensor:
    """(k,) `E (u_i^T W x)^2`: what each direction of `basis` (out, k) carries to the output."""
    rows = basis.mT @ weight.to(basis)
    return ((rows @ covariance.to(basis)) * rows).sum(1)


def effective_rank(covariance: Tensor) -> float:
    """`exp(entropy)` of the normalised eigenvalues (Roy and Vetterli, EUSIPCO 2007)."""
    values = torch.linalg.eigvalsh(covariance.to(torch.float64)).clamp_min(0)
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of `a` and `b`.

    Both (n, r) with orthonormal columns. 1 for the same subspace, `r / n` by chance.
    """
    return ((a.mT @ b).square().sum() / max(min(a.shape[1], b.shape[1]), 1)).item()


def overlaps(bases: Sequence[Tensor | None]) -> list[list[float | None]]:
    """`overlap` of every pair; `None` where a model has no directions here."""
    return [
        [None if a is None or b is None else round(overlap(a, b), 6) for b in bases]
        for a in bases
    ]


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
