"""EMR by the paper's definition and by our functions, and models to try both on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from helpers import tensors_of
from mergekit_pave.algebra.emr import Sums, elect, scale, task_weight, trace

MANIFEST = Path("emr", "manifest.json")


def papers_models(base: dict, experts: list[dict], rescaler: str = "tensor_mean") -> list[dict]:
    """Every task's model in float64, as the paper and its authors' code define it."""
    unified, masks, sums = {}, [{} for _ in experts], np.zeros((len(experts), 2))
    for name, origin in base.items():
        origin = origin.double().numpy()
        deltas = [expert[name].double().numpy() - origin for expert in experts]
        flag = np.where(sum(deltas) > 0, 1.0, -1.0)
        agreeing = [np.where(d * flag > 0, np.abs(d), 0) for d in deltas]
        unified[name] = flag * np.max(agreeing, axis=0)
        for t, delta in enumerate(deltas):
            masks[t][name] = delta * flag > 0
            pair = np.array([np.abs(delta).sum(), np.abs(unified[name] * masks[t][name]).sum()])
            sums[t] += pair / (origin.size if rescaler == "tensor_mean" else 1)
    factors = [own / kept if kept else 1.0 for own, kept in sums]
    return [
        {n: o.double().numpy() + factors[t] * masks[t][n] * unified[n] for n, o in base.items()}
        for t in range(len(experts))
    ]


def our_models(base: dict, experts: list[dict], rescaler: str = "tensor_mean") -> list[dict]:
    """The same by our functions, in memory."""
    merged = {name: elect(base[name], [e[name] for e in experts]) for name in base}
    models = []
    for expert in experts:
        traces = {n: trace(base[n], expert[n], merged[n]) for n in base}
        factor = scale(
            (Sums(t.own, t.unified, base[n].numel()) for n, t in traces.items()), rescaler)
        models.append({n: task_weight(base[n], merged[n], t.mask, factor)
                       for n, t in traces.items()})
    return models


def random_models(seed: int, experts: int, dtype=torch.float64, whole: bool = False):
    """State dicts of two tensors; `whole` numbers cancel exactly, again and again."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return ((2 * values).round() if whole else values).to(dtype)

    shapes = {"weight": (7, 5), "bias": (3,)}
    base = {name: draw(*shape) for name, shape in shapes.items()}
    models = [{n: (b + draw(*b.shape)).to(dtype) for n, b in base.items()} for _ in range(experts)]
    return base, models


def experts_of(paths: dict) -> list[dict]:
    return [tensors_of(path) for name, path in paths.items() if name != "base"]


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found)
