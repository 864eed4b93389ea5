"""RegMean (Jin et al., Dataless Knowledge Fusion, ICLR 2023, arXiv 2212.09849).

For one linear layer, `W_t` (out, in) the fine-tuned weights, `C_t` (in, in) the second moments of
their inputs, `D_t = W_t - W_0`: the merged weight whose outputs are nearest to every fine-tune's
on that fine-tune's own inputs, `min_W sum_t |(W - W_t) X_t|^2`, is

    W = (sum_t W_t C_t) (sum_t C_t)^-1 = W_0 + (sum_t D_t C_t) (sum_t C_t)^-1.

The second form is used: rounding and damping then touch the task vectors, not the base.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.merging.covariances import CovarianceMethod
from mergekit_pave.parameters import CALIBRATION, COVARIANCE, Parameter
from mergekit_pave.spec import spec_of
from mergekit_pave.statistics import Layer

# Of the mean diagonal: a feature that no model's data ever activates must not divide by zero.
_FLOOR = 1e-9

PARAMETERS = (
    Parameter("weight", float, 1.0, True, "weight of this model's squared error",
              accepts=((lambda value: value >= 0), "0 or more")),
    Parameter("lambda", float, 1.0, False, "factor on the merged task vector", gradient=True),
    Parameter("reduce_non_diagonal_ratio", float, 0.9, False,
              "factor on the covariances off their diagonal, as in the paper (section 3.3)",
              gradient=True, accepts=((lambda value: 0 <= value <= 1), "between 0 and 1")),
)


def regmean(
    deltas: Iterable[Tensor],
    covariances: Iterable[Tensor],
    weights: Iterable[float],
    off_diagonal: float,
) -> Tensor:
    """The merged task vector (out, in) float64 of one linear layer.

    Args:
        deltas: (out, in) each.
        covariances: (in, in) each, one for every delta; consumed one at a time.
        weights: of the models' errors.
        off_diagonal: factor on the covariances off their diagonal.

    Raises:
        ValueError: the covariances are not finite or all empty.
    """
    right, left = None, None
    for delta, covariance, weight in zip(deltas, covariances, weights, strict=True):
        c = covariance.to(torch.float64) * (weight * off_diagonal)
        c.diagonal().copy_(covariance.diagonal().to(torch.float64) * weight)
        moved = c @ delta.to(torch.float64).mT
        left, right = (c, moved) if left is None else (left.add_(c), right.add_(moved))
    mean = left.diagonal().mean()
    if not mean > 0 or not mean.isfinite():
        raise ValueError("the covariances are empty or not finite")
    left.diagonal().add_(_FLOOR * mean)
    return torch.linalg.solve(left, right, ).mT


class RegMean(CovarianceMethod):
    """`regmean`: the closed form where every model has a covariance, the mean elsewhere."""

    spec = MergeMethodSpec(
        name="regmean",
        parameters=tuple(map(spec_of, (*PARAMETERS, *CALIBRATION, COVARIANCE))),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name="RegMean",
        reference_url="https://arxiv.org/abs/2212.09849",
    )

    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        base, models = group.base.tensor, group.non_base
        weights = [parameters["weight"][entry.id] for entry in models]
        if not sum(weights) > 0:
            raise PaveError(f"regmean: every weight of {group.metadata.name} is 0; raise one.")
        wide = torch.promote_types(base.dtype, torch.float32)
        deltas = (entry.tensor.to(wide) - base.to(wide) for entry in models)
        if len(layers) == len(models):
            transposed = layers[models[0].id].transposed
            covariances = (layers[e.id].covariance().to(base.device) for e in models)
            oriented = (d.mT if transposed else d for d in deltas)
            try:
                delta = regmean(
                    oriented, covariances, weights, parameters["reduce_non_diagonal_ratio"]
                )
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise PaveError(
                    f"The covariances of {group.metadata.name} are unusable: {error}; recalibrate."
                ) from error
            delta = delta.mT if transposed else delta
        else:
            delta = sum(d * w for d, w in zip(deltas, weights, strict=True)) / sum(weights)
        merged = base.to(wide) + (parameters["lambda"] * delta).to(wide)
        return merged.to(base.dtype)
