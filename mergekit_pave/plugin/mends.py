"""Mends for defects of mergekit 0.1.5, and the two places where our merges reach into it.

A mend only turns a crash into what was meant, and does nothing once mergekit is mended.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType

from mergekit.merge_methods import MergeMethod, registry


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
    def is_hf(path, *args, **kwargs):
        try:
            return original(path, *args, **kwargs)
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
    def plan_tensor(self, weight, weights_in, *args, **kwargs):
        if weight.optional:
            weights_in = [
                w.model_copy(update={"aliases": _Aliases(w.aliases)}) if w.aliases else w
                for w in weights_in
            ]
        return original(self, weight, weights_in, *args, **kwargs)

    plan.MergePlanner.plan_tensor = plan_tensor


def mend_dtype(merge: ModuleType) -> None:
    """Keep transformers from telling users of the word `torch_dtype`, which `mergekit.merge` uses.

    Every merge would otherwise begin with a warning that no user can do anything about.
    """
    original = merge._model_out_config

    def other(record: logging.LogRecord) -> bool:
        return "torch_dtype" not in record.getMessage()

    @functools.wraps(original)
    def _model_out_config(*args, **kwargs):
        transformers_log = logging.getLogger("transformers.configuration_utils")
        transformers_log.addFilter(other)
        try:
            return original(*args, **kwargs)
        finally:
            transformers_log.removeFilter(other)

    merge._model_out_config = _model_out_config


def let_planner_ask(planner: type, method: Callable[[], MergeMethod | None]) -> None:
    """Let a planner take the method that its merge has made ready, where there is one.

    mergekit looks the method up by its name in a registry that all merges of a process share.
    """
    original = planner.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if ready := method():
            self._method = ready

    planner.__init__ = __init__


def unregister(method: MergeMethod) -> None:
    """Take a method out of mergekit's registry, which has no way to do so."""
    registry._METHODS.pop(method.spec.name, None)
