"""`emr`: EMR-Merging (Huang et al., arXiv 2405.17461) as a method of mergekit.

`algebra.emr` has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Literal

from mergekit.common import ModelReference
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.algebra.choices import RESCALERS
from mergekit_pave.algebra.emr import elect, trace
from mergekit_pave.algebra.papers import EMR
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import StatefulMethod, check_finite, spec_of
from mergekit_pave.recipe.parameters import Parameter

_RESCALER = Parameter(
    "rescaler", Literal["tensor_mean", "global"], RESCALERS[0], False,
    "how a task's factor weighs the tensors: `tensor_mean` each alike (the authors' code), "
    "`global` by size (the paper)")


class EmrMerge(StatefulMethod):
    """Merges to the unified model, and hands the tasks' masks to the recorder of the merge."""

    masks = True

    spec = MergeMethodSpec(
        name="emr",
        pretty_name="EMR-Merging",
        reference_url=EMR.url,
        parameters=(spec_of(_RESCALER),),
        contract=InputContract(base=BasePolicy.REQUIRED),
    )

    def merge_group(self, group: TensorGroup, /, rescaler: str) -> Tensor:
        base = group.base.tensor
        if not group.non_base:
            return base
        # Checked before the election, which would spread NaN or Inf of one model to all.
        for entry in group.entries:
            check_finite(entry.tensor, entry.id, group.metadata.name)
        merged = elect(base, [entry.tensor for entry in group.non_base])
        if recorder := self.state.masks:
            traces = ((e.id, trace(base, e.tensor, merged)) for e in group.non_base)
            recorder.add(
                group.metadata.name,
                group.base.id,
                base,
                _summable(traces, group.metadata.name),
                rescaler,
                vocabulary=group.metadata.vocabulary_axis is not None,
            )
        elif isinstance(group.base.id, ModelReference):  # not tensors in memory
            raise PaveError(
                "emr writes masks beside a model folder, and this is none: name model folders to "
                "mergekit-yaml."
            )
        return merged


def _summable(traces: Iterable[tuple], name: str | None) -> Iterable[tuple]:
    for model, found in traces:
        if not (isfinite(found.own) and isfinite(found.unified)):
            raise PaveError(
                f"The difference of {name} of {model} from the base adds up to more than a number "
                "can hold; download or save both checkpoints again."
            )
        yield model, found
