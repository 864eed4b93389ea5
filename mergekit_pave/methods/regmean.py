"""RegMean (Jin et al., Dataless Knowledge Fusion, ICLR 2023, arXiv 2212.09849).

For one linear layer, `W_t` (out, in) the fine-tuned weights, `C_t` (in, in) the second moments of
their inputs, `D_t = W_t - W_0`: the merged weight whose outputs are nearest to every fine-tune's
on that fine-tune's own inputs, `min_W sum_t |(W - W_t) X_t|^2`, is

    W = (sum_t W_t C_t) (sum_t C_t)^-1 = W_0 + (sum_t D_t C_t) (sum_t C_t)^-1.

The second form is used: rounding and damping then touch the task vectors, not the base.

`averaging` (`mu`) makes it one of a family, with the task vectors of `mergekit_pave.separation`:

    W = W_0 + lambda sum_t D_t C_t (C_t + mu sum_{s != t} C_s)^-1.

1 is RegMean. It averages where tasks share inputs; smaller values add up more of the task vectors,
and 0 adds them up as far as each one's own data reaches.

What several tasks have in common is added up several times and outgrows what one of them alone
has. `flattening` (`p`) evens that out, as isotropic merging does with plain sums of task vectors
(Marczak et al., arXiv 2502.04959): the merged task vector `U S V^T` becomes `U S^(1 - p) V^T`,
scaled so that the mean singular value stays. 0 leaves it, 1 makes all directions equally strong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.algebra.numeric import double, rounding, wide
from mergekit_pave.algebra.papers import REGMEAN
from mergekit_pave.algebra.separation import flattened, regmean
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import CovarianceMethod, check_finite, spec_of
from mergekit_pave.methods.kept import Kept
from mergekit_pave.methods.layers import Layer
from mergekit_pave.recipe.parameters import (
    CALIBRATION,
    COVARIANCE,
    FLATTENING,
    NotNegative,
    Number,
    Parameter,
    Share,
)

PARAMETERS = (
    Parameter("weight", NotNegative, 1.0, True, "weight of this model's squared error",
              gradient=True),
    Parameter("lambda", Number, 1.0, False,
              "scales the merged task vectors of the weights that are solved for", gradient=True),
    Parameter("lambda_other", Number, 1.0, False,
              "scales the mean task vectors of all other tensors", gradient=True),
    Parameter("averaging", NotNegative, 1.0, False,
              "1 averages the task vectors where models share inputs (RegMean), 0 adds them up",
              gradient=True),
    FLATTENING,
    Parameter("reduce_non_diagonal_ratio", Share, 0.9, False,
              "factor on the covariances off their diagonal, as in the paper (section 3.3); 1 "
              "wants data that use every direction of their layer's inputs",
              gradient=True),
)


class RegMean(CovarianceMethod):
    """`regmean`: the closed form where every model has a covariance, the mean elsewhere."""

    spec = MergeMethodSpec(
        name="regmean",
        parameters=tuple(map(spec_of, (*PARAMETERS, *CALIBRATION, COVARIANCE))),
        contract=InputContract(base=BasePolicy.REQUIRED),
        pretty_name="RegMean",
        reference_url=REGMEAN.url,
    )

    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        base, models = group.base.tensor, group.non_base
        weights = [parameters["weight"][entry.id] for entry in models]
        counting = [entry for entry, w in zip(models, weights, strict=True) if w]
        if all(torch.equal(entry.tensor, base) for entry in counting):
            # Without data the covariances would be empty. An optional tensor that only the base
            # has comes with no models at all.
            return base
        if len(layers) == len(models):
            delta = parameters["lambda"] * change(group, layers, parameters, Kept.of(group))
        else:
            deltas = (wide(entry.tensor) - wide(base) for entry in models)
            total = sum(d * w for d, w in zip(deltas, weights, strict=True))
            delta = parameters["lambda_other"] * total / sum(weights)
        return (wide(base) + delta.to(wide(base))).to(base.dtype)


def change(
    group: TensorGroup,
    layers: Mapping[Hashable, Layer],
    parameters: Mapping[str, Any],
    kept: Kept,
) -> Tensor:
    """The merged task vector of a linear layer as its weights are stored, before `lambda`.

    Args:
        group: the weights, not all of them the base's.
        layers: of all models.
        parameters: of the method.
        kept: what is known of the group.
    """
    base, models = group.base.tensor, group.non_base
    for entry in group.entries:
        check_finite(entry.tensor, entry.id, group.metadata.name)
    weights = [parameters["weight"][entry.id] for entry in models]
    own = [layers[entry.id] for entry in models]
    transposed, flattening = own[0].transposed, parameters["flattening"]
    off_diagonal = parameters["reduce_non_diagonal_ratio"]
    averaging = parameters["averaging"]
    about = ("regmean", weights, off_diagonal, averaging, kept.moments(own))

    def solved() -> Tensor:
        deltas = (wide(entry.tensor) - wide(base) for entry in models)
        oriented = (d.mT if transposed else d for d in deltas)
        covariances = [_reader(layer, base.device) for layer in own]
        delta = regmean(oriented, covariances, weights, off_diagonal, averaging)
        return delta.mT if transposed else delta

    def even() -> Tensor:
        return flattened(double(kept.change(solved, *about)), flattening, rounding(base))

    try:
        return kept.change(even, *about, flattening) if flattening else kept.change(solved, *about)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise PaveError(
            f"The covariances of {group.metadata.name} are unusable: {error}; recalibrate."
        ) from error


def _reader(layer: Layer, device: torch.device) -> Callable[[], Tensor]:
    return lambda: layer.covariance().to(device)
