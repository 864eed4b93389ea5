"""Opening a model to be scored as one expert: in its class, under its head."""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from mergekit_pave.calibration.load import Resources, load_model
from mergekit_pave.evaluation.scores import put_head
from mergekit_pave.models.source import ModelSource


@dataclass(frozen=True)
class _As(ModelSource):
    """A model's weights, to be loaded by the class and with the labels of another."""

    like: PretrainedConfig = field(kw_only=True)

    def config(self) -> PretrainedConfig:
        own = copy.deepcopy(super().config())
        own.architectures = self.like.architectures
        own.id2label, own.label2id = self.like.id2label, self.like.label2id
        return own


@contextmanager
def opened(
    source: ModelSource,
    resources: Resources,
    like: PretrainedConfig | None = None,
    head: dict[str, Tensor] | None = None,
) -> Iterator[PreTrainedModel]:
    """The model for as long as the block lasts; larger ones stay in their shards.

    Args:
        source: its weights.
        resources: device and memory.
        like: config of the expert whose class and number of labels it takes.
        head: weights of that expert's head, which replace its own.
    """
    if like is not None:
        source = _As(**vars(source), like=like)
    model: PreTrainedModel | None = None
    scratch = Path(tempfile.mkdtemp(prefix="mergekit-pave-"))
    try:
        with _no_bars():
            model = load_model(
                source, device=resources.device, max_memory=resources.max_memory,
                scratch=scratch, other_head=head is not None, head=head is None)
        if head is not None:
            put_head(model, head)
        yield model
    finally:
        model = None
        gc.collect()
        if resources.device.type == "cuda":
            torch.cuda.empty_cache()
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the bar of every load: a search has hundreds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
