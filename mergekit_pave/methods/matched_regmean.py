"""RegMean that falls back on TSV-Merge, evened out, with the strength that the inputs ask for.

For a linear layer with task vectors `D_t` (out, in), input moments `C_t` and TSV-Merge's change
`P` (`algebra.response` has the derivations):

    M = (sum_t D_t C_t + g P) (sum_t C_t + g I)^-1,
    W = W_0 + lambda s U S^(1 - f) V^T,   M = U S V^T.

`s` makes the change answer to the tasks' inputs as strongly as their own task vectors do, which is
where `lambda` starts; `f` grows with the number of distinct task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods import BasePolicy, InputContract, MergeMethodSpec, TensorGroup
from torch import Tensor

from mergekit_pave.algebra.numeric import double, rounding, wide
from mergekit_pave.algebra.papers import REGMEAN
from mergekit_pave.algebra.response import evening, strength, toward
from mergekit_pave.algebra.separation import flattened
from mergekit_pave.errors import PaveError
from mergekit_pave.methods import tsv
from mergekit_pave.methods.base import CovarianceMethod, check_finite, spec_of
from mergekit_pave.methods.kept import Kept, places
from mergekit_pave.methods.layers import Layer
from mergekit_pave.recipe.parameters import (
    CALIBRATION,
    COVARIANCE,
    FLATTENING,
    RANK_FRACTION,
    Number,
    Parameter,
)

_FLATTENING = replace(
    FLATTENING, default=None, doc=FLATTENING.doc + "; grows with the number of models that differ "
    "when not given")
_MEAN = next(p for p in tsv.PARAMETERS if p.name == "lambda_other")

PARAMETERS = (
    Parameter("weight", Number, 1.0, True, "scales the model's task vector", gradient=True),
    _FLATTENING,
    RANK_FRACTION,
    Parameter("lambda", Number, 1.0, False,
              "scales the merged task vectors of linear weights; at 1 they answer to the models' "
              "inputs as strongly as the models' own", gradient=True),
    _MEAN,
)


class MatchedRegMean(CovarianceMethod):
    """`matched_regmean`: the regression where every model is known to have a linear layer.

    Everything else is as in `tsv_m`. A model whose weight equals the base's, or whose `weight` is
    0, does not count there. Where one model is left, its weight is taken as it is.
    """

    spec = MergeMethodSpec(
        name="matched_regmean",
        parameters=tuple(map(spec_of, (*PARAMETERS, *CALIBRATION, COVARIANCE))),
        contract=InputContract(base=BasePolicy.REQUIRED),
        pretty_name="Matched RegMean",
        reference_url=REGMEAN.url,
    )

    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        if not layers or len(layers) < len(group.non_base):
            of_tsv = {p.name: parameters.get(p.name, p.default) for p in tsv.PARAMETERS}
            of_tsv["flattening"] = parameters["flattening"] or 0.0
            return tsv.TaskSingularVectors().merge_group(group, **of_tsv)
        base, weights = group.base.tensor, parameters["weight"]
        changed = [
            e for e in group.non_base if weights[e.id] and not torch.equal(e.tensor, base)]
        if not changed:
            return base
        for entry in (group.base, *changed):
            check_finite(entry.tensor, entry.id, group.metadata.name)
        if len(changed) == 1:  # nothing to keep apart: its task vector is taken to the last bit
            (entry,) = changed
            delta = (double(entry.tensor) - double(base)) * weights[entry.id]
            return torch.add(double(base), delta, alpha=parameters["lambda"]).to(base)
        transposed = layers[changed[0].id].transposed
        counts = [weights[e.id] for e in changed]
        fraction, flattening = parameters["rank_fraction"], parameters["flattening"]
        kept = Kept.of(group)

        def found() -> Tensor:
            prior = tsv.leading_change(group, changed, counts, fraction, kept)
            deltas = [(wide(e.tensor) - wide(base)) * weights[e.id] for e in changed]
            if transposed:
                prior, deltas = prior.mT, [d.mT for d in deltas]
            readers = [_scaled(layers[e.id], weights[e.id], base.device) for e in changed]
            noise = rounding(base) * max(map(abs, counts))
            delta = solved(deltas, readers, prior, noise, flattening)
            return delta.mT if transposed else delta

        try:
            delta = double(kept.change(
                found, "matched", places(group, changed), counts, fraction, flattening,
                kept.moments(layers[e.id] for e in changed)))
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise PaveError(
                f"The covariances of {group.metadata.name} are unusable: {error}; recalibrate."
            ) from error
        return torch.add(double(base), delta, alpha=parameters["lambda"]).to(base)


def solved(
    deltas: list[Tensor],
    covariances: list[Callable[[], Tensor]],
    prior: Tensor,
    noise: float,
    flattening: float | None = None,
) -> Tensor:
    """The merged change `s U S^(1 - f) V^T` (out, in) float64 of one linear layer.

    Args:
        deltas: `D_t` (out, in) each.
        covariances: each reads one `C_t` (in, in).
        prior: `P` (out, in).
        noise: the largest singular value that rounding may have.
        flattening: `f`; `1 - N^-1/2` when not given.

    Raises:
        ValueError: the covariances are not finite, or all of them are empty.
        torch.linalg.LinAlgError: they are no second moments.
    """
    found = toward(deltas, covariances, prior)
    evened = flattened(
        found.delta, evening(deltas) if flattening is None else flattening, noise)
    return evened * strength(found.answer, evened, found.moment)


def _scaled(layer: Layer, weight: float, device: torch.device) -> Callable[[], Tensor]:
    """Reads a covariance on the scale of a task vector that is `weight` times as large."""
    return lambda: layer.covariance().to(device) * weight**2
