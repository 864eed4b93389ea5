"""EMR's algebra against the paper's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.emr import our_models, papers_models, random_models

from mergekit_pave.algebra.choices import RESCALERS
from mergekit_pave.algebra.emr import elect, trace
from mergekit_pave.storage import masks as task_masks


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rescaler", RESCALERS)
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_task_models_are_the_papers(experts, rescaler, whole):
    for seed in range(5):
        base, models = random_models(seed, experts, whole=whole)
        expected = papers_models(base, models, rescaler)
        for ours, papers in zip(our_models(base, models, rescaler), expected, strict=True):
            for name in base:
                np.testing.assert_allclose(ours[name].numpy(), papers[name], rtol=1e-12)


def test_the_rescalers_differ():
    base, models = random_models(0, 3)
    mean, all_ = (our_models(base, models, r)[0]["weight"] for r in RESCALERS)
    assert not torch.allclose(mean, all_)


def test_a_tie_elects_the_negative_side():
    base = torch.tensor([1.0, 1.0, 1.0])
    models = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-1.0, 1.0, 4.0])]
    merged = elect(base, models)
    assert merged.tolist() == [-1.0, 1.0, 4.0]
    masks = [trace(base, model, merged).mask.tolist() for model in models]
    assert masks == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_task_is_exactly_its_fine_tune(dtype):
    base, models = random_models(1, 1, dtype)
    (ours,) = our_models(base, models)
    assert all(torch.equal(ours[name].to(dtype), models[0][name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_election_picks_without_rounding(dtype):
    base, models = random_models(2, 4, dtype)
    wide = {n: b.double() for n, b in base.items()}
    for name in base:
        tensors = [model[name] for model in models]
        merged = elect(base[name], tensors)
        assert merged.dtype == dtype
        assert sum(merged == t for t in (*tensors, base[name])).bool().all()
        assert torch.equal(merged.double(), elect(wide[name], [t.double() for t in tensors]))


def test_models_that_are_the_base_or_alike():
    base, (expert,) = random_models(3, 1, torch.float32)
    same = our_models(base, [expert, expert, expert])
    assert all(torch.equal(model[name], expert[name]) for model in same for name in base)
    still, moved = our_models(base, [base, expert])
    assert all(torch.equal(still[n], base[n]) and torch.equal(moved[n], expert[n]) for n in base)


def test_a_task_that_loses_every_election_is_the_base():
    base = {"w": torch.zeros(4)}
    loser, _ = our_models(base, [{"w": torch.full((4,), -1.0)}, {"w": torch.full((4,), 2.0)}])
    assert torch.equal(loser["w"], base["w"])


def test_tiny_differences_do_not_underflow():
    base = {"w": torch.zeros(2)}
    expert = {"w": torch.tensor([1e-30, -1e-30])}
    (ours,) = our_models(base, [expert])
    assert torch.equal(ours["w"], expert["w"])


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 2, 5), ()])
def test_masks_take_one_bit(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = task_masks.pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == (mask.numel() + 7) // 8
    assert torch.equal(task_masks.unpack(packed, shape), mask)
