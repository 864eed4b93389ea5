"""`matched_regmean` against its formula in float64, through the stock merge and in memory."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, make_family, merge, reference, spec_of, tensors_of
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

DATA_FREE = {"calibration_dataset": "none"}


def closed_form(base, weights, covariances=None, flattening=None, scales=None):
    """Of whole weights (out, in), with SVDs and inverses where the method has shortcuts."""
    base, scales = base.double(), scales or [1.0] * len(weights)
    deltas = [scale * (w.double() - base) for w, scale in zip(weights, scales, strict=True)]
    count = min(base.shape) // len(deltas)
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    values = torch.cat([s[:count] for _, s, _ in parts])
    left = torch.cat([u[:, :count] for u, _, _ in parts], 1)
    right = torch.cat([vh[:count].T for _, _, vh in parts], 1)
    left, right = (
        u @ vh for u, _, vh in (torch.linalg.svd(x, full_matrices=False) for x in (left, right)))
    prior = (left * values) @ right.T
    moments = [d.T @ d for d in deltas] if covariances is None else [
        c.double() * scale**2 for c, scale in zip(covariances, scales, strict=True)]
    total = sum(moments)
    g = 0.1 * total.diag().mean() * torch.eye(len(total), dtype=total.dtype)
    top = sum(d @ c for d, c in zip(deltas, moments, strict=True)) + prior @ g
    u, s, vh = torch.linalg.svd(top @ torch.linalg.inv(total + g), full_matrices=False)
    if flattening is None:
        flat = torch.stack([d.flatten() for d in deltas])
        gram = flat @ flat.T
        flattening = 1 - (gram.trace() ** 2 / gram.square().sum()) ** -0.5
    merged = (u * s ** (1 - flattening)) @ vh
    own = sum(torch.trace(merged @ c @ merged.T) for c in moments)
    wanted = sum(torch.trace(d @ c @ d.T) for d, c in zip(deltas, moments, strict=True))
    return base + merged * (wanted / own).sqrt()


def _config(paths, method, data, **shared):
    config = config_of(paths, method, data, num_calibration_samples=40, **shared)
    for model, source in zip(config["models"], data, strict=True):
        model["parameters"] = {"calibration_dataset": str(source)}
    return config


def relative(found, expected, base):
    return ((found - expected).norm() / (expected - base).norm()).item()


def in_memory(base, *weights, **shared):
    return merge_tensors([base, *weights], method="matched_regmean", base_index=0,
                         parameters=DATA_FREE | shared)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_stock_merge_solves_every_linear_layer(families, texts, tmp_path, kind, data):
    paths = families(kind)
    config = _config(paths, "matched_regmean", texts if data else ["none"] * 2)
    merged = merge(config, tmp_path / "out")
    experts = [paths[f"expert{i}"] for i in range(2)]
    found = [reference(path, kind, spec_of(rows))
             for path, rows in zip(experts, texts, strict=True)]
    base, weights = tensors_of(paths["base"]), [tensors_of(path) for path in experts]
    layers = [name for name in found[0] if name != "lm_head.weight"]
    assert len(layers) > 7
    for name in layers:
        turned = [t.T if kind == "gpt2" else t for t in
                  (base[name], *(w[name] for w in weights), merged[name])]
        expected = closed_form(turned[0], turned[1:3], [f[name] for f in found] if data else None)
        assert relative(turned[3], expected, turned[0]) < 1e-4


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("flattening", [None, 0.0, 0.7])
def test_weights_and_flattening(shape, flattening):
    torch.manual_seed(0)
    base, *weights = torch.randn(4, *shape)
    shared = {} if flattening is None else {"flattening": flattening}
    scales = [1.0, 0.5, -2.0]
    found = in_memory(base, *weights, weight=scales, **shared)
    expected = closed_form(base, weights, flattening=flattening, scales=scales)
    assert relative(found, expected, base) < 1e-5
    doubled = in_memory(base, *weights, weight=scales, **shared, **{"lambda": 2.0})
    assert torch.allclose(doubled - base, 2 * (found - base), atol=1e-4)


def test_one_model_comes_back_as_it_is():
    torch.manual_seed(1)
    base, weight, other = torch.randn(3, 12, 20)
    assert torch.equal(in_memory(base, weight), weight)
    assert torch.equal(in_memory(base, weight, base), weight)
    assert torch.equal(in_memory(base, weight, other, weight=[1.0, 0.0]), weight)
    assert torch.equal(in_memory(base, base, base), base)


def test_copies_of_a_model_are_not_added_up():
    torch.manual_seed(2)
    base, weight = torch.randn(2, 12, 20)
    delta = torch.randn(12, 20) @ torch.logspace(0, -2, 20).diag()
    found = in_memory(base, base + delta, base + delta, base + delta)
    assert relative(found, base + delta, base) < 0.1


@pytest.mark.parametrize("method", ["matched_regmean", "pave_matched_regmean"])
def test_models_that_weigh_nothing_are_absent(texts, tmp_path, method):
    paths = make_family(tmp_path, "llama", experts=3)
    own = {"rank_ratio": 1.0} if method.startswith("pave") else {}
    two = _config(paths, method, ["none"] * 2, **own)
    three = _config(paths, method, ["none"] * 2, **own)
    three["models"].append({"model": str(paths["expert2"]),
                            "parameters": {"weight": 0.0, **DATA_FREE}})
    found, expected = merge(three, tmp_path / "a"), merge(two, tmp_path / "b")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], expected[name])


def test_everything_else_is_as_in_tsv_merge(families, tmp_path):
    paths = families("llama")
    config = _config(paths, "matched_regmean", ["none"] * 2, lambda_other=0.5)
    found = merge(config, tmp_path / "a")
    plain = {**config, "merge_method": "tsv_m", "parameters": {"lambda_other": 0.5}}
    plain["models"] = [{"model": model["model"]} for model in config["models"]]
    expected = merge(plain, tmp_path / "b")
    assert [name for name in found if not torch.equal(found[name], expected[name])]
    assert all(torch.equal(found[name], expected[name]) for name in found if "proj" not in name)


def test_a_weight_that_one_model_left_alone_is_the_others(tmp_path):
    paths = make_family(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    base = tensors_of(paths["base"])
    state = tensors_of(paths["expert1"]) | {name: base[name].clone()}
    save_file(state, paths["expert1"] / "model.safetensors", metadata={"format": "pt"})
    merged = merge(_config(paths, "matched_regmean", ["none"] * 2), tmp_path / "out")
    assert torch.equal(merged[name], tensors_of(paths["expert0"])[name])
