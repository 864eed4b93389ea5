"""Mends for defects of mergekit 0.1.5 that stop merges outright, with or without PAVE.

Each only turns a crash into what was meant, and does nothing once mergekit is mended.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType


class _Aliases(tuple):
    """Alternative names of a weight that may be appended to a list."""

    def __radd__(self, other: list) -> list:
        return [*other, *self]


def mend_cards(card: ModuleType) -> None:
    """Let `mergekit.card` take a folder that exists for one where the Hub cannot be reached.

    It asks the Hub about local models such as `experts/math`, after all weights are written, and
    without a network ends before tokenizer and card are.
    """
    original = card.is_hf

    @functools.wraps(original)
    def is_hf(path):
        try:
            return original(path)
        except Exception:  # the client's transport errors share no base with anything
            if not os.path.exists(path):
                raise
            return False

    card.is_hf = is_hf


def mend_optional_aliases(plan: ModuleType) -> None:
    """Let `mergekit.plan` plan optional weights with aliases, as all of BERT's are.

    `plan_tensor` adds the tuple `aliases` to a list, a TypeError.
    """
    original = plan.MergePlanner.plan_tensor

    @functools.wraps(original)
    def plan_tensor(self, weight, weights_in, models, cfg_reader):
        if weight.optional:
            weights_in = [
                w.model_copy(update={"aliases": _Aliases(w.aliases)}) if w.aliases else w
                for w in weights_in
            ]
        return original(self, weight, weights_in, models, cfg_reader)

    plan.MergePlanner.plan_tensor = plan_tensor
