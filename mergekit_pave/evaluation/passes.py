"""Outputs of a model, which may be larger than memory: its shards are read once, block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from mergekit_pave.calibration.blocks import Walk
from mergekit_pave.calibration.collect import Batch, forward
from mergekit_pave.calibration.observed import observed
from mergekit_pave.calibration.states import States

# Bytes of what lies between two blocks that stay in memory; the rest goes to files.
ROOM = 2**28

logger = logging.get_logger(__name__)


def outputs(model: PreTrainedModel, batches: Sequence[Batch]) -> Iterator[Any]:
    """The model's output for every batch, with the logits of all tokens, in their order.

    An ordinary pass reads weights that are left in the shards once for each batch. Such a model
    goes through its blocks one by one instead, where it allows it (`calibration.blocks`).
    """
    # Two ordinary passes cost as much as the one that finds the blocks, and the walk.
    if len(batches) > 2 and any(p.is_meta for p in model.parameters()):
        with tempfile.TemporaryDirectory(prefix="mergekit-pave-") as folder:
            probe = {name: value[:1] for name, value in batches[-1].items()}
            with observed(model, {}) as seen:
                forward(model, probe)
            if seen.blocks:
                states = States(ROOM, Path(folder))
                walk = Walk(model, seen.blocks, [*batches, probe], states, logits=True)
                with walk.walking():
                    if _walked(walk, seen.marks):
                        with walk.at(len(walk.blocks)):
                            for number in range(len(batches)):
                                yield walk.run(len(walk.blocks), number, True)
                        return
    for batch in batches:
        yield forward(model, batch, logits=True)


def _walked(walk: Walk, marks: Sequence[Any]) -> bool:
    """Bring all batches behind the last block; False where the probe, the last one of them,
    meets something else there than in an ordinary pass.
    """
    probe = len(walk.batches) - 1
    for block in range(len(walk.blocks)):
        with walk.at(block):
            try:
                walk.run(block, probe, True)
                if not walk.agrees(marks):
                    return False
            except Exception as error:  # the model carries more from block to block than was kept
                logger.info("Block %s: %s", block, error)
                return False
            for number in range(probe):
                walk.run(block, number, True)
    return True
