"""Mends for defects of mergekit 0.1.5, and the three places where our merges reach into it.

A mend only turns a crash into what was meant, and does nothing once mergekit is mended. Modules and
classes of mergekit are `Any` here: they get other attributes than their types have.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.merge_methods import MergeMethod, registry

from mergekit_pave.models.merged_copies import merged_copy


class _Aliases(tuple):
    """Alternative names of a weight that may be appended to a list."""

    def __radd__(self, other: list) -> list:
        return [*other, *self]


def mend_cards(card: Any) -> None:
    """Let `mergekit.card` take a folder that exists for one where the Hub cannot be reached.

    It asks the Hub about local models such as `experts/math`, after all weights are written, and
    without a network ends before tokenizer and card are.
    """
    original = card.is_hf

    @functools.wraps(original)
    def is_hf(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(path, *args, **kwargs)
        except Exception:  # the client's transport errors share no base with anything
            if not os.path.exists(path):
                raise
            return False

    card.is_hf = is_hf


def mend_optional_aliases(plan: Any) -> None:
    """Let `mergekit.plan` plan optional weights with aliases, as all of BERT's are.

    `plan_tensor` adds the tuple `aliases` to a list, a TypeError.
    """
    original = plan.MergePlanner.plan_tensor

    @functools.wraps(original)
    def plan_tensor(self: Any, weight: Any, weights_in: Any, *args: Any, **kwargs: Any) -> Any:
        if weight.optional:
            weights_in = [
                w.model_copy(update={"aliases": _Aliases(w.aliases)}) if w.aliases else w
                for w in weights_in
            ]
        return original(self, weight, weights_in, *args, **kwargs)

    plan.MergePlanner.plan_tensor = plan_tensor


def mend_merged_copies(common: Any) -> None:
    """Let `mergekit.common` keep merged copies of adapters by what they are made of.

    It finds them by paths alone, so that an adapter which was trained further gives an earlier
    merge, and takes the empty folder of a copy that failed for the model.
    """
    reference = common.ModelReference
    original = reference.merged
    signature = inspect.signature(original)

    @functools.wraps(original)
    def merged(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        cache = given.get("cache_dir")
        if not self.lora or not cache:
            return original(self, *args, **kwargs)

        def make(folder: str) -> Any:
            given["cache_dir"] = folder
            with _silent_about_dtype():
                return original(*bound.args, **bound.kwargs)

        return merged_copy(self, cache, given.get("lora_merge_dtype"), make)

    reference.merged = merged


def mend_lone_entries(sparsify: Any) -> None:
    """Let DELLA drop an entry that is alone in its row, as a gate or a probe is, at its density.

    It ranks the entries of a row, and divides by the number of ranks less one.
    """
    original = sparsify.della_magprune

    @functools.wraps(original)
    def della_magprune(
        tensor: Any, density: float, epsilon: float, rescale_norm: Any = None
    ) -> Any:
        alone = tensor.ndim == 0 or tensor.shape[min(tensor.ndim, 2) - 1] == 1
        if alone and 0 < density < 1:
            return sparsify.bernoulli(tensor, density, rescale_norm)
        return original(tensor, density, epsilon, rescale_norm)

    sparsify.della_magprune = della_magprune


def mend_dtype(merge: Any) -> None:
    """Silence transformers' warning about `torch_dtype`, a keyword that `mergekit.merge` uses.

    Every merge would otherwise begin with a warning that no user can do anything about.
    """
    original = merge._model_out_config

    @functools.wraps(original)
    def _model_out_config(*args: Any, **kwargs: Any) -> Any:
        with _silent_about_dtype():
            return original(*args, **kwargs)

    merge._model_out_config = _model_out_config


def _is_of_something_else(record: logging.LogRecord) -> bool:
    return "torch_dtype" not in record.getMessage()


@contextmanager
def _silent_about_dtype() -> Iterator[None]:
    names = ("transformers.configuration_utils", "transformers.modeling_utils")
    logs = [logging.getLogger(name) for name in names]
    for log in logs:
        log.addFilter(_is_of_something_else)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_is_of_something_else)


class _DoneWhenEmpty(threading.Event):
    """An event that counts as set once nothing waits in a queue any more."""

    def __init__(self, waiting: queue.Queue):
        super().__init__()
        self._waiting = waiting

    def is_set(self) -> bool:
        return super().is_set() and self._waiting.empty()


def mend_lost_results(executor: Any) -> None:
    """Let `--multi-gpu` collect every result of its workers.

    The thread that collects them ends as soon as the workers have, whatever is still in its queue:
    on a slow terminal the merge then fails, or lacks weights without a word.
    """
    original = executor.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        self.done_event = _DoneWhenEmpty(self.task_completion_queue)

    executor.__init__ = __init__


def let_planner_ask(planner: Any, method: Callable[[], MergeMethod | None]) -> None:
    """Let a planner take the method that its merge has made ready, where there is one.

    mergekit looks the method up by its name in a registry that all merges of a process share.
    """
    original = planner.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        if ready := method():
            self._method = ready

    planner.__init__ = __init__


def unregister(method: MergeMethod) -> None:
    """Take a method out of mergekit's registry, which has no way to do so."""
    registry._METHODS.pop(method.spec.name, None)


def let_merges_know(
    merge: Any, architecture: Callable[[], ModelArchitecture | None]
) -> None:
    """Let `mergekit.merge` plan by the architecture that a merge has made ready, if it has.

    mergekit's own leaves out tensors that some checkpoints have, and asks for others that they
    lack.
    """
    original = getattr(merge, "get_architecture_info", None)
    if original is None:  # a mergekit that plans otherwise
        return

    @functools.wraps(original)
    def get_architecture_info(*args: Any, **kwargs: Any) -> Any:
        return architecture() or original(*args, **kwargs)

    merge.get_architecture_info = get_architecture_info
