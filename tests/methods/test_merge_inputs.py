"""Adapters, slices, tensors in memory, older names: the models that a merge takes."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from helpers import (
    cached_repository,
    config_of,
    make_family,
    merge,
    papers_formula,
    source_of,
    spec_of,
    tensors_of,
    write_images,
    write_tokenizer,
)
from mergekit.common import ModelReference
from mergekit.merge_methods import merge_tensors
from mergekit.scripts.merge_raw_pytorch import main as pytorch_command
from safetensors.torch import load_file, save_file

from mergekit_pave.calibration import run as calibration_run
from mergekit_pave.calibration.load import Resources
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions, tokenizer_of


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


def test_names_of_an_older_transformers(tmp_path, capfd):
    """mergekit alone would write a ViT without its layers."""
    paths = make_family(tmp_path, "vit", save_original_format=True)
    data = write_images(tmp_path / "images")
    config = config_of(paths, "pave_ties", [data], rank_ratio=0.9)
    merged = merge(config, tmp_path / "out", quiet=False)
    assert merged.keys() == tensors_of(paths["base"]).keys()
    assert "12 tensors purified" in capfd.readouterr().err
    plain = merge(config_of(paths, "ties", [data]), tmp_path / "plain")
    assert not plain.keys() >= merged.keys()


@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_so_by_methods_that_look_at_no_data(tmp_path, method):
    paths = make_family(tmp_path / "old", "vit", save_original_format=True)
    config = {"merge_method": method, "base_model": str(paths["base"]),
              "models": [{"model": str(paths["expert0"])}]}
    before, after = tensors_of(paths["base"]), merge(config, tmp_path / "out")
    assert after.keys() == before.keys()
    assert not torch.equal(*(t["vit.encoder.layer.0.output.dense.weight"]
                             for t in (before, after)))


@pytest.mark.parametrize("method", ["tsv_m", "emr"])
def test_so_is_a_base_of_another_class(families, tmp_path, method):
    """The merge would be the base."""
    paths = families("vit")
    bare = transformers.AutoModel.from_pretrained(paths["base"])
    bare.save_pretrained(tmp_path / "bare", save_original_format=False)
    config = {"merge_method": method, "base_model": str(tmp_path / "bare"),
              "models": [{"model": str(paths["expert0"])}]}
    with pytest.raises(PaveError, match="leave 38 weights of .*expert0 out .* a ViTModel"):
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
