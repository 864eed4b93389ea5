"""The record that a merge leaves beside its model, by a real merge."""

from __future__ import annotations

import mergekit.merge
import pytest
import yaml
from helpers import write_texts
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_pave.publish import record
from mergekit_pave.publish.card import write_card


@pytest.mark.parametrize("card", [True, False])
def test_merge_leaves_its_record(tmp_path, families, card):
    paths = families("llama")
    data = write_texts(tmp_path / "rows.jsonl", rows=6)
    source = yaml.safe_dump({
        "merge_method": "pave_ties", "base_model": str(paths["base"]), "dtype": "float32",
        "parameters": {"weight": 1.0, "rank_ratio": 0.8,
                       "calibration_dataset": str(data)},
        "models": [{"model": str(paths[name])} for name in ("expert0", "expert1")]})
    options = MergeOptions(quiet=True, write_model_card=card, copy_tokenizer=False)
    out = tmp_path / "out"
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    mergekit.merge.run_merge(config, str(out), options, source)
    if not card:
        assert record.read(out) is None
        return
    facts = record.read(out)
    assert facts.merge_method == "pave_ties" and facts.tensors.purified == 14
    for name, model in zip(("expert0", "expert1"), facts.models, strict=True):
        assert model.id == name and model.hub == ()
        assert model.data["used"] == 6 and model.data["dataset"] == "rows.jsonl"
        assert len(model.ranks) == 14
        assert model.ranks["model.layers.0.mlp.up_proj.weight"][0] == 32
    both = [model.ranks for model in facts.models]
    for name, (full, _) in both[0].items():
        assert sum(ranks[name][1] for ranks in both) == int(0.2 * 2 * full + 0.5)
    text = write_card(out)
    assert "per tensor)" in text and "14 tensors were purified" in text
    texts = [path for path in out.iterdir() if path.suffix in (".md", ".yml", ".json")]
    assert all(str(tmp_path) not in path.read_text("utf-8") for path in texts)


def merge(paths, out, method: str, experts=("expert0", "expert1"), card: bool = True, **model):
    source = yaml.safe_dump({
        "merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
        "models": [{"model": str(paths[name]), "parameters": model} for name in experts]})
    options = MergeOptions(quiet=True, write_model_card=card, copy_tokenizer=False)
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    mergekit.merge.run_merge(config, str(out), options, source)


def ids(out) -> list[str]:
    return [model.id for model in record.read(out).models]


def test_a_method_that_looks_at_no_data_leaves_one_too(tmp_path, families):
    """Who its parents are can be told for certain only where it ran."""
    merge(families("llama"), tmp_path / "out", "tsv_m")
    facts = record.read(tmp_path / "out")
    assert ids(tmp_path / "out") == ["expert0", "expert1"] and facts.tensors is None
    assert facts.base == record.Parent("base", ())
    assert "Calibration" not in write_card(tmp_path / "out")


@pytest.mark.parametrize("second", ["tsv_m", "task_arithmetic"])
def test_no_record_outlives_its_merge(tmp_path, families, second):
    paths, out = families("llama"), tmp_path / "out"
    merge(paths, out, "tsv_m")
    merge(paths, out, second, ["expert1"], card=False, weight=1.0)
    assert record.read(out) is None
    (out / record.NAME).write_text('{"kind": "of another program"}')
    merge(paths, out, second, ["expert1"], card=False, weight=1.0)
    assert (out / record.NAME).exists()


def test_data_named_by_a_url_of_this_machine_is_local(tmp_path, families):
    data = write_texts(tmp_path / "rows.jsonl", rows=6)
    merge(families("llama"), tmp_path / "out", "regmean", calibration_dataset=f"file://{data}")
    for model in record.read(tmp_path / "out").models:
        assert model.data["dataset"] == "rows.jsonl" and model.data["local"]


def test_without_a_network_a_local_model_is_no_question(tmp_path, families, monkeypatch):
    """mergekit asks the Hub whether `experts/expert0`, which exists, is a model there."""
    monkeypatch.chdir(tmp_path)
    names = ("base", "expert0")
    for name in names:
        (tmp_path / "experts").mkdir(exist_ok=True)
        (tmp_path / "experts" / name).symlink_to(families("llama")[name])
    merge({name: f"experts/{name}" for name in names}, "out", "emr", ["expert0"])
    assert "experts/expert0" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "emr" / "manifest.json").exists()
