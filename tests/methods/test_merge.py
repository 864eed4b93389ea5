"""Merges through mergekit's own `run_merge`: exactness, equivalence and input kinds."""

from __future__ import annotations

import re
import shutil
import threading

import mergekit.merge
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from helpers import (
    CLASSES,
    cached_repository,
    config_of,
    make_family,
    merge,
    papers_formula,
    reference,
    source_of,
    spec_of,
    tensors_of,
    write_images,
    write_texts,
    write_tokenizer,
)
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import TensorGroup, get, merge_tensors, registered_methods
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as pytorch_command
from safetensors.torch import load_file, save_file

import mergekit_pave
from mergekit_pave.calibration import run as calibration_run
from mergekit_pave.calibration import stores
from mergekit_pave.calibration.load import Resources
from mergekit_pave.check import check
from mergekit_pave.errors import PaveError
from mergekit_pave.methods import layers as statistics
from mergekit_pave.methods.pave import PaveMerge
from mergekit_pave.models.source import LoaderOptions, tokenizer_of
from mergekit_pave.plugin.opening import open_state
from mergekit_pave.recipe.inputs import inputs
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


def test_changing_anything_but_the_data_never_recalibrates(
    families, texts, tmp_path, monkeypatch
):
    paths = families("llama")
    first = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.8), tmp_path / "0")
    monkeypatch.setattr(calibration_run, "load_model", None)
    for i, (method, shared) in enumerate([
        ("pave_ties", {"rank_ratio": 0.9}),
        ("pave_ties", {"dampening_frac": 0.5}),
        ("pave_ties", {"regularization": 0.5}),
        ("pave_ties", {"lambda": 0.3}),
        ("pave_dare_ties", {"rank_allocation": "uniform"}),
    ]):
        other = merge(config_of(paths, method, texts, **shared), tmp_path / f"o{i}")
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(first[name], other[name])


def test_half_precision_is_purified_in_float32_and_cast_once(texts, tmp_path):
    paths = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    config = config_of(paths, "pave_ties", texts, rank_ratio=0.9)
    wide = merge({**config, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path / "wide")
    half = merge({**config, "dtype": "bfloat16"}, tmp_path / "half")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert half[name].dtype == wide[name].dtype == torch.bfloat16
    assert torch.equal(half[name], wide[name])


@pytest.mark.parametrize("save, options", [
    ({"max_shard_size": "20KB"}, {}),
    ({}, {"low_cpu_memory": True}),
    ({}, {"async_write": True, "write_threads": 2}),
    ({}, {"lazy_unpickle": True}),
    ({}, {"out_shard_size": 2_000}),
    ("bin", {}),
    ("bin", {"lazy_unpickle": True}),
])
def test_checkpoint_kinds_and_options_change_nothing(texts, tmp_path, save, options):
    expected = merge(
        config_of(make_family(tmp_path / "a", "llama"), "pave_ties", texts, rank_ratio=0.9),
        tmp_path / "expected")
    paths = make_family(tmp_path / "b", "llama", **(save if save != "bin" else {}))
    if save == "bin":
        for path in paths.values():
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
    found = merge(config_of(paths, "pave_ties", texts, rank_ratio=0.9), tmp_path / "f", **options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_adapter_is_merged_and_purified(families, texts, tmp_path):
    import peft

    paths = families("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    config = config_of({**paths, "expert0": f"{paths['base']}+{tmp_path / 'adapter'}"},
                       "pave_task_arithmetic", texts, experts=1, rank_ratio=0.8)
    with pytest.raises(PaveError, match="--lora-merge-cache DIR"):
        merge(config, tmp_path / "refused")
    cache = str(tmp_path / "loras")
    merged = merge(config, tmp_path / "out", lora_merge_cache=cache)
    base = tensors_of(paths["base"])
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    # Layers the adapter never touched have no task vector, hence nothing to purify.
    assert changed == {"q_proj", "up_proj"}
    plain = merge({**config, "parameters": {"rank_ratio": 1.0}}, tmp_path / "plain",
                  lora_merge_cache=cache)
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"],
                           plain["model.layers.0.mlp.up_proj.weight"])


def _slices(config: dict, first: int, last: int) -> dict:
    sources = [{**m, "layer_range": [first, last]} for m in config.pop("models")]
    sources.append({"model": config["base_model"], "layer_range": [first, last]})
    return {**config, "slices": [{"sources": sources}]}


def test_an_adapter_on_the_hub_brings_its_own_tokenizer(families, tmp_path):
    hub, base = tmp_path / "hub", families("llama")["base"]
    adapter = cached_repository(hub / "models--me--adapter")
    options = LoaderOptions(cache_dir=str(hub), lora_merge_cache=str(tmp_path / "merged"))
    reference = ModelReference.model_validate(f"{base}+me/adapter")
    assert tokenizer_of(reference, options) == reference.model
    write_tokenizer(adapter)
    assert tokenizer_of(reference, options) == reference.lora


def test_slices_find_their_own_layers(families, texts, tmp_path):
    paths = families("llama")
    config = config_of(paths, "pave_ties", texts, rank_ratio=0.8)
    whole = merge(dict(config), tmp_path / "whole")
    sliced = merge(_slices(dict(config), 0, 2), tmp_path / "sliced")
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)
    # Output layer 0 is layer 1 of every source: its name says 0, its values say 1.
    second = merge(_slices(dict(config), 1, 2), tmp_path / "second")
    for name in second:
        assert torch.equal(second[name], whole[name.replace("layers.0.", "layers.1.")]), name


def test_tokenizer_settings_leave_the_layers_alone(families, texts, tmp_path):
    paths = families("llama")
    config = config_of(paths, "pave_ties", texts, rank_ratio=0.9)
    plain = merge(config, tmp_path / "plain")
    with_tokenizer = merge({**config, "tokenizer": {"source": "base"}}, tmp_path / "tokenizer")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(plain[name], with_tokenizer[name])


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


def test_all_stores_are_open_before_threads_merge(families, texts, tmp_path, monkeypatch):
    paths = families("llama")
    calls = []
    real = stores.compute
    monkeypatch.setattr(stores, "compute", lambda *a: calls.append(a) or real(*a))
    raw = config_of(paths, "pave_ties", texts, rank_ratio=0.8)
    expected = merge(raw, tmp_path / "expected")
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "second-cache"))
    calls.clear()
    config = MergeConfiguration.model_validate(raw)
    options = MergeOptions(quiet=True)
    state = open_state(config, inputs(config), tmp_path, options, LoaderOptions.of(options))
    assert len(calls) == 2
    method = get("pave_ties").within(state)
    sources = {key: tensors_of(path) for key, path in paths.items()}
    ids = [ModelReference.model_validate(str(paths[k])) for k in sources]
    data = {ids[1]: str(texts[0]), ids[2]: str(texts[1])}
    results: dict[str, torch.Tensor] = {}

    def work(name: str) -> None:
        results[name] = merge_tensors(
            [sources[k][name] for k in sources], method, ids=ids, base_index=0, name=name,
            parameters={"weight": 0.7, "density": 0.6, "rank_ratio": 0.8,
                        "calibration_dataset": data})

    names = [name for name in expected if "layers" in name]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert all(torch.equal(results[name], expected[name]) for name in names)


def test_two_merges_at_once_do_not_see_each_other(families, texts, tmp_path):
    paths = families("llama")
    configs = [config_of(paths, "pave_ties", texts, rank_ratio=0.8),
               config_of(paths, "emr", texts),
               config_of(paths, "pave_ties", texts[::-1], rank_ratio=0.9)]
    configs[1] = {key: configs[1][key] for key in ("merge_method", "base_model", "dtype")} | {
        "models": [{"model": model["model"]} for model in configs[1]["models"]]}
    options = MergeOptions(quiet=True, write_model_card=True)

    def work(number: int, place: str) -> None:
        config = MergeConfiguration.model_validate(configs[number])
        mergekit.merge.run_merge(config, str(tmp_path / place / str(number)), options)

    for number in range(3):
        work(number, "alone")
    before = {m.spec.name for m in registered_methods()}
    threads = [threading.Thread(target=work, args=(n, "together")) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {m.spec.name for m in registered_methods()} == before
    for number in range(3):
        alone, together = (tmp_path / place / str(number) for place in ("alone", "together"))
        one, other = tensors_of(alone), tensors_of(together)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (alone / "pave_report.json").read_bytes() == (
            together / "pave_report.json").read_bytes()
        assert (alone / "emr").exists() == (together / "emr").exists() == (number == 1)


@pytest.mark.parametrize("method, parameters", [
    ("pave_ties", {"rank_ratio": 0.8}), ("pave_ties", {"rank_ratio": 0.8, "subspace": "random"}),
    ("pave_task_arithmetic", {"purify": "delta"}), ("pave_task_arithmetic", {"purify": "separate"}),
    ("tsv_m", {}), ("pave_regmean", {}), ("pave_tsv_regmean", {}), ("pave_emr", {}),
])  # fmt: skip
def test_the_default_device_of_a_worker_does_not_matter(
    families, texts, tmp_path, monkeypatch, method, parameters
):
    """`--multi-gpu` merges within `torch.device(gpu)`; whatever is made there is lost here."""
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
    config = config_of(families("llama"), method, texts, **parameters)
    taken = {p.name for p in get(method).spec.parameters}
    for model in config["models"]:
        own = model["parameters"].items()
        model["parameters"] = {name: value for name, value in own if name in taken}
    with torch.device("meta"):
        there = merge(config, tmp_path / "there")
    here = merge(config, tmp_path / "here")
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_plain_method_says_that_it_ignores_keys_of_ours(families, texts, tmp_path, caplog):
    config = config_of(families("llama"), "ties", texts, purify="separate")
    config["models"][0]["parameters"]["calibration_dataset"] = str(texts[0])
    merge(config, tmp_path / "out")
    (said,) = (r.message for r in caplog.records if "ignores" in r.message)
    assert said == (
        "ties ignores calibration_dataset, purify; the method that purifies is pave_ties.")
    caplog.clear()
    merge(config_of(families("llama"), "ties", texts), tmp_path / "plain")
    assert not [r for r in caplog.records if "ignores" in r.message]


def test_tensors_in_memory_take_a_store(families, texts, tmp_path):
    paths = families("llama")
    store = calibration_run.calibrate_to(
        source_of(paths["expert0"]), spec_of(texts[0]), tmp_path / "store",
        Resources())
    name = "model.layers.0.mlp.up_proj.weight"
    base, expert = (tensors_of(paths[k])[name] for k in ("base", "expert0"))
    arguments = dict(method="pave_task_arithmetic", base_index=0, name=name)
    merged = merge_tensors([base, expert], **arguments, parameters={
        "weight": 1.0, "rank_ratio": 0.9, "covariance": str(store.folder)})
    expected = papers_formula(expert, store.covariance(store.weights[name].site), 0.9)
    assert (merged - expected).norm() < 1e-4 * (expert - expected).norm()
    with pytest.raises(PaveError, match="has no covariances"):
        merge_tensors([base, expert], **arguments, parameters={
            "weight": 1.0, "calibration_dataset": str(texts[0])})


def test_bare_files_of_tensors_are_refused_where_their_layers_matter(families, tmp_path):
    paths = families("llama")
    files = {name: folder / "model.safetensors" for name, folder in paths.items()}
    source = {
        "base_model": str(files["base"]), "models": [{"model": str(files["expert0"])}],
        "parameters": {"weight": 1.0, "calibration_dataset": "none"}, "dtype": "float32",
    }

    def run(method: str, **parameters) -> Result:
        own = source["parameters"] | parameters
        if method == "emr":
            own = {}
        config = tmp_path / f"{method}.yml"
        config.write_text(yaml.safe_dump(source | {"merge_method": method, "parameters": own}))
        out = tmp_path / method
        return CliRunner().invoke(pytorch_command, [str(config), str(out)])

    refused = [
        (run("regmean"), "Nothing tells which tensors .* name model folders"),
        (run("pave_task_arithmetic"), "Nothing tells which tensors .* name model folders"),
        (run("tsv_regmean", calibration_dataset="x.jsonl"),
         "has no covariances: .*its folder as covariance"),
        (run("emr"), "masks beside a model folder.*name model folders"),
    ]
    for result, words in refused:
        assert result.exit_code == 1
        assert re.search(f"Error: .*{words}", result.output), result.output
    plain = run("pave_task_arithmetic", rank_ratio=1.0)
    assert plain.exit_code == 0, plain.output


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


def test_names_of_an_older_transformers_are_refused(tmp_path):
    """mergekit would write a ViT without its layers."""
    paths = make_family(tmp_path, "vit", save_original_format=True)
    data = write_images(tmp_path / "images")
    config = config_of(paths, "pave_ties", [data], rank_ratio=0.9)
    with pytest.raises(PaveError, match="leave 12 weights of .* out .*save_original_format=False"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    plain = merge(config_of(paths, "ties", [data]), tmp_path / "plain")
    assert not [name for name in plain if "layer" in name and name.endswith("0.mlp.fc1.weight")]


@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_so_are_they_by_methods_that_look_at_no_data(families, tmp_path, method):
    paths = make_family(tmp_path / "old", "vit", save_original_format=True)
    config = {"merge_method": method, "base_model": str(paths["base"]),
              "models": [{"model": str(paths["expert0"])}]}
    with pytest.raises(PaveError, match="leave 12 weights of .* out .*save_original_format=False"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    today = families("vit")
    config |= {"base_model": str(today["base"]), "models": [{"model": str(today["expert0"])}]}
    assert [n for n in merge(config, tmp_path / "today") if n.endswith("0.mlp.fc1.weight")]


@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_so_is_a_base_of_another_class(families, tmp_path, method):
    """The merge would be the base."""
    paths = families("vit")
    bare = transformers.AutoModel.from_pretrained(paths["base"])
    bare.save_pretrained(tmp_path / "bare", save_original_format=False)
    config = {"merge_method": method, "base_model": str(tmp_path / "bare"),
              "models": [{"model": str(paths["expert0"])}]}
    with pytest.raises(PaveError, match="leave 12 weights of .*expert0 out .* a ViTModel"):
        merge(config, tmp_path / "out")


@pytest.mark.parametrize("method", ["regmean", "tsv_regmean", "pave_regmean", "pave_tsv_regmean",
                                    "tsv_m", "pave_ties"])
def test_a_tensor_that_only_the_base_has_stays(families, tmp_path, method):
    """As `position_ids` of a BERT from an older transformers."""
    paths = families("bert")
    base = tensors_of(paths["base"])
    positions = torch.arange(64)[None]
    shutil.copytree(paths["base"], tmp_path / "base")
    save_file({**base, "embeddings.position_ids": positions},
              tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = config_of({**paths, "base": tmp_path / "base"}, method, ["none"])
    if "regmean" in method or method == "tsv_m":
        own = {} if method == "tsv_m" else {"calibration_dataset": "none"}
        config["models"] = [{"model": m["model"], "parameters": own} for m in config["models"]]
    out = merge(config, tmp_path / "out")
    assert out.pop("embeddings.position_ids").equal(positions)
    assert out.keys() == base.keys()
    assert not out["encoder.layer.0.output.dense.weight"].equal(
        base["encoder.layer.0.output.dense.weight"])


def test_a_cut_deeper_than_the_fine_tuning_is_said(families, texts, tmp_path, capsys):
    config = config_of(families("llama"), "pave_task_arithmetic", texts, rank_ratio=0.5)
    merge(config, tmp_path / "deep", quiet=False)
    deep = capsys.readouterr().err
    assert "14 tensors purified, 7 merged plainly" in deep
    assert re.search(r"more was removed than the fine-tuning had changed \(.* times\)", deep)
    config["parameters"]["rank_ratio"] = 0.97
    merge(config, tmp_path / "shallow", quiet=False)
    shallow = capsys.readouterr().err
    assert "14 tensors purified" in shallow and "more was removed" not in shallow


def test_a_shortage_of_rows_is_said_once_for_each_model(families, texts, tmp_path, caplog):
    config = config_of(families("llama"), "pave_task_arithmetic", texts, rank_ratio=0.9,
                       num_calibration_samples=61)
    found = [f for f in check(config, LoaderOptions()) if f.level == "warning"]
    assert [f.where for f in found] == ["models[0]", "models[1]"]
    merge(config, tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "61" in record.getMessage()]
    assert len(said) == 2 and all("60 usable rows" in line for line in said)


def test_the_card_links_the_paper(families, texts, tmp_path):
    paths = families("llama")
    merge(config_of(paths, "pave_ties", texts, rank_ratio=0.9), tmp_path / "out",
          write_model_card=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[PAVE-purified TIES](https://arxiv.org/abs/2510.14697)" in card


def test_data_may_be_given_once_for_all(families, tmp_path):
    data = write_texts(tmp_path / "shared.jsonl")
    paths = families("llama")
    once = config_of(paths, "pave_ties", [data], rank_ratio=0.9)
    for model in once["models"]:
        del model["parameters"]["calibration_dataset"]
    once["parameters"]["calibration_dataset"] = str(data)
    each = config_of(paths, "pave_ties", [data], rank_ratio=0.9)
    a, b = merge(once, tmp_path / "once"), merge(each, tmp_path / "each")
    assert all(torch.equal(a[name], b[name]) for name in a)
