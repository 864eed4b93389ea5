"""`PaveMerge`: a mergekit merge method that purifies its inputs, then runs another method.

What is done to the weights is in `purification`; where the covariances come from is in
`statistics`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    MergeMethod,
    MergeMethodSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.locate import LoaderOptions
from mergekit_pave.merging.covariances import CovarianceMethod, is_matrix, layer_of
from mergekit_pave.merging.planning import PlannedMethod
from mergekit_pave.numeric import check_finite, finite, wide
from mergekit_pave.papers import PAVE
from mergekit_pave.parameters import PARAMETERS
from mergekit_pave.purification import Participant, separated, truncated
from mergekit_pave.spec import spec_of
from mergekit_pave.statistics import Layer, Statistics

PREFIX = "pave_"


def can_wrap(method: MergeMethod) -> bool:
    """Whether a purified twin makes sense: a base is required, and it is not one already."""
    spec = method.spec
    return spec.contract.base == BasePolicy.REQUIRED and not spec.name.startswith(PREFIX)


def unwrapped(method: MergeMethod) -> MergeMethod:
    """The method itself, or the one that a purified twin wraps."""
    return method.inner if isinstance(method, PaveMerge) else method


class PaveMerge(PlannedMethod):
    """Purify every linear weight (PAVE, arXiv 2510.14697), then merge with `inner`.

    Tensors that are not purified are handed to `inner` as they came, so `rank_ratio: 1.0`
    is bit for bit `inner`. Where something is purified, the task vectors are formed and
    merged in float32 or better and the result is cast once, to the inputs' common dtype.
    """

    treated = "purified"

    def __init__(self, inner: MergeMethod, statistics: Statistics):
        self.inner = inner
        self.statistics = statistics
        spec = inner.spec
        # A method that needs covariances itself has the calibration keys already.
        inner_names = {p.name for p in spec.parameters}
        ours = (spec_of(p) for p in PARAMETERS.values() if p.name not in inner_names)
        self.spec: MergeMethodSpec = replace(
            spec,
            name=PREFIX + spec.name,
            pretty_name=f"PAVE-purified {spec.pretty_name or spec.name}",
            reference_url=PAVE.url,
            parameters=(*spec.parameters, *ours),
            uses_accelerator=True,
        )

    def prepare(self, options: LoaderOptions) -> None:
        self.statistics.prepare(options)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        own = {name: parameters[name] for name in PARAMETERS}
        inner = {p.name: parameters[p.name] for p in self.inner.spec.parameters}
        wants_layers = isinstance(self.inner, CovarianceMethod)
        # A model that contributes nothing here still has inputs, which the others should spare.
        all_models = wants_layers or own["purify"] == "separate"
        # What ranks the directions to purify is nothing to a method that needs the covariances.
        looked_up = {**own, "subspace": "covariance"} if wants_layers else own
        layers: dict[Hashable, Layer] = {}
        if is_matrix(group) and (own["rank_ratio"] != 1 or wants_layers):
            for entry in group.non_base:
                if not (all_models or _contributes(entry, group, inner)):
                    continue
                layer = layer_of(self.statistics, group, entry, looked_up)
                if layer is not None:
                    layers[entry.id] = layer
        purified = self._purify(group, layers, own, inner)
        name = group.metadata.name
        self.statistics.count("plain" if purified is group else "purified", name)
        if wants_layers:
            merged = self.inner.merge_layers(purified, layers, **inner)
        else:
            (merged,) = self.inner((purified,), parameters=inner)
        if purified is group:
            return finite(merged, group)
        merged = merged.to(group.entries[0].tensor.dtype)
        if not torch.isfinite(merged).all():
            raise PaveError(
                f"The merge of {name} holds NaN or Inf; lower the weights, or "
                "set rank_ratio: 1.0 for this tensor with a filter."
            )
        return merged

    def _purify(
        self,
        group: TensorGroup,
        layers: Mapping[Hashable, Layer],
        own: Mapping[str, Any],
        inner: Mapping[str, Any],
    ) -> TensorGroup:
        """`group` itself when nothing is purified, else a copy in float32 or better."""
        participants = [
            Participant(entry.id, entry.tensor, layers[entry.id])
            for entry in group.non_base
            if entry.id in layers and _contributes(entry, group, inner)
        ]
        if own["rank_ratio"] == 1 or not participants:
            return group
        base, name = group.base.tensor, group.metadata.name
        check_finite(base, group.base.id, name)
        for participant in participants:
            check_finite(participant.tensor, participant.model, name)
        if own["purify"] == "separate":
            new = separated(participants, layers, base, own)
        else:
            new = truncated(participants, base, own)
        for model, purified in new.items():
            if purified.cut is not None:
                self.statistics.record_cut(name, model, purified.cut)
        entries = tuple(
            replace(e, tensor=new[e.id].weight if e.id in new else wide(e.tensor))
            for e in group.entries
        )
        return replace(group, entries=entries)


def _contributes(entry: TensorEntry, group: TensorGroup, inner: Mapping[str, Any]) -> bool:
    """False for a task vector that is zero anyway.

    Projecting a weight that equals the base's would give it a task vector: minus the base
    in the dropped directions.
    """
    weights = inner.get("weight")
    if isinstance(weights, Mapping) and weights.get(entry.id) == 0:
        return False
    return not torch.equal(entry.tensor, group.base.tensor)
