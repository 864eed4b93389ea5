"""`tsv_m`: TSV-Merge (Gargiulo et al., CVPR 2025, arXiv 2412.00081) as a method of mergekit.

`algebra.tsv` has the derivation. `flattening` (`algebra.separation`) and `strength: matched`
(`algebra.response`) are not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from mergekit_pave.algebra.numeric import double, rounding, wide
from mergekit_pave.algebra.papers import TSV
from mergekit_pave.algebra.response import matched
from mergekit_pave.algebra.separation import flattened
from mergekit_pave.algebra.tsv import kept_rank, merged_change
from mergekit_pave.methods.base import check_finite, finite, is_matrix, spec_of
from mergekit_pave.methods.kept import Kept, places
from mergekit_pave.recipe.parameters import (
    FLATTENING,
    RANK_FRACTION,
    STRENGTH,
    Number,
    Parameter,
)

PARAMETERS = (
    Parameter("weight", Number, 1.0, True, "scales the model's delta before its decomposition",
              gradient=True),
    RANK_FRACTION,
    FLATTENING,
    STRENGTH,
    Parameter("lambda", Number, 1.0, False, "scales the merged deltas of matrices", gradient=True),
    Parameter("lambda_other", Number, 1.0, False,
              "scales the mean deltas of all other tensors: norms, biases, embeddings, the output "
              "head", gradient=True),
)


class TaskSingularVectors(GroupMergeMethod):
    """TSV-Merge: the tasks' leading singular vectors, orthogonalised against each other.

    Matrices are merged by `merged_delta`, whatever way round they are stored. The vocabulary's
    (token embeddings, output head) are not: their rows are looked up one by one, or belong to one
    token each, and have no directions in common to untangle. They and all tensors that are no
    matrices (norms, biases, convolutions, fused 3-D experts) get the mean of the deltas.

    A model whose delta is zero in a matrix, or whose `weight` is 0, leaves its share of the rank
    to the others, as if it were absent. A mean counts every model whose weight is not 0.

    Everything is computed in float32 or better; one cast at the end.
    """

    spec = MergeMethodSpec(
        name="tsv_m",
        pretty_name="TSV-Merge",
        reference_url=TSV.url,
        parameters=tuple(map(spec_of, PARAMETERS)),
        contract=InputContract(base=BasePolicy.REQUIRED),
        uses_accelerator=True,
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        base = group.base.tensor
        weights = {i: w for i, w in parameters["weight"].items() if w != 0}
        if not weights or base.numel() == 0:
            return base
        if is_matrix(group):
            merged = change(group, weights, parameters, Kept.of(group))
            merged = torch.add(double(base), merged, alpha=parameters["lambda"])
            return finite(merged.to(base), group)
        return finite(_mean(group, weights, parameters["lambda_other"]), group)


def change(
    group: TensorGroup, weights: Mapping[Any, float], parameters: Mapping[str, Any], kept: Kept
) -> Tensor:
    """The merged delta of a matrix in float64, before `lambda`.

    Args:
        group: the weights.
        weights: those of the models, by id, that are not 0.
        parameters: of the method.
        kept: what is known of the group.
    """
    base = group.base.tensor
    changed = [
        entry for entry in group.non_base
        if entry.id in weights and not torch.equal(entry.tensor, base)
    ]
    if not changed:
        return torch.zeros_like(double(base))
    counts = [weights[entry.id] for entry in changed]
    merged = leading_change(group, changed, counts, parameters["rank_fraction"], kept)
    if flattening := parameters["flattening"]:
        merged = flattened(double(merged), flattening, rounding(base))
    if parameters["strength"] == "matched":
        deltas = ((double(e.tensor) - double(base)) * weights[e.id] for e in changed)
        merged = double(merged) * matched(deltas, merged)
    return double(merged)


def leading_change(
    group: TensorGroup,
    changed: Sequence[TensorEntry],
    weights: Sequence[float],
    fraction: float | None,
    kept: Kept,
) -> Tensor:
    """`merged_change` of the models that differ from the base, as TSV-Merge is published."""
    base = group.base.tensor
    for entry in (group.base, *changed):
        check_finite(entry.tensor, entry.id, group.metadata.name)
    count = kept_rank(base.shape, len(changed), fraction)
    return kept.change(
        lambda: merged_change(base, [entry.tensor for entry in changed], weights, count),
        "tsv", places(group, changed), weights, count)


def _mean(group: TensorGroup, weights: Mapping[Any, float], scale: float) -> Tensor:
    base = group.base.tensor
    origin = wide(base)
    total = torch.zeros_like(origin)
    for entry in group.non_base:
        if entry.id in weights:
            total.add_(entry.tensor.to(origin) - origin, alpha=weights[entry.id])
    return torch.add(origin, total, alpha=scale / len(weights)).to(base)
