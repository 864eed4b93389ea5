"""Whether a model that transformers has loaded is what its files say.

transformers starts at random what a checkpoint lacks, applies an adapter that lies in the folder,
and may read another file than mergekit. Covariances of such a model fit none of the merged weights.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mergekit_pave.errors import PaveError
from mergekit_pave.models.renaming import ClassNames
from mergekit_pave.storage.identity import fingerprint, same

logger = logging.getLogger(__name__)

# transformers looks for an adapter in this folder of the checkpoint, and finds none.
NO_ADAPTER = {"adapter_kwargs": {"subfolder": ".no-adapter"}}


def refuse_random(
    model: PreTrainedModel, info: Mapping[str, Any], label: str, *, head: bool = False
) -> None:
    """Raise `PaveError` where weights that count were not in the checkpoint.

    Args:
        model: as transformers has loaded it.
        info: `output_loading_info` of `from_pretrained`.
        label: the model's name for messages.
        head: weights of a task's head count too; without it their absence is a warning.

    Raises:
        PaveError: an adapter was applied, or weights are random or of another size.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PaveError(
            f"transformers has applied an adapter to {label}: move adapter_config.json out of its "
            "folder.")
    random, names = _random(info), ClassNames(model)
    body = [name for name in random if head or names.in_body(name)]
    if body:
        unknown = sorted(map(str, info.get("unexpected_keys") or ()))
        beside = f"; it has {unknown[0]} instead, which the class does not know" if unknown else ""
        raise PaveError(
            f"{label} has no fitting weights for {len(body)} tensors of its class "
            f"{type(model).__name__}, such as {body[0]}, and transformers starts them at random"
            f"{beside}: correct its files or the class in its config.json."
        )
    if random:
        logger.warning(
            "%s has no weights for %s of the tensors of %s (%s, ...): they start at random.",
            label, len(random), type(model).__name__, random[0],
        )


def _random(info: Mapping[str, Any]) -> list[str]:
    mismatched: Collection[Any] = info.get("mismatched_keys") or ()
    sizes = {key if isinstance(key, str) else key[0] for key in mismatched}
    return sorted({*(info.get("missing_keys") or ()), *sizes})


def refuse_other_values(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], label: str
) -> None:
    """Raise `PaveError` where a weight in memory is not the one in the files.

    A sample of each tensor is compared (`fingerprint`), after rounding to both dtypes. What
    transformers computes from several tensors (fused experts) or ties, and what accelerate has
    left in its shard, is passed over.

    Args:
        model: as transformers has loaded it.
        tensors: the checkpoint's, by their names there.
        label: the model's name for messages.
    """
    names, state = ClassNames(model), model.state_dict()
    for name, tensor in tensors:
        own = names.one(name)
        if own in state and tensor.element_size() == 1 and state[own].is_floating_point():
            raise PaveError(
                f"{name} of {label} holds numbers of one byte ({tensor.dtype}), as quantised "
                "weights do: name the full-precision checkpoint.")
        if own is None or own in names.tied or state[own].device.type == "meta":
            continue
        there = state[own]
        if there.shape != tensor.shape and not names.in_body(own):
            continue  # a head that the caller replaces
        seen, kept = (fingerprint(t).nan_to_num() for t in (there, tensor))
        if there.shape != tensor.shape or not same(
            seen, kept[None], tensor.dtype, there.dtype
        ).all():
            raise PaveError(
                f"transformers loads other values for {name} of {label} than mergekit reads from "
                "its files: keep one set of weights in that folder."
            )
