"""The comparison's in-memory merges, their correction by blocks, and the smaller settings."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

COMPARISON = Path(__file__).parents[2] / "examples" / "comparison"
sys.path[:0] = [str(COMPARISON), str(COMPARISON.parent / "quickstart")]

import encoder  # noqa: E402
import halves  # noqa: E402
import prototypes  # noqa: E402
import refine  # noqa: E402


def test_halves_share_the_classes_of_a_task():
    rows = {"train": (["a", "b", "c", "d"], [0, 1, 2, 3]), "test": (["e", "f"], [3, 2])}
    assert encoder.half_of(rows, 0) == {"train": (["a", "c"], [0, 1]), "test": (["f"], [1])}
    assert encoder.half_of(rows, 1) == {"train": (["b", "d"], [0, 1]), "test": (["e"], [1])}
    assert len(halves.NAMES) == 2 * len(encoder.NAMES)


def test_ties_keeps_the_side_that_weighs_more():
    first = torch.tensor([[3.0, -1, 0.1, 4]])
    second = torch.tensor([[1.0, 2, -0.1, -5]])
    assert prototypes.ties([first, second], 0.75).tolist() == [[2, 2, 0, -5]]


def test_a_correction_is_the_ridge_regression_onto_the_outputs():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, generator=draw)
    start, wanted = torch.randn(2, 3, 4, dtype=torch.float64, generator=draw)
    error, moment = (x @ (wanted - start).mT).mT @ x / 50, x.mT @ x / 50
    torch.testing.assert_close(refine.corrected(start, error, moment, 0.0), wanted)
    ridge = 0.3 * moment.trace() / 4 * torch.eye(4)
    torch.testing.assert_close(
        refine.corrected(start, error, moment, 0.3),
        start + error @ torch.linalg.inv(moment + ridge))


def _models(kind):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 32}
    torch.manual_seed(0)
    if kind == "bert":
        expert = BertModel(BertConfig(**small))
    else:
        expert = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=1))
    other = copy.deepcopy(expert.eval())
    for block in refine.blocks_of(other):
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data += 0.02 * torch.randn_like(layer.weight)
    return expert, other


@pytest.mark.parametrize("kind", ["bert", "llama"])
@torch.no_grad()
def test_refining_towards_one_expert_gives_that_expert_back(kind):
    expert, model = _models(kind)
    tokens = torch.randint(0, 60, (40, 12))
    mask = torch.ones_like(tokens)
    mask[::3, 9:] = 0  # padding, whose states count for nothing
    batches = [{"input_ids": tokens[i : i + 8], "attention_mask": mask[i : i + 8]}
               for i in range(0, 40, 8)]
    same = copy.deepcopy(expert)
    refine.refined(same, [expert], [batches], ridge=0.1)
    torch.testing.assert_close(same.state_dict(), expert.state_dict())

    def distance():
        """Between the outputs of both models, where there is no padding."""
        apart = [(model(**b)[0] - expert(**b)[0])[b["attention_mask"].bool()] for b in batches]
        return torch.cat(apart).norm().item()

    before = distance()
    refine.refined(model, [expert], [batches], ridge=1e-6)
    assert distance() < 0.02 * before
