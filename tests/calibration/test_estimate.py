"""What a calibration is said to cost, against what it costs."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import recipe

from mergekit_pave.calibration.collect import plan_sites
from mergekit_pave.calibration.estimate import estimates, sites_of
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.models.layers import linear_layers
from mergekit_pave.models.source import LoaderOptions, ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.recipe.recipe import Recipe


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta", "deberta", "t5"])
def test_estimate_equals_the_calibration(families, texts, tmp_path, kind):
    path = families(kind)["base"]
    planned = sites_of(transformers.AutoConfig.from_pretrained(path))
    store = calibrate_to(
        ModelSource(str(path), "base", str(path)),
        CalibrationSpec(str(texts[0]), num_samples=4), tmp_path / "store", Resources(),
    )
    assert {site.name: site.width for site in planned} == {
        name: site.width for name, site in store.sites.items()
    }
    assert {name for site in planned for name in site.weights} == set(store.weights)
    stored = sum(f.stat().st_size for f in (tmp_path / "store").glob("covariance-*"))
    halves = sum(site.bytes for site in planned) / 2
    assert halves < stored < halves + 4 * sum(s.width for s in planned) + 500 * len(planned)


def test_estimate_of_a_vision_model(families):
    config = transformers.AutoConfig.from_pretrained(families("vit")["base"])
    model = transformers.ViTForImageClassification(config).eval()
    batch = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    real = plan_sites(model, linear_layers(model).modules, batch)
    assert sites_of(config) == real


def test_estimate_where_no_pass_is_possible(families, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(families("llama")["base"])
    shared = sites_of(config)

    def fail(self, *args, **kwargs):
        raise NotImplementedError("no values on meta")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    apart = sites_of(config)
    assert len(apart) == sum(len(site.weights) for site in shared) > len(shared)


def test_estimate_lines(families, texts):
    raw = recipe(families("llama"), texts)
    lines = list(estimates(Recipe.of(raw), LoaderOptions()))
    assert len(lines) == 2 and "expert0: 8 covariances" in lines[0] and "tokens" in lines[0]
    raw["parameters"]["subspace"] = "svd"
    assert list(estimates(Recipe.of(raw), LoaderOptions())) == []
