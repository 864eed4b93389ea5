"""An open merge, and a report of made-up numbers."""

from __future__ import annotations

import random

import torch
import yaml

from helpers import recipe
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.report import facts, measure
from mergekit_pave.report import merge as gather
from mergekit_pave.report.build import summarise
from mergekit_pave.report.survey import open_merge

CPU = torch.device("cpu")
KINDS = {"self_attn.q_proj": (512, 512), "self_attn.o_proj": (512, 512),
         "mlp.down_proj": (512, 1376)}


def synthetic(models: int, blocks: int, seed: int = 0) -> facts.Report:
    """A report of made-up but plausible numbers, as large as a real one may be."""
    draw = random.Random(seed)
    layers = [
        _synthetic_layer(draw, models, block, kind, shape)
        for block in range(blocks) for kind, shape in KINDS.items()
    ]
    covariances = [
        facts.Covariance(m, layer.name, width := layer.shape[1],
                         tokens := draw.randrange(300, 40_000), tokens / width,
                         width * draw.uniform(0.02, 0.4))
        for layer in layers for m in range(models)]
    coverage = [facts.Coverage(
        facts.Part(len(layers), {"linear layer": len(layers)}),
        facts.Part(2 * blocks, {"not a matrix": 2 * blocks}),
        facts.Part(1, {"not in this checkpoint": 1}))] * models
    return facts.Report(
        "pave_ties", "acme/base-7b",
        [f"acme/{draw.choice(['math', 'code', 'law'])}-expert-{i}-of-a-long-name"
         for i in range(models)],
        facts.Settings([0.98, 0.98], "spectral", "covariance", 0.01, None),
        facts.Sampling(list(range(blocks)), blocks, len(layers), len(layers)),
        list(measure.SHARES), layers, covariances, coverage,
        summarise(layers, covariances, coverage))


def _synthetic_layer(draw, models, block, kind, shape) -> facts.Weight:
    rank = min(shape)
    rows = []
    for model in range(models):
        fall = draw.uniform(4, 8)
        removed = 10 ** draw.uniform(-6, -3)
        dropped = draw.randrange(3, 16)
        rows.append(facts.Row(
            model=model, kept=rank - dropped, dropped=dropped,
            spectrum=facts.ByBasis([10 ** (-1.5 * s) for s in measure.SHARES],
                                   [10 ** (-fall * s) for s in measure.SHARES]),
            holding=facts.ByBasis(0.8, draw.uniform(0.05, 0.3)),
            error=[10 ** (-fall * s) if s < 1 else 0.0 for s in measure.SHARES],
            knee=draw.uniform(0.05, 0.3), energy_removed=removed,
            energy_removed_svd=30 * removed, task_energy_removed=50 * removed))
    square = [[1.0 if i == j else draw.uniform(0, 0.4) for j in range(models)]
              for i in range(models)]
    return facts.Weight(
        f"model.layers.{block}.{kind}.weight", block, kind, list(shape), rank, 0.98, rows,
        facts.Interference(rank // models, 90.0, draw.uniform(60, 100), draw.uniform(1, 2), 1.0),
        facts.Overlap(8, facts.Sides(8 / shape[0], 8 / shape[1]), square, square, square))


def rows(report: facts.Report, name: str) -> facts.Weight:
    return next(layer for layer in report.layers if layer.name == name)


def opened(paths, data, folder, **parameters) -> gather.Merge:
    config = folder / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(paths, data, **parameters)))
    return open_merge(config, LoaderOptions(), CPU)


def random_basis(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
