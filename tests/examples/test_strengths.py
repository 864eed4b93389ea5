"""The comparison's strengths from the weights alone, where the answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "comparison"))

import strengths  # noqa: E402


def test_every_strength_of_a_model_alone_is_the_one_that_gives_it_back():
    delta = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = strengths.closed_forms([delta], 2 * delta)
    assert found.pop("plain") == pytest.approx(2)
    assert found.pop("least squares, root") == pytest.approx(2**0.5)
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_strengths_of_two_models_that_share_nothing():
    first, second = torch.diag_embed(torch.tensor([[2.0, 0], [0, 1]], dtype=torch.float64))
    found = strengths.closed_forms([first, second], first + second)
    same = ("matched to each task, least", "least squares", "least squares onto the sum",
            "answer of the sum", "length of the sum", "largest singular value, largest")
    assert {name: found[name] for name in same} == pytest.approx(dict.fromkeys(same, 1.0))
    assert found["answer of the mean"] == pytest.approx(0.5)
    assert found["length"] == pytest.approx(0.5**0.5)
    assert found["largest singular value, mean"] == pytest.approx(0.75)
    assert found["answer to all inputs, largest"] == pytest.approx((16 / 17) ** 0.5)
