"""What a tensor of a checkpoint is called in the model's class, by transformers' own tables.

`from_pretrained` renames tensors while it loads them (a Gemma 3 on the Hub has
`vision_tower.vision_model.x`, its class `model.vision_tower.x`), puts the experts of a mixture into
one tensor, adds or removes the prefix of the body, and ignores what no version needs any more. The
same tables and rules answer here, without loading anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from functools import cached_property

from mergekit.architecture.auto import infer_vocabulary_axes
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

# Buffers that older versions wrote into checkpoints and that every model computes anew: positions,
# rotary frequencies, causal masks, and the counter of batch norms, which evaluation ignores.
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|num_batches_tracked|inv_freq|rotary_emb\.(cos|sin)_cached|masked_bias"
    r"|(attn|attention|self_attn|SelfAttention)\.(bias|mask)|embed_positions\._float_tensor)$"
)

_POOLER = re.compile(r"(^|\.)pooler\.")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that models compute anew: nothing is lost without it."""
    return _BUFFERS.search(name) is not None


class ClassNames:
    """The names of one class of transformers, and how a checkpoint's names become them.

    Args:
        model: of that class, on the `meta` device or loaded.
    """

    def __init__(self, model: PreTrainedModel):
        self._state = dict(model.state_dict())
        self.label = type(model).__name__
        self.vocabulary = _vocabulary(model)
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._patterns = {p: c for c in self._converters for p in c.source_patterns}
        self._ignored = _any_of(getattr(model, "_keys_to_ignore_on_load_unexpected", None))
        self._not_missed = _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._known: dict[str, tuple[str, ...]] = {}

    @property
    def tensors(self) -> Set[str]:
        """All names of the class."""
        return self._state.keys()

    def of(self, name: str) -> tuple[str, ...]:
        """The tensors of the class that `name` of a checkpoint becomes or is a part of.

        One for most; several for a tensor that is split; none for one that the class has not.
        """
        if name not in self._known:
            self._known[name] = self._targets(name)
        return self._known[name]

    def one(self, name: str) -> str | None:
        """The tensor of the class that holds exactly the values of `name`, if any."""
        own, pattern = self._renamed(name)
        return own if pattern is None and own in self._state else None

    def _renamed(self, name: str) -> tuple[str, str | None]:
        own, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state)
        if own not in self._state and name in self._state:
            own, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return own, pattern

    def _targets(self, name: str) -> tuple[str, ...]:
        own, pattern = self._renamed(name)
        if pattern is None:
            return (own,) if own in self._state else ()
        targets = self._patterns[pattern].target_patterns
        found = dict.fromkeys(own.replace(targets[0], target) for target in targets)
        return tuple(target for target in found if target in self._state)

    def ignores(self, name: str) -> bool:
        """Whether transformers leaves such a tensor of a checkpoint out, by its own lists."""
        if is_buffer(name):
            return True
        own, _ = self._renamed(name)
        return own not in self._state and bool(self._ignored and self._ignored.search(own))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Weights and kept buffers of the class that a checkpoint of these names leaves random."""
        there = {own for name in names for own in self.of(name)}
        there |= {source for tied, source in self.tied.items() if tied in there}
        there |= {tied for tied, source in self.tied.items() if source in there}
        return [name for name in self._state if name not in there and not is_buffer(name)
                and not (self._not_missed and self._not_missed.search(name))]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the class; `None` where it has none of that name."""
        return tuple(self._state[name].shape) if name in self._state else None

    def is_floating(self, name: str) -> bool:
        """Whether a tensor is one of the class that holds floating-point numbers."""
        return name in self._state and self._state[name].is_floating_point()

    def in_body(self, name: str) -> bool:
        """Whether a tensor of the class belongs to its body, and not to a head for one task.

        A pooler counts as a head: models of one body have it or not, by their task.
        """
        if _POOLER.search(name):
            return False
        return not self._has_body or name.startswith(f"{self._prefix}.")

    @cached_property
    def _has_body(self) -> bool:
        return bool(self._prefix) and any(n.startswith(self._prefix + ".") for n in self._state)


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    patterns = list(patterns or ())
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _vocabulary(model: PreTrainedModel) -> dict[str, int]:
    """Axes indexed by tokens; of a model of several, those of the models inside it."""
    try:
        return infer_vocabulary_axes(model)
    except (NotImplementedError, AttributeError):
        inside = [(name, part) for name, part in model.named_children()
                  if isinstance(part, PreTrainedModel)]
        return {f"{name}.{key}": axis for name, part in inside
                for key, axis in _vocabulary(part).items()}
