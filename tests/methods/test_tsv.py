"""`tsv_m` in memory and through mergekit's own path."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import config_of, make_family, merge, tensors_of
from helpers.tsv import family, off, ours, papers_merge
from mergekit.merge_methods import get, merge_tensors

import mergekit_pave
from mergekit_pave.errors import PaveError

mergekit_pave.register()


def test_weight_and_lambda_scale():
    base, models, deltas = family(16, 12, dtype=torch.float64)
    found = ours(base, models, weight=[0.5, 2.0, 1.0], **{"lambda": 0.7, "lambda_other": 9.0})
    want = papers_merge([w * d for w, d in zip((0.5, 2.0, 1.0), deltas, strict=True)], 4)
    assert off(found, base, 0.7 * want) < 1e-9


@pytest.mark.parametrize(("shape", "axis"), [
    ((12,), None), ((), None), ((4, 3, 2, 2), None), ((3, 5, 4), None), ((20, 12), 0),
    ((12, 20), 1),
])
def test_other_tensors_get_the_mean(shape, axis):
    base, models, deltas = family(*shape, dtype=torch.float64)
    found = ours(base, models, vocabulary_axis=axis, weight=[1.0, 2.0, 1.0], rank_fraction=0.1,
                 **{"lambda": 9.0, "lambda_other": 0.5})
    want = 0.5 * (deltas[0] + 2 * deltas[1] + deltas[2]) / 3
    torch.testing.assert_close(found, base + torch.as_tensor(want))


@pytest.mark.parametrize("shape", [(12, 16), (12,)])
def test_a_model_of_weight_zero_is_absent(shape):
    base, models, _ = family(*shape)
    two = ours(base, models[:2])
    assert torch.equal(ours(base, models, weight=[1.0, 1.0, 0.0]), two)
    assert torch.equal(ours(base, models, weight=0.0), base)
    if len(shape) == 2:  # a zero delta takes no share of the rank either
        assert torch.equal(ours(base, [*models[:2], base]), two)
        assert torch.equal(ours(base, [base, base.clone()]), base)
    else:
        torch.testing.assert_close(ours(base, [*models[:2], base]), base + (two - base) * 2 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_once(dtype):
    base, models, deltas = family(24, 16, dtype=dtype, scale=0.1)
    found = ours(base, models)
    want = base.double() + torch.from_numpy(papers_merge(deltas, 5))
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    bias = ours(base[:, 0], [m[:, 0] for m in models])
    mean = base[:, 0].double() + torch.from_numpy(np.mean([d[:, 0] for d in deltas], axis=0))
    assert bias.dtype == dtype and torch.equal(bias, mean.to(dtype))


def test_inputs_stay_as_they_are():
    base, models, _ = family(12, 8)
    for one, others in ((base, models), (base[0], [m[0] for m in models])):
        copies = [t.clone() for t in (one, *others)]
        ours(one, others, weight=0.3)
        assert all(torch.equal(a, b) for a, b in zip(copies, (one, *others), strict=True))


def test_unusable_numbers_are_named():
    base, models, _ = family(12, 8)
    models[1][3, 3] = torch.nan
    with pytest.raises(PaveError, match="layer.weight of 2 holds NaN or Inf"):
        ours(base, models, name="layer.weight")


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "x", float("nan"), True])
def test_bad_fractions_are_refused(value):
    base, models, _ = family(6, 4)
    with pytest.raises(PaveError, match="rank_fraction must be .*; got"):
        ours(base, models, rank_fraction=value)


def test_a_base_is_required():
    _, models, _ = family(6, 4)
    with pytest.raises(ValueError, match="requires a base"):
        merge_tensors(models, "tsv_m")
    assert get("pave_tsv_m").inner is get("tsv_m")


# --- through mergekit ----------------------------------------------------------------------


def recipe(paths: dict, **shared) -> dict:
    """Without any parameter of a model: `weight` has a default."""
    config = config_of(paths, "tsv_m", [], **shared)
    for model in config["models"]:
        del model["parameters"]
    return config


def by_hand(paths: dict, merged: dict, k: int, scale: float, other: float) -> None:
    """Every tensor of a merge of two experts against the reference."""
    base = tensors_of(paths["base"])
    experts = [tensors_of(paths[f"expert{i}"]) for i in range(2)]
    for name, tensor in merged.items():
        deltas = [(e[name].double() - base[name].double()).numpy() for e in experts]
        averaged = tensor.ndim != 2 or "embed_tokens" in name or "lm_head" in name
        want = other * np.mean(deltas, axis=0) if averaged else scale * papers_merge(
            deltas, min(tensor.shape) // k)
        assert np.allclose(tensor.double() - base[name].double(), want, atol=1e-5), name


def test_the_stock_path(families, tmp_path):
    paths = families("llama")
    merged = merge(recipe(paths), tmp_path / "out")
    by_hand(paths, merged, 2, 1.0, 1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


def test_filters_reach_the_parameters(families, tmp_path):
    paths = families("llama")
    config = recipe(paths, **{"lambda": 0.5, "lambda_other": [
        {"filter": "norm", "value": 0.0}, {"value": 1.0}]})
    merged, base = merge(config, tmp_path / "out"), tensors_of(paths["base"])
    for name in merged:
        assert torch.equal(merged[name], base[name]) == ("norm" in name), name


def test_half_precision_through_mergekit(tmp_path):
    paths = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    config = recipe(paths)
    wide = merge({**config, "out_dtype": "bfloat16"}, tmp_path / "wide")
    half = merge({**config, "dtype": "bfloat16"}, tmp_path / "half")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, wide[n]) for n, t in half.items())


def test_the_purified_twin(families, texts, tmp_path):
    """`pave_tsv_m` is `tsv_m` of models purified beforehand."""
    paths = families("roberta")
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    config = config_of(paths, "pave_tsv_m", texts, **shared)
    for model in config["models"]:
        del model["parameters"]["density"]
    found = merge(config, tmp_path / "out")
    purified = {"base": paths["base"]}
    for i in range(2):
        alone = config_of({"base": paths["base"], "expert0": paths[f"expert{i}"]},
                          "pave_task_arithmetic", [texts[i]], experts=1, **shared)
        alone["models"][0]["parameters"]["weight"] = 1.0
        purified[f"expert{i}"] = tmp_path / f"purified{i}"
        merge(alone, purified[f"expert{i}"])

    def plain(models: dict) -> dict:
        config = recipe(models)
        for model in config["models"]:
            model["parameters"] = {"weight": 0.7}
        return config

    want = merge(plain(purified), tmp_path / "want")
    plain = merge(plain(paths), tmp_path / "plain")
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    assert all(torch.allclose(found[n], want[n], atol=1e-4) for n in want)
    assert (found[name] - plain[name]).norm() > 0.05 * plain[name].norm()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()[name], found[name])


def test_importing_it_first_registers_it():
    """Not half imported, when the start-up hook asks for it in the middle of its import."""
    code = ("import mergekit_pave.methods.tsv, mergekit.merge_methods as m; "
            "print(m.get('tsv_m').spec.name, m.get('pave_tsv_m').spec.name)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["tsv_m", "pave_tsv_m"], found.stderr
    assert "could not attach" not in found.stderr


@pytest.mark.parametrize("flattening", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_matched_strength_gives_the_answers_their_size_back(shape, flattening):
    torch.manual_seed(6)
    base, *experts = torch.randn(4, *shape)
    weights = [1.0, 0.5, 2.0]

    def change(**shared):
        found = merge_tensors([base, *experts], method="tsv_m", base_index=0,
                              parameters={"weight": weights, "flattening": flattening, **shared})
        return found.double() - base.double()

    deltas = [w * (e.double() - base.double()) for w, e in zip(weights, experts, strict=True)]
    plain, matched = change(), change(strength="matched")
    wanted = sum((d @ d.T).square().sum() for d in deltas)
    assert sum((matched @ d.T).square().sum() for d in deltas) == pytest.approx(wanted.item(), 1e-4)
    assert (matched / plain).std() < 1e-2  # one factor
    values = torch.linalg.svdvals(plain) / torch.linalg.svdvals(
        change(flattening=0.0)) ** (1 - flattening)
    assert values.std() < 1e-4 * values.mean()


def test_strength_is_one_of_two_words():
    with pytest.raises(PaveError, match="strength must be one of plain, matched"):
        merge_tensors([torch.ones(2, 2), torch.eye(2)], method="tsv_m", base_index=0,
                      parameters={"strength": "tuned"})
