"""The mean of TSV-Merge and of a RegMean that adds up more of the task vectors, evened out.

Both keep tasks out of each other's way, by different means: `tsv` makes their singular vectors
orthogonal, knowing nothing of the data; `regmean` with `averaging` below 1 weighs input directions
by whose data has them, knowing nothing of the task vectors' structure. For a linear layer with the
merged task vectors `D_tsv` and `D_reg` (out, in) of the two,

    W = W_0 + lambda (b D_tsv + (1 - b) D_reg).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.algebra.numeric import double
from mergekit_pave.algebra.papers import TSV
from mergekit_pave.methods import regmean, tsv
from mergekit_pave.methods.base import CovarianceMethod, spec_of
from mergekit_pave.methods.kept import Kept
from mergekit_pave.methods.layers import Layer
from mergekit_pave.recipe.parameters import (
    CALIBRATION,
    COVARIANCE,
    RANK_FRACTION,
    NotNegative,
    Number,
    Parameter,
    Share,
)

_OFF_DIAGONAL = next(p for p in regmean.PARAMETERS if p.name == "reduce_non_diagonal_ratio")
_FLATTENING = replace(
    next(p for p in regmean.PARAMETERS if p.name == "flattening"), default=0.5)
_MEAN = next(p for p in tsv.PARAMETERS if p.name == "lambda_other")

PARAMETERS = (
    Parameter("weight", NotNegative, 1.0, True, "of this model, in both methods", gradient=True),
    Parameter("balance", Share, 0.5, False, "share of TSV-Merge; the rest is RegMean's",
              gradient=True),
    Parameter("averaging", NotNegative, None, False,
              "RegMean's: how much each other model's inputs count; 1 / (models - 1) when not "
              "given", gradient=True),
    _FLATTENING,
    _OFF_DIAGONAL,
    RANK_FRACTION,
    Parameter("lambda", Number, 1.0, False, "scales the merged task vectors of linear weights",
              gradient=True),
    _MEAN,
)


class TsvRegMean(CovarianceMethod):
    """`tsv_regmean`: linear weights by both methods, everything else as in `tsv_m`."""

    spec = MergeMethodSpec(
        name="tsv_regmean",
        parameters=tuple(map(spec_of, (*PARAMETERS, *CALIBRATION, COVARIANCE))),
        contract=InputContract(base=BasePolicy.REQUIRED),
        pretty_name="TSV-Merge and RegMean",
        reference_url=TSV.url,
    )

    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        # TSV-Merge runs as published; `flattening` belongs to RegMean here.
        as_published = {"flattening": 0.0, "strength": "plain"}
        of_tsv = {**{p.name: parameters.get(p.name) for p in tsv.PARAMETERS}, **as_published}
        if not layers or len(layers) < len(group.non_base):
            return tsv.TaskSingularVectors().merge_group(group, **of_tsv)
        averaging = parameters["averaging"]
        if averaging is None:
            present = sum(weight != 0 for weight in parameters["weight"].values())
            averaging = 1 / max(present - 1, 1)
        of_regmean = {
            "weight": parameters["weight"],
            "averaging": averaging,
            "flattening": parameters["flattening"],
            _OFF_DIAGONAL.name: parameters[_OFF_DIAGONAL.name],
        }
        base, weights = group.base.tensor, parameters["weight"]
        counting = {i: w for i, w in weights.items() if w != 0}
        if all(torch.equal(e.tensor, base) for e in group.non_base if e.id in counting):
            return base
        share, scale, kept = parameters["balance"], parameters["lambda"], Kept.of(group)
        merged = double(base)
        if share > 0:
            one = tsv.change(group, counting, of_tsv, kept)
            merged = torch.add(merged, one, alpha=scale * share)
        if share < 1:
            other = double(regmean.change(group, layers, of_regmean, kept))
            merged = torch.add(merged, other, alpha=scale * (1 - share))
        return merged.to(base)
