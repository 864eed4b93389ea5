"""A configuration and a truncation by numpy, for the tests of `compress`."""

from __future__ import annotations

import numpy as np
import torch

NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def raw(paths: dict, experts: int = 2) -> dict:
    """A merge as it is used for `ties`, whose parameters do not matter here."""
    models = [{"model": str(paths[f"expert{i}"]), "parameters": {"weight": 1, "density": 0.2}}
              for i in range(experts)]
    return {"merge_method": "ties", "base_model": str(paths["base"]), "models": models}


def truncated(tuned: torch.Tensor, base: torch.Tensor, k: int) -> torch.Tensor:
    delta = tuned.double().numpy() - base.double().numpy()
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return base.double() + torch.from_numpy(u[:, :k] * s[:k] @ v[:k])
