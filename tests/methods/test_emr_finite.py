"""NaN and Inf under emr: the model that has it is the one that is named, in memory too."""

from __future__ import annotations

import pytest
import torch
from mergekit.merge_methods import merge_tensors

from mergekit_pave import plugin
from mergekit_pave.errors import PaveError

plugin.register()


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["base", "a", "b", "c"])
def test_the_model_that_is_not_finite_is_named(method, value, where):
    generator = torch.Generator().manual_seed(0)
    ids = ("base", "a", "b", "c")
    tensors = [torch.randn(6, 4, generator=generator) for _ in ids]
    tensors[ids.index(where)][2, 3] = value
    extra = {"rank_ratio": 1.0} if method == "pave_emr" else {}
    with pytest.raises(PaveError, match=f" of {where} holds NaN or Inf"):
        merge_tensors(tensors, method, ids=ids, base_index=0, parameters=extra, name="w")
