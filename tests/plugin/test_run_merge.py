"""The run of a merge: stores, threads, several merges at once, and what it says."""

from __future__ import annotations

import re
import threading

import mergekit.merge
import pytest
import torch
import transformers
from helpers import config_of, emr_config, make_family, merge, tensors_of, write_texts
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get, merge_tensors, registered_methods
from mergekit.options import MergeOptions

from mergekit_pave.calibration import run as calibration_run
from mergekit_pave.calibration import stores
from mergekit_pave.check import check
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin.opening import open_state
from mergekit_pave.recipe.recipe import Recipe


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
    options, recipe = MergeOptions(quiet=True), Recipe.as_written(config, None)
    state = open_state(recipe, tmp_path, options, LoaderOptions.of(options))
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


@pytest.mark.parametrize("method", ["tsv_m", "linear"])
def test_a_model_that_was_trained_further_is_merged_anew(tmp_path, method):
    """mergekit keeps a model's files open by its name as long as the process lives."""
    paths = make_family(tmp_path, "llama")
    config = emr_config(paths, method, parameters={"weight": 1.0})
    first = merge(config, tmp_path / "first")
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(paths["expert0"], max_shard_size="20KB")
    (paths["expert0"] / "model.safetensors").unlink(missing_ok=True)
    again = merge(config, tmp_path / "again")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], again[name])
