"""Algorithm 1 of TSV-Merge in numpy, our method in memory, and models to try both on."""

from __future__ import annotations

import numpy as np
import torch
from mergekit.merge_methods import TensorGroup, get


def papers_merge(deltas: list[np.ndarray], k: int) -> np.ndarray:
    """Algorithm 1 in float64: truncate, concatenate, the Procrustes solution of both sides."""
    us, ss, vs = [], [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(vt[:k])
    p, _, qt = np.linalg.svd(np.concatenate(us, 1), full_matrices=False)
    r, _, tt = np.linalg.svd(np.concatenate(vs, 0), full_matrices=False)
    return (p @ qt) @ np.diag(np.concatenate(ss)) @ (r @ tt)


def draw(*shape, seed=0, scale=0.05) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(rows, columns, seed=seed).double()).Q


def ours(base: torch.Tensor, models: list[torch.Tensor], *, vocabulary_axis=None, name="w",
         **parameters) -> torch.Tensor:
    group = TensorGroup.from_tensors([base, *models], base_index=0, name=name,
                                     vocabulary_axis=vocabulary_axis)
    return get("tsv_m")((group,), parameters=parameters)[0]


def family(*shape, tasks=3, dtype=torch.float32, scale=0.02):
    """A base and its fine-tunes, and their deltas as the reference wants them."""
    base = draw(*shape, seed=99, scale=1.0).to(dtype)
    models = [(base.float() + draw(*shape, seed=i, scale=scale)).to(dtype) for i in range(tasks)]
    return base, models, [(m.double() - base.double()).numpy() for m in models]


def off(found: torch.Tensor, base: torch.Tensor, delta: np.ndarray) -> float:
    """Relative error of a merged delta."""
    want = torch.from_numpy(delta)
    return ((found.double() - base.double() - want).norm() / want.norm()).item()
