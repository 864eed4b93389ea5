"""The encoder setting with twelve tasks: each of its six in two, by every second class."""

from __future__ import annotations

from pathlib import Path

import encoder
import torch
from encoder import (  # noqa: F401 - what a setting is made of
    CALIBRATION_SAMPLES,
    KIND,
    MAX_LENGTH,
    METRIC,
    SAMPLE_SIZES,
    WRITES,
    groups,
    score,
    strength,
)

NAMES = tuple(f"{task}-{half}" for task in encoder.NAMES for half in encoder.HALVES)


def prepare(out: Path, quick: bool) -> None:
    encoder.prepare(out, quick, NAMES)


def train(out: Path, task: str, seed: int, quick: bool) -> None:
    # bfloat16 products: 1.8 times as fast as the encoder setting trains. Weights that autocast
    # has cast once it would not cast again after a step.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        encoder.train(out, task, seed, quick)
