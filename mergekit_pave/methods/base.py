"""What our methods share: the state of their merge, their parameters, and what a card says."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mergekit.merge_methods import (
    GroupMergeMethod,
    ParameterScope,
    PerInputValues,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor
from typing_extensions import Self

from mergekit_pave.algebra import numeric
from mergekit_pave.algebra.papers import EMR, REGMEAN, TSV, Paper
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.layers import Layer, MergeState
from mergekit_pave.recipe.parameters import CovarianceSource, Parameter


class StatefulMethod(GroupMergeMethod):
    """A merge method that looks at what its merge has opened, and counts what it does.

    mergekit's registry holds one instance of every method for all merges. That one has no state:
    each merge, in memory or to disk, works with a copy of its own.
    """

    state: MergeState  # set on the copy that a merge works with

    def within(self, state: MergeState, name: str | None = None) -> Self:
        """The copy that belongs to one merge, registered under `name` for its time."""
        own = copy.copy(self)
        own.state = state
        own.spec = replace(self.spec, name=name or self.spec.name)
        return own

    def _execute(self, groups: Any, *args: Any, **kwargs: Any) -> Any:
        if "state" not in vars(self):  # tensors in memory
            return self.within(MergeState())._execute(groups, *args, **kwargs)
        return super()._execute(groups, *args, **kwargs)


def is_matrix(group: TensorGroup) -> bool:
    """Whether the tensors may be weights of linear layers: 2-D and no vocabulary."""
    return group.entries[0].tensor.ndim == 2 and group.metadata.vocabulary_axis is None


def of_model(values: Mapping[str, Any], model: Hashable) -> dict[str, Any]:
    """One model's parameters out of those of all models."""
    return {
        name: value[model] if isinstance(value, PerInputValues) else value
        for name, value in values.items()
    }


def layers_of(
    state: MergeState,
    group: TensorGroup,
    entries: Iterable[TensorEntry],
    values: Mapping[str, Any],
    subspace: str = "covariance",
) -> dict[Hashable, Layer]:
    """The linear layers behind inputs of a group, by model; `values` as mergekit bound them."""
    found: dict[Hashable, Layer] = {}
    if not is_matrix(group):
        return found
    for entry in entries:
        source = CovarianceSource.of(of_model(values, entry.id))
        layer = state.layer(
            entry.id, group.metadata.name, entry.tensor, group.base.tensor, source, subspace
        )
        if layer is not None:
            found[entry.id] = layer
    return found


class CovarianceMethod(StatefulMethod):
    """A method of the fine-tuned weights *and* their layers' inputs.

    Its specification has the calibration keys. `merge_layers` is what it does, once the layers
    are known; a purified twin knows them already, from the weights before purification.
    """

    treated = "merged by their covariances"
    solves = True

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        layers = layers_of(self.state, group, group.non_base, parameters)
        # Where one model lacks a covariance, the method falls back on one that needs none.
        solved = bool(layers) and len(layers) == len(group.non_base)
        self.state.count("purified" if solved else "plain", group.metadata.name)
        return finite(self.merge_layers(group, layers, **parameters), group)

    @abstractmethod
    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        """Merge a group; `layers` holds those of its models that have a covariance here."""


def check_finite(tensor: Tensor, model: Hashable, name: str | None) -> None:
    """Raise `PaveError` where a weight of `model` holds NaN or Inf."""
    if not numeric.finite(tensor):
        raise PaveError(
            f"{name} of {model} holds NaN or Inf"
            + (", or is too large for dtype float16; set float32, or"
               if tensor.dtype == torch.float16 else ";")
            + " download or save that checkpoint again."
        )


def finite(merged: Tensor, group: TensorGroup) -> Tensor:
    """`merged`; raises `PaveError` where it holds NaN or Inf, naming the model that brought it."""
    if numeric.finite(merged):
        return merged
    for entry in group.entries:
        check_finite(entry.tensor, entry.id, group.metadata.name)
    raise PaveError(
        f"The merge of {group.metadata.name} holds NaN or Inf; lower the weights or lambda."
    )


@dataclass(frozen=True)
class About:
    """What a method of ours does, in Markdown, and where it comes from."""

    text: str
    papers: tuple[Paper, ...]


_REST = "everything else (norms, biases, vocabulary) got the mean of the differences."

# By the name of the method, or of the one that a purified twin wraps.
ABOUT = {
    "tsv_m": About(
        "In every matrix, the leading singular directions of the models' differences from the "
        f"base were made orthogonal to each other and added (TSV-Merge, {TSV.link}); {_REST}",
        (TSV,)),
    "regmean": About(
        "Every linear weight was solved for in closed form, by the covariances of the models' "
        f"layer inputs (RegMean, {REGMEAN.link}); {_REST}",
        (REGMEAN,)),
    "matched_regmean": About(
        "Every linear weight was solved for in closed form, by the second moments of the models' "
        f"layer inputs (RegMean, {REGMEAN.link}), with the merge of orthogonal singular directions "
        f"(TSV-Merge, {TSV.link}) where those say nothing; its singular values were evened out, "
        "and the change scaled so that it answers to the models' inputs as strongly as their own "
        f"differences from the base; {_REST}",
        (REGMEAN, TSV)),
    "tsv_regmean": About(
        "Every linear weight is a mixture of two merges. One makes the leading singular directions "
        f"of the models' differences from the base orthogonal to each other (TSV-Merge, {TSV.link})"
        ", the other is solved for by the covariances of the models' layer inputs (RegMean, "
        f"{REGMEAN.link}); {_REST}",
        (TSV, REGMEAN)),
    "emr": About(
        "These are the weights that all tasks share; alone they are not meant to be used. The "
        "folder `emr` holds one bit per parameter and task, which turn them into each task's model "
        f"(EMR-Merging, {EMR.link}): `mergekit-pave materialize MODEL TASK DIR` writes it as a "
        "model folder, and `mergekit_pave.load_task_model(MODEL, TASK)` loads it. MODEL "
        "is this one's folder or Hub id, TASK one of the merged models: its name or its number "
        "from 0.",
        (EMR,)),
}


@dataclass(frozen=True)
class CheckedSpec(ParameterSpec):
    """A parameter whose bad values are refused in one sentence, while mergekit plans."""

    parameter: Parameter = field(kw_only=True)

    def validate(self, value: Any) -> Any:
        return self.parameter.validate(value)


def spec_of(parameter: Parameter) -> CheckedSpec:
    return CheckedSpec(
        name=parameter.name,
        value_type=parameter.kind | None,
        scope=ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
        default=parameter.default,
        description=parameter.doc,
        parameter=parameter,
    )
