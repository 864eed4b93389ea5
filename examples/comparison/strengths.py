"""What strengths of a merge can be read from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def closed_forms(deltas: Sequence[Tensor], change: Tensor) -> dict[str, float]:
    """Name -> strength of a merged change, over the matched one (`mergekit_pave.algebra.response`).

    An answer of `X` to the inputs of task `t` is `tr(X C_t X^T)` with `C_t = D_t^T D_t`.

    Args:
        deltas: `D_t` (out, in) float64 each.
        change: (out, in) float64.
    """
    # answers[t, i, j] = tr(X_i C_t X_j^T); the last X is the change.
    parts = torch.stack([*deltas, change])
    answers = torch.stack([
        torch.einsum("aoi,boi->ab", parts @ (d.mT @ d), parts) for d in deltas])
    lengths = torch.einsum("aoi,boi->ab", parts, parts)
    norms = torch.linalg.matrix_norm(parts, 2)
    tasks = torch.arange(len(deltas))
    own, shared = answers[tasks, tasks, tasks], answers[tasks, tasks, -1]
    merged = answers[:, -1, -1]
    total, squares = merged.sum(), shared.sum() / merged.sum()
    every = answers[:, :-1, :-1]
    of_sum = (every.sum() / total).sqrt()
    found = {
        "matched": (own.sum() / total).sqrt(),
        "matched to each task, geometric mean": (own / merged).sqrt().log().mean().exp(),
        "matched to each task, least": (own / merged).sqrt().min(),
        "least squares": squares,
        "least squares, mean of the tasks'": (shared / merged).mean(),
        "least squares, root": squares.clamp_min(0).sqrt(),
        "least squares onto the sum": answers[:, :-1, -1].sum() / total,
        "least squares of weights": lengths[:-1, -1].mean() / lengths[-1, -1],
        "answer of the sum": of_sum,
        "answer of the mean": of_sum / len(deltas),
        "answer to all inputs, largest": (
            every.diagonal(dim1=1, dim2=2).sum(0).max() / total).sqrt(),
        "length": (lengths.diagonal()[:-1].mean() / lengths[-1, -1]).sqrt(),
        "length of the sum": (lengths[:-1, :-1].sum() / lengths[-1, -1]).sqrt(),
        "largest singular value, mean": norms[:-1].mean() / norms[-1],
        "largest singular value, largest": norms[:-1].max() / norms[-1],
        "plain": torch.tensor(1.0),
    }
    return {name: float(value / found["matched"]) for name, value in found.items()}
