"""An open merge, and a report of made-up numbers."""

from __future__ import annotations

import random

import torch
import yaml

from helpers import recipe
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.report import measure
from mergekit_pave.report import merge as gather
from mergekit_pave.report.build import summarise
from mergekit_pave.report.survey import open_merge

CPU = torch.device("cpu")
KINDS = {"self_attn.q_proj": (512, 512), "self_attn.o_proj": (512, 512),
         "mlp.down_proj": (512, 1376)}


def synthetic(models: int, blocks: int, seed: int = 0) -> dict:
    """A report of made-up but plausible numbers, as large as a real one may be."""
    draw = random.Random(seed)
    layers = [
        _synthetic_layer(draw, models, block, kind, shape)
        for block in range(blocks) for kind, shape in KINDS.items()
    ]
    report = {
        "kind": "mergekit-pave report", "format": 1, "version": "0", "method": "pave_ties",
        "base": "acme/base-7b",
        "models": [f"acme/{draw.choice(['math', 'code', 'law'])}-expert-{i}-of-a-long-name"
                   for i in range(models)],
        "settings": {"rank_ratio": [0.98, 0.98], "rank_allocation": "spectral",
                     "subspace": "covariance", "dampening_frac": 0.01, "regularization": None},
        "sampling": {"blocks": list(range(blocks)), "of": blocks, "weights": len(layers),
                     "of_weights": len(layers)},
        "shares": list(measure.SHARES), "layers": layers,
        "covariances": [
            {"model": m, "site": layer["name"], "width": layer["shape"][1],
             "tokens": (n := draw.randrange(300, 40_000)),
             "tokens_per_dimension": n / layer["shape"][1],
             "effective_rank": layer["shape"][1] * draw.uniform(0.02, 0.4)}
            for layer in layers for m in range(models)],
        "coverage": [
            {"purified": {"tensors": len(layers), "reasons": {"linear layer": len(layers)}},
             "plain": {"tensors": 2 * blocks, "reasons": {"not a matrix": 2 * blocks}},
             "skipped": {"tensors": 1, "reasons": {"not in this checkpoint": 1}}}] * models,
    }
    report["summary"] = summarise(report)
    return report


def _synthetic_layer(draw, models, block, kind, shape):
    rank = min(shape)
    rows = []
    for model in range(models):
        fall = draw.uniform(4, 8)
        removed = 10 ** draw.uniform(-6, -3)
        dropped = draw.randrange(3, 16)
        rows.append({
            "model": model, "kept": rank - dropped, "dropped": dropped,
            "spectrum": {"svd": [10 ** (-1.5 * s) for s in measure.SHARES],
                         "covariance": [10 ** (-fall * s) for s in measure.SHARES]},
            "holding": {"svd": 0.8, "covariance": draw.uniform(0.05, 0.3)},
            "error": [10 ** (-fall * s) if s < 1 else 0.0 for s in measure.SHARES],
            "knee": draw.uniform(0.05, 0.3), "energy_removed": removed,
            "energy_removed_svd": 30 * removed, "task_energy_removed": 50 * removed})
    square = [[1.0 if i == j else draw.uniform(0, 0.4) for j in range(models)]
              for i in range(models)]
    return {
        "name": f"model.layers.{block}.{kind}.weight", "block": block, "kind": kind,
        "shape": list(shape), "rank": rank, "rank_ratio": 0.98, "models": rows,
        "interference": {"rank": rank // models, "before": 90.0, "after": draw.uniform(60, 100),
                         "relative_before": draw.uniform(1, 2), "relative_after": 1.0},
        "overlap": {"rank": 8, "chance": {"output": 8 / shape[0], "input": 8 / shape[1]},
                    "output": square, "input": square, "dropped": square}}


def rows(report: dict, name: str) -> dict:
    return next(layer for layer in report["layers"] if layer["name"] == name)


def opened(paths, data, folder, **parameters) -> gather.Merge:
    config = folder / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(paths, data, **parameters)))
    return open_merge(config, LoaderOptions(), CPU)


def random_basis(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
