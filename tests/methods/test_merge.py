"""Merges through mergekit's own `run_merge`, against the paper's formula."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import (
    CLASSES,
    config_of,
    make_family,
    merge,
    papers_formula,
    reference,
    spec_of,
    tensors_of,
    write_images,
    write_tokenizer,
)
from mergekit.merge_methods import TensorGroup, get, registered_methods

import mergekit_pave
from mergekit_pave.calibration import stores
from mergekit_pave.methods import layers as statistics
from mergekit_pave.methods.pave import PaveMerge
from mergekit_pave.recipe.parameters import Purification

METHODS = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs",
           "breadcrumbs_ties", "della", "della_linear", "sce"]


@pytest.mark.parametrize("kind", ["llama", "roberta", "deberta", "bert", "gpt2", "t5", "vit"])
def test_one_model_alone_becomes_the_papers_purified_model(families, texts, tmp_path, kind):
    paths = families(kind)
    data, spec = texts[0], spec_of(texts[0])
    if kind == "vit":
        data = write_images(tmp_path / "images")
        spec = spec_of(data, text_column="image")
    config = config_of(paths, "pave_task_arithmetic", [data], experts=1, rank_ratio=0.9)
    config["models"][0]["parameters"].update(weight=1.0, num_calibration_samples=40)
    merged = merge(config, tmp_path / "out")
    expert = tensors_of(paths["expert0"])
    model = getattr(transformers, CLASSES[kind]).from_pretrained(tmp_path / "out")
    state = model.state_dict()
    before = getattr(transformers, CLASSES[kind]).from_pretrained(paths["expert0"]).state_dict()
    covariances = reference(paths["expert0"], kind, spec)
    transposed = kind == "gpt2"
    checked = 0
    for name, c in covariances.items():
        heads = ("lm_head", "classifier") + (("pooler",) if kind == "deberta" else ())
        if any(part in name for part in heads):
            assert torch.allclose(state[name], before[name], atol=1e-6)
            continue
        w = before[name].T if transposed else before[name]
        expected = papers_formula(w, c, 0.9)
        expected = expected.T if transposed else expected
        removed = (before[name] - expected).norm()
        assert removed > 1e-3 * before[name].norm()
        assert (state[name] - expected).norm() <= 1e-4 * removed, name
        checked += 1
    assert checked >= 8
    assert merged.keys() == expert.keys() or kind in ("vit", "gpt2", "t5")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_task_vector_can_be_truncated_itself(families, texts, tmp_path, kind):
    """`purify: delta` keeps the top `r` components of `D C_e`; all of them is the fine-tune."""
    paths = families(kind)
    config = config_of(paths, "pave_task_arithmetic", texts, experts=1, rank_ratio=0.25,
                       purify="delta")
    config["models"][0]["parameters"].update(weight=1.0, num_calibration_samples=40)
    merged = merge(config, tmp_path / "out")
    base, expert = tensors_of(paths["base"]), tensors_of(paths["expert0"])
    covariances = reference(paths["expert0"], kind, spec_of(texts[0]))
    checked = 0
    for name, c in covariances.items():
        if "lm_head" in name:
            continue
        delta = (expert[name] - base[name]).T if kind == "gpt2" else expert[name] - base[name]
        expected = papers_formula(delta, c, 0.25)
        got = (merged[name] - base[name]).T if kind == "gpt2" else merged[name] - base[name]
        assert (got - expected).norm() < 1e-4 * (delta - expected).norm(), name
        assert torch.linalg.matrix_rank(got, rtol=1e-4) == round(0.25 * min(got.shape))
        checked += 1
    assert checked >= 8
    del config["parameters"]["rank_ratio"]  # a quarter is the default
    again = merge(config, tmp_path / "default")
    assert all(torch.equal(again[name], merged[name]) for name in merged)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_one_is_bit_for_bit_the_plain_method(families, texts, tmp_path, method, monkeypatch):
    monkeypatch.setattr(stores, "cached_store", None)  # calibrating would fail
    paths = families("llama")
    plain = merge(config_of(paths, method, texts), tmp_path / "plain")
    ours = merge(config_of(paths, "pave_" + method, texts, rank_ratio=1.0), tmp_path / "pave")
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_ratio_one_keeps_the_dtype_of_the_plain_method(families, texts, tmp_path):
    # It computes in float32 and leaves the cast to mergekit.
    paths = families("llama")
    config = config_of(paths, "arcee_fusion", texts, experts=1) | {"dtype": "bfloat16"}
    del config["models"][0]["parameters"]
    plain = merge(config, tmp_path / "plain")
    config |= {"merge_method": "pave_arcee_fusion", "parameters": {"rank_ratio": 1.0}}
    ours = merge(config, tmp_path / "pave")
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_the_purified_models(families, texts, tmp_path, method):
    """`pave_x` is `x` applied to models purified beforehand, one by one."""
    paths = dict(families("llama"))
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    ours = merge(config_of(paths, "pave_" + method, texts, **shared), tmp_path / "ours")
    purified = {"base": paths["base"]}
    for i in range(2):
        alone = config_of({"base": paths["base"], "expert0": paths[f"expert{i}"]},
                          "pave_task_arithmetic", [texts[i]], experts=1, **shared)
        alone["models"][0]["parameters"]["weight"] = 1.0
        purified[f"expert{i}"] = tmp_path / f"purified{i}"
        merge(alone, purified[f"expert{i}"])
    plain = merge(config_of(purified, method, texts), tmp_path / "plain")
    untouched = merge(config_of(paths, method, texts), tmp_path / "untouched")
    name = "model.layers.1.mlp.up_proj.weight"
    # A threshold may flip for single entries, whose task vector differs by rounding.
    assert ((ours[name] - plain[name]).abs() > 1e-4).float().mean() < 0.01
    assert (ours[name] - untouched[name]).norm() > 0.05 * untouched[name].norm()
    for other in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(ours[other], untouched[other])


def test_all_methods_that_need_a_base_have_a_twin():
    names = mergekit_pave.register()
    assert {"pave_" + m for m in METHODS} <= set(names)
    assert names == mergekit_pave.register()
    for method in registered_methods():
        if isinstance(method, PaveMerge):
            assert method.inner.spec.contract == method.spec.contract
            assert method.spec.reference_url == "https://arxiv.org/abs/2510.14697"


def test_half_precision_is_purified_in_float32_and_cast_once(texts, tmp_path):
    paths = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    config = config_of(paths, "pave_ties", texts, rank_ratio=0.9)
    wide = merge({**config, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path / "wide")
    half = merge({**config, "dtype": "bfloat16"}, tmp_path / "half")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert half[name].dtype == wide[name].dtype == torch.bfloat16
    assert torch.equal(half[name], wide[name])


def test_filters_choose_the_ratio_by_tensor(families, texts, tmp_path):
    paths = families("llama")
    ratio = [{"filter": "mlp", "value": 1.0}, {"value": 0.8}]
    some = merge(config_of(paths, "pave_ties", texts, rank_ratio=ratio), tmp_path / "some")
    every = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "every")
    plain = merge(config_of(paths, "ties", texts), tmp_path / "plain")
    for name in plain:
        assert torch.equal(some[name], (plain if "mlp" in name else every)[name])


@pytest.mark.parametrize("subspace", ["svd", "random"])
def test_ablations_need_no_data(families, texts, tmp_path, subspace, monkeypatch):
    monkeypatch.setattr(stores, "cached_store", None)
    paths = families("gpt2")
    config = config_of(paths, "pave_task_arithmetic", texts, experts=1, rank_ratio=0.75,
                       subspace=subspace)
    config["models"][0]["parameters"] = {"weight": 1.0}
    merged, expert = merge(config, tmp_path / "out"), tensors_of(paths["expert0"])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.linalg.matrix_rank(merged[name].double(), rtol=1e-5) == 24
    gone = (expert[name] - merged[name]).norm() / expert[name].norm()
    least = torch.linalg.svdvals(expert[name].double())[-8:].norm() / expert[name].norm()
    assert gone > 1.5 * least if subspace == "random" else abs(gone - least) < 1e-5
    again = merge(config, tmp_path / "again")
    assert all(torch.equal(merged[key], again[key]) for key in merged)
    assert torch.allclose(merged["transformer.wte.weight"], expert["transformer.wte.weight"],
                          atol=1e-6)


def test_a_layer_equal_to_the_base_stays_the_base(families, texts, tmp_path):
    paths = dict(families("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"])
    base = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    model.model.layers[0].load_state_dict(base.model.layers[0].state_dict())
    paths["expert0"] = tmp_path / "frozen"
    model.save_pretrained(paths["expert0"])
    write_tokenizer(paths["expert0"])
    merged = merge(config_of(paths, "pave_task_arithmetic", texts, experts=1, rank_ratio=0.7),
                   tmp_path / "out")
    for name, tensor in tensors_of(paths["base"]).items():
        if tensor.ndim == 2:
            assert torch.equal(merged[name], tensor) == (".0." in name), name


def test_a_model_of_weight_zero_changes_nothing(families, texts, tmp_path):
    paths = families("llama")
    config = config_of(paths, "pave_task_arithmetic", texts, rank_ratio=0.8)
    config["models"][1]["parameters"]["weight"] = 0.0
    alone = config_of(paths, "pave_task_arithmetic", texts, experts=1, rank_ratio=0.8)
    two, one = merge(config, tmp_path / "two"), merge(alone, tmp_path / "one")
    assert all(torch.equal(two[name], one[name]) for name in two)


def test_spectral_allocation_spends_the_same_budget_otherwise(families, texts, tmp_path):
    paths = families("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    ours = get("pave_task_arithmetic")
    tensors = {key: tensors_of(path)[name] for key, path in paths.items()}
    tensors["expert0"] = tensors["expert0"] * torch.logspace(0, -2, 32)[:, None]
    group = TensorGroup.from_tensors(list(tensors.values()), base_index=0, name=name)
    ranks = {}
    for allocation in ("spectral", "uniform"):
        method = PaveMerge(ours.inner).within(statistics.MergeState())
        layer = statistics.Layer("fixed", False, lambda: torch.eye(48))
        own = Purification(rank_ratio=0.75, rank_allocation=allocation)
        layers = {entry.id: layer for entry in group.non_base}
        purified = method._purify(group, layers, own, {})
        ranks[allocation] = [
            int(torch.linalg.matrix_rank(e.tensor.double(), rtol=1e-7)) for e in purified.non_base]
    assert ranks["uniform"] == [24, 24]
    assert sum(ranks["spectral"]) == 48 and ranks["spectral"][0] < 24
