"""What a task vector may keep when the other tasks' inputs are to stay as they are.

`D_t` (out, in) is the task vector of a linear layer, `C_s` (in, in) the second moment of its inputs
on task `s`. Added to the base, `D_t` does its work on its own inputs, `E |D_t x_t|^2`, and harm on
those of the others, `E |D_t x_s|^2 = tr(D_t C_s D_t^T)`. The matrix that is closest to it on its
own inputs while doing little on theirs,

    min_D'  E |(D' - D_t) x_t|^2  +  mu sum_{s != t} E |D' x_s|^2  +  e |D'|^2,

is, by its normal equations,

    D_t' = D_t C_t (C_t + mu sum_{s != t} C_s + e I)^-1.

`mu = 0` is the task vector itself, as far as its data reaches. With `mu = 1` the denominator is the
same for all tasks, and the sum of all `D_t'` is RegMean's closed form (arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mergekit_pave.algebra.leading import gram_eigh
from mergekit_pave.algebra.numeric import double, solved, summed


@torch.no_grad()
def separate(delta: Tensor, own: Tensor, allowed: Tensor) -> Tensor:
    """`D_t C_t M^-1` (out, in) float64.

    Args:
        delta: `D_t` (out, in).
        own: `C_t` (in, in).
        allowed: `M = C_t + mu sum C_s`, damped (`subspace.damped`), float64; overwritten.

    Raises:
        torch.linalg.LinAlgError: `M` is not positive definite.
    """
    return solved(allowed, delta.to(allowed) @ own.to(allowed))


# Damping as a share of the mean diagonal: no model's data may ever activate a feature.
_FLOOR = 1e-9
# Singular values below this share of the largest are rounding.
_NULL = 1e-10
# Of a merged change: what the square in float64 may cost one of its singular directions.
_ERROR = 3e-6
# Bytes of covariances that are kept where they are needed twice.
_HELD = 2**28


def regmean(
    deltas: Iterable[Tensor],
    covariances: Sequence[Callable[[], Tensor]],
    weights: Sequence[float],
    off_diagonal: float,
    averaging: float = 1.0,
) -> Tensor:
    """The merged task vector (out, in) float64 of one linear layer.

    Args:
        deltas: (out, in) each.
        covariances: read (in, in) each, one for every delta; two are held at a time in
                float64, and in their own dtype as many as fit into 256 MiB.
        weights: of the models' errors.
        off_diagonal: factor on the covariances off their diagonal.
        averaging: `mu`.

    Raises:
        ValueError: the covariances are not finite or all empty.
    """

    moment = _moments(covariances, weights, off_diagonal, again=averaging != 1)
    if averaging == 1:
        pairs = ((c, d.to(c) @ c)
                 for c, d in zip(map(moment, range(len(weights))), deltas, strict=True))
        total, moved = next(pairs)
        total = total.clone()
        for c, change in pairs:
            total += c
            moved += change
        return solved(_floored(total), moved)
    total = moment(0).clone()
    for model in range(1, len(weights)):
        total += moment(model)

    def separated(model: int, delta: Tensor) -> Tensor:
        c = moment(model)
        moved = delta.to(c) @ c
        return solved(_floored(c.lerp_(total, averaging)), moved)

    # Without data an unchanged weight has an empty covariance.
    return summed(separated(model, delta) for model, delta in enumerate(deltas)
                  if weights[model] and delta.any())


def _moments(
    covariances: Sequence[Callable[[], Tensor]],
    weights: Sequence[float],
    off_diagonal: float,
    again: bool,
) -> Callable[[int], Tensor]:
    """Reads one model's weighted covariance, in float64, into memory that all of them share.

    New pages cost as much as a pass over them. What is read `again` is held as far as `_HELD` goes.
    """
    held: dict[int, Tensor] = {}
    shared: list[Tensor] = []

    def moment(model: int) -> Tensor:
        c = held[model] if model in held else covariances[model]()
        if again and (len(held) + 1) * c.nbytes <= _HELD:
            held[model] = c
        if not shared:
            shared.append(torch.empty_like(c, dtype=torch.float64, device=double(c[:0]).device))
        m = shared[0].copy_(c).mul_(weights[model])
        diagonal = m.diagonal().clone()
        m.mul_(off_diagonal).diagonal().copy_(diagonal)
        return m

    return moment


def flattened(delta: Tensor, flattening: float, noise: float = 0.0) -> Tensor:
    """`U S^(1 - p) V^T` (out, in) with the mean singular value of `delta = U S V^T`; what is not
    above `noise` counts as 0."""
    if flattening == 0 or not delta.any():
        return delta
    flat = delta.shape[0] < delta.shape[1]
    d = double(delta)
    squares, v = gram_eigh(d.mT if flat else d)
    s = squares.clamp_min(0).sqrt()
    # Of a singular value of size `r` over the largest the square loses `eps r^-2` to rounding, of
    # what it becomes there that is `eps r^-(1 + p)`.
    resolved = (torch.finfo(d.dtype).eps / _ERROR) ** (1 / (1 + flattening))
    if max(s[0] / s[-1], noise / s[-1]) < resolved:
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        v = u if flat else vh.mT
    # Null directions stay null: S^0 would give them the strength of all others.
    there = (s > _NULL * s.max()) & (s > noise)
    if not there.any():
        return delta
    powers = torch.where(there, s ** -flattening, 0)
    powers *= torch.where(there, s, 0).mean() / (s * powers).mean()
    root = (v * powers) @ v.mT
    return (root @ d if flat else d @ root).to(delta)


def _floored(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean()
    if not mean > 0 or not mean.isfinite():
        raise ValueError("the covariances are empty or not finite")
    moment.diagonal().add_(_FLOOR * mean)
    return moment
