"""How many components each model loses at one layer (section 3.3 of the paper).

Every model's singular values are divided by its own largest, the values of all models are pooled,
and the smallest go until the layer's budget is spent. Dropping a component costs its squared value
and nothing else, and the values of one model are sorted, so this greedy choice is the optimum.

Rounding is half-up. With `x = (1 - rank_ratio) * R`:

* the budget of `T` models is `round(x * T)`, so a layer too small to give up half a component
  over all models keeps everything;
* one model may lose `round(1.5 * x)`, but never less than `ceil(x)` is allowed (at small `x` the
  rounded cap could not pay the budget) and one component is always kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# (1 - 0.9) * 5 is 0.49999999999999994 in binary; what is meant is one half.
_SLACK = 1e-9


def cap(full_rank: int, rank_ratio: float) -> int:
    """The most components one model may lose, hence the length of the tail it has to deliver."""
    _check_ratio(rank_ratio)
    share = (1 - rank_ratio) * full_rank
    return min(max(_round(1.5 * share), math.ceil(share - _SLACK)), max(full_rank - 1, 0))


def allocate(
    spectra: Sequence[Tensor],
    full_ranks: int | Sequence[int],
    rank_ratio: float,
    method: str = "spectral",
) -> list[int]:
    """The number of components to drop from each model.

    Args:
        spectra: per model, its smallest singular values in ascending order over its largest one
            (`Tail.normalised`), at least `cap` of them. "uniform" looks only at how many models
            there are.
        full_ranks: `R = min(out, in)`, one for all models or one each.
        rank_ratio: the kept fraction of the ranks of all models together.
        method: "spectral" shares the budget by error, "uniform" cuts every model alike.
    """
    ranks = [full_ranks] * len(spectra) if isinstance(full_ranks, int) else list(full_ranks)
    if len(ranks) != len(spectra):
        raise ValueError(f"{len(spectra)} spectra but {len(ranks)} full ranks")
    caps = [cap(rank, rank_ratio) for rank in ranks]
    if method == "uniform":
        shares = (_round((1 - rank_ratio) * rank) for rank in ranks)
        return [min(share, most) for share, most in zip(shares, caps, strict=True)]
    if method != "spectral":
        raise ValueError(f"method must be 'spectral' or 'uniform'; got {method!r}")
    budget = min(_round((1 - rank_ratio) * sum(ranks)), sum(caps))
    return _cheapest(spectra, caps, budget)


def _cheapest(spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> list[int]:
    """Count, per model, the `budget` smallest values when each model offers only its `caps`."""
    models = len(spectra)
    # (component, model): on a tie the stable sort goes round the models, so equal spectra lose
    # equally and the result does not depend on the sort of the backend.
    shape = (max(caps, default=0), models)
    offers = torch.full(shape, torch.inf, dtype=torch.float64, device="cpu")
    for model, (values, most) in enumerate(zip(spectra, caps, strict=True)):
        if len(values) < most:
            raise ValueError(f"model {model} offers {len(values)} values; {most} are needed")
        offers[:most, model] = values[:most].to(offers)
    if offers.isnan().any() or (offers.diff(dim=0) < 0).any():
        raise ValueError("every spectrum must be ascending, without NaN")
    dropped = offers.flatten().argsort(stable=True)[:budget] % max(models, 1)
    return torch.bincount(dropped, minlength=models).tolist()


def _round(x: float) -> int:
    return math.floor(x + 0.5 + _SLACK)


def _check_ratio(rank_ratio: float) -> None:
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio must be above 0 and at most 1; got {rank_ratio}")
