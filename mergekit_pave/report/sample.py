"""Which layers to look at when all of them would take too long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_pave.report.gather import Layer

# Seconds that looking at every layer may take before layers are left out.
PATIENCE = 300.0
FEWEST = 3
# One layer of one model costs about this many multiply-adds per entry of out * in * R, found by
# timing: two spectra, two tails, two decompositions of task vectors.
WORK = 30.0
_PROBE = 384


@dataclass(frozen=True)
class Sample:
    """The layers that are looked at.

    Attributes:
        layers: the weights of the chosen blocks, and all outside the numbered blocks.
        blocks: numbers of the chosen blocks.
        of: how many blocks there are.
    """

    layers: list[Layer]
    blocks: list[int]
    of: int


def choose(layers: Sequence[Layer], wanted: int | None, device: torch.device) -> Sample:
    """`wanted` evenly spaced blocks, by default as many as fit `PATIENCE` (`FEWEST` at least)."""
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    if wanted is None:
        total = WORK * sum(layer.cost for layer in layers) / _speed(device)
        affordable = int(len(blocks) * PATIENCE / max(total, 1e-9))
        wanted = min(len(blocks), max(FEWEST, affordable))
    chosen = spread(blocks, wanted)
    kept = [layer for layer in layers if layer.block is None or layer.block in chosen]
    return Sample(kept, chosen, len(blocks))


def spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of `items`, evenly spaced with the first and the last among them."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _speed(device: torch.device) -> float:
    """Multiply-adds per second of a decomposition on this machine, in `WORK`'s units."""
    probe = torch.randn(_PROBE, _PROBE, device=device, dtype=torch.float64)
    torch.linalg.svdvals(probe)
    # The best of a few: whatever else runs would only make a sample smaller than it can be.
    return 3 * _PROBE**3 / min(_timed(probe) for _ in range(3))


def _timed(probe: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.linalg.svdvals(probe).sum().item()
    return time.perf_counter() - start
