"""A few tokens that a merged language model writes, for a person to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from mergekit_pave.calibration.collect import input_device
from mergekit_pave.calibration.samples import load_tokenizer
from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.models import opened
from mergekit_pave.models.source import ModelSource

PROMPT_TOKENS = 24


def written(bench: Bench, source: ModelSource, length: int) -> Iterator[tuple[str, str, str]]:
    """For every causal task: its label, the start of a held-out row, and how the model goes on.

    Greedy, so that the same model writes the same.
    """
    tasks = [task for task in bench.tasks
             if task.kind == "language" and not task.source.config().is_encoder_decoder]
    if not tasks or length < 1:
        return
    with opened(source, bench.resources) as model:
        writer: Any = model  # its type hides `generate`
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=length, use_cache=True,
            pad_token_id=getattr(model.config.get_text_config(), "eos_token_id", None))
        for task in tasks:
            tokenizer = load_tokenizer(task.source.tokenizer, task.source.loading)
            row = task.rows.items[0]["input_ids"]
            start = row[: max(1, min(PROMPT_TOKENS, len(row) // 2))]
            ids = start[None].to(input_device(model))
            with torch.inference_mode():
                out = writer.generate(ids, attention_mask=torch.ones_like(ids))
            yield task.label, tokenizer.decode(start), tokenizer.decode(out[0, len(start):])
