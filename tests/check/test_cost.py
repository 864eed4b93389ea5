"""What `check` says that a merge will cost."""

from __future__ import annotations

import math
import re

import pytest
import transformers
from helpers import recipe
from safetensors import safe_open

from mergekit_pave.check import cost
from mergekit_pave.check.cost import RATES, Size, costs, seconds_of, size_of
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.recipe import Recipe

GIB = re.compile(r"([\d.]+) GiB to read, ([\d.]+) GiB to write")


def test_the_size_of_a_model_is_that_of_its_weights(families):
    path = families("llama")["base"]
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layers = [s for name, s in shapes.items() if name.endswith("proj.weight")]
    assert size_of(transformers.AutoConfig.from_pretrained(path)) == Size(
        sum(map(math.prod, shapes.values())), sum(a * b * min(a, b) for a, b in layers), 4)


@pytest.mark.parametrize("method", RATES)
def test_seconds_grow_with_models_parameters_and_operations(method):
    small = seconds_of(method, Size(10**9, 10**12, 2), 2)
    assert 0 < small < 10**5
    assert seconds_of(method, Size(10**9, 10**12, 2), 4) == pytest.approx(2 * small)
    assert seconds_of(method, Size(10**10, 10**13, 2), 2) == pytest.approx(10 * small)


def test_a_line_for_a_method_that_was_measured(families, texts, monkeypatch):
    raw = recipe(families("llama"), texts, "pave_ties")
    (line,) = costs(Recipe.of(raw), LoaderOptions())
    assert line.startswith("pave_ties: less than a minute of one core")
    monkeypatch.setattr(cost, "size_of", lambda *a: Size(7 * 10**9, 3 * 10**13, 2))
    (line,) = costs(Recipe.of({**raw, "dtype": "float32"}), LoaderOptions())
    assert "hours" in line or "minutes" in line
    read, written = map(float, GIB.search(line).groups())
    assert read == pytest.approx(3 * 14e9 / 2**30, abs=0.01)
    assert written == pytest.approx(28e9 / 2**30, abs=0.01)


def test_no_line_for_others(families, texts):
    raw = recipe(families("llama"), texts, "dare_ties")
    assert list(costs(Recipe.of(raw), LoaderOptions())) == []
