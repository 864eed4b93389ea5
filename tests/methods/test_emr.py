"""EMR merges: task models told from disk, purified twins, threads."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from helpers import CLASSES, emr_config, merge, tensors_of
from helpers.emr import MANIFEST, equal, experts_of, our_models, papers_models, random_models
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get, merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.emr import elect
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin.opening import open_state
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage import masks as task_masks
from mergekit_pave.storage.masks import TaskMasks
from mergekit_pave.tasks.emr import load_task_model, task_tensors


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_every_task_comes_back_from_disk(emr_trio, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 2_000)
    paths = emr_trio(kind)
    found = merge(emr_config(paths), tmp_path / "out", out_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    assert len(list((tmp_path / "out" / "emr").glob("masks-*"))) > 2
    base, experts = tensors_of(paths["base"]), experts_of(paths)
    expected = our_models(base, experts)
    papers = papers_models(base, experts)
    assert equal({n: elect(base[n], [e[n] for e in experts]) for n in base}, found)
    for t in range(3):
        ours = dict(task_tensors(tmp_path / "out", t, base=str(paths["base"])))
        assert ours.keys() == expected[t].keys()
        for name in ours:
            # The sums come back exactly; their order may be another.
            assert torch.allclose(ours[name], expected[t][name], rtol=0, atol=1e-6), name
            np.testing.assert_allclose(ours[name].numpy(), papers[t][name], atol=1e-5)
        model = load_task_model(tmp_path / "out", t, base=str(paths["base"]))
        assert type(model).__name__ == CLASSES[kind]
        state = model.state_dict()
        prefix = "" if next(iter(ours)) in state else "transformer."
        assert all(torch.equal(state[prefix + name], ours[name]) for name in ours)


def test_one_bit_per_parameter_and_task_on_disk(emr_merged):
    sizes = [t.numel() for t in tensors_of(emr_merged).values()]
    manifest = json.loads((emr_merged / MANIFEST).read_text())
    assert len(manifest["tensors"]) == len(sizes)
    files = list((emr_merged / "emr").glob("masks-*.safetensors"))
    stored = {k: t for file in files for k, t in load_file(file).items()}
    assert {t.dtype for t in stored.values()} == {torch.uint8}
    assert sum(t.nbytes for t in stored.values()) == 3 * sum((n + 7) // 8 for n in sizes)
    # The header of a file is all that comes on top.
    assert sum(f.stat().st_size for f in files) < 3 * sum(sizes) / 8 + 500 * len(sizes)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_purified_models_are_merged(emr_trio, texts, tmp_path, kind):
    """`pave_emr` is `emr` applied to models purified beforehand, one by one."""
    paths = emr_trio(kind)
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    config = emr_config(paths, "pave_emr", parameters=shared)
    for i, model in enumerate(config["models"]):
        model["parameters"] = {"calibration_dataset": str(texts[i % 2])}
    merge(config, tmp_path / "out", out_shard_size=20_000)
    purified = []
    for i, model in enumerate(config["models"]):
        alone = {**config, "merge_method": "pave_task_arithmetic", "models": [
            {**model, "parameters": {**model["parameters"], "weight": 1.0}}]}
        purified.append(merge(alone, tmp_path / f"purified{i}"))
    base = tensors_of(paths["base"])
    plain = our_models(base, experts_of(paths))[1]
    expected = our_models(base, purified)[1]
    found = dict(task_tensors(tmp_path / "out", "expert1", base=str(paths["base"])))
    for name in base:
        # A mask may flip for single entries, whose task vector differs by rounding.
        assert ((found[name] - expected[name]).abs() > 1e-4).float().mean() < 0.01, name
    name = next(n for n in base if "1." in n and base[n].ndim == 2)
    assert (found[name] - plain[name]).norm() > 0.05 * plain[name].norm()


def test_ratio_one_is_the_plain_method(emr_trio, emr_merged, tmp_path):
    config = emr_config(emr_trio("llama"), "pave_emr", parameters={"rank_ratio": 1.0})
    merge(config, tmp_path / "out", copy_tokenizer=True, out_shard_size=20_000)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(emr_merged))
    assert (tmp_path / "out" / MANIFEST).read_text() == (emr_merged / MANIFEST).read_text()
    assert equal(tensors_of(tmp_path / "out" / "emr"), tensors_of(emr_merged / "emr"))


def test_bfloat16_models_come_back_exactly(emr_trio, tmp_path):
    paths = emr_trio("llama", dtype=torch.bfloat16)
    merge(emr_config(paths, dtype="bfloat16"), tmp_path / "out")
    expected = our_models(tensors_of(paths["base"]), experts_of(paths))[0]
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    for name in found:
        assert torch.allclose(found[name].float(), expected[name], rtol=2**-8, atol=1e-7), name


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
@pytest.mark.parametrize("dtypes", [{"out_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_rounded_weights_are_understood(emr_trio, texts, tmp_path, method, dtypes):
    """Cast before or after the merge: the task's model is off by little more than one cast."""
    paths = emr_trio("llama")
    config = emr_config(paths, method, **dtypes)
    if method == "pave_emr":
        config["parameters"] = {"rank_ratio": 0.9, "calibration_dataset": str(texts[0])}
    merge(config, tmp_path / "out")
    exact = merge({**config, "dtype": "float32", "out_dtype": "float32"}, tmp_path / "exact")
    base = str(paths["base"])
    found = dict(task_tensors(tmp_path / "out", 2, base=base))
    wide = dict(task_tensors(tmp_path / "exact", 2, base=base))
    for name in exact:
        assert found[name].dtype == torch.bfloat16
        off = (found[name].float() - wide[name]).norm() / wide[name].norm()
        assert off < (2**-7 if dtypes.get("out_dtype") else 2**-4), name


def test_layers_of_slices_are_found_by_their_values(emr_trio, tmp_path):
    paths = emr_trio("llama")
    config = emr_config(paths)
    sources = [{**m, "layer_range": [1, 2]} for m in config.pop("models")]
    sources.append({"model": config["base_model"], "layer_range": [1, 2]})
    merge({**config, "slices": [{"sources": sources}]}, tmp_path / "out")
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    names = {name: name.replace("layers.0.", "layers.1.") for name in found}
    assert sum(name != source for name, source in names.items()) == 9
    base, *experts = (
        {name: tensors[source] for name, source in names.items()}
        for tensors in (tensors_of(paths["base"]), *experts_of(paths)))
    expected = our_models(base, experts)[0]
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


def test_a_task_that_took_no_part_has_the_base(emr_trio, tmp_path):
    paths = emr_trio("llama")
    config = emr_config(paths)
    models = [item["model"] for item in config.pop("models")]
    parts = [(0, 1, models), (1, 2, models[2:])]
    config["slices"] = [
        {"sources": [{"model": model, "layer_range": [first, end]}
                     for model in (*some, config["base_model"])]}
        for first, end, some in parts]
    out = merge(config, tmp_path / "out")
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    base, own = tensors_of(paths["base"]), tensors_of(paths["expert0"])
    other = [name for name in out if "layers.1." in name]
    assert sum(not torch.equal(out[name], base[name]) for name in other) >= 7
    assert all(torch.equal(found[name], base[name]) for name in other)
    first = "model.layers.0.mlp.up_proj.weight"
    assert (found[first] - own[first]).norm() < (base[first] - own[first]).norm()


def test_loading_takes_what_transformers_does(emr_trio, emr_merged, tmp_path):
    base = str(emr_trio("llama")["base"])
    config = transformers.AutoConfig.from_pretrained(emr_merged)
    config.rms_norm_eps = 0.25
    model, info = load_task_model(
        emr_merged, 1, base=base, config=config, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and model.config.rms_norm_eps == 0.25
    assert model.dtype == torch.bfloat16


def test_a_base_that_differs_in_a_few_rows_is_another(emr_trio, emr_merged, tmp_path):
    other = shutil.copytree(emr_trio("llama")["base"], tmp_path / "other")
    state = tensors_of(other)
    state["model.embed_tokens.weight"][45:47] = 0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="other is not the base .*embed_tokens"):
        dict(task_tensors(emr_merged, 0, base=str(other)))


def test_experts_fused_by_mergekit_are_found_in_the_base(tmp_path):
    """The base's checkpoint has them one by one, as older transformers wrote them."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=94, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=32, intermediate_size=48, num_local_experts=4))
    paths = {}
    for name in ("base", "expert0"):
        paths[name] = tmp_path / name
        model.save_pretrained(paths[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    out = merge(emr_config(paths), tmp_path / "out")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert fused in out and fused not in tensors_of(paths["base"])
    expected = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"]).state_dict()
    found = load_task_model(tmp_path / "out", 0, base=str(paths["base"])).state_dict()
    assert equal(found, expected)


def test_a_rearranged_vocabulary_is_kept(emr_trio, tmp_path):
    paths = emr_trio("llama")
    merge(emr_config(paths, tokenizer={"source": "union"}), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    kept = {name for name, tensor in manifest["tensors"].items() if tensor["keeps_base"]}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    merge(emr_config(paths), tmp_path / "plain")
    a, b = (dict(task_tensors(tmp_path / out, 1, base=str(paths["base"])))
            for out in ("out", "plain"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in b)


def test_in_memory_there_are_the_unified_weights_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, models = random_models(5, 3, torch.float32)
    merged = merge_tensors([base["weight"], *(m["weight"] for m in models)], "emr", base_index=0)
    assert torch.equal(merged, elect(base["weight"], [m["weight"] for m in models]))
    assert not list(tmp_path.rglob("emr"))


def method_that_writes(config, folder):
    options = MergeOptions(quiet=True)
    state = open_state(Recipe.as_written(config, None), folder, options, LoaderOptions.of(options))
    return get("emr").within(state)


def test_threads_write_what_one_thread_writes(emr_trio, emr_merged, tmp_path, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 1_000)
    paths = emr_trio("llama")
    config = MergeConfiguration.model_validate(emr_config(paths))
    ids = [ModelReference.model_validate(str(path)) for path in paths.values()]
    sources = [tensors_of(path) for path in paths.values()]

    def work(name: str) -> None:
        merge_tensors([s[name] for s in sources], method, ids=ids, base_index=0, name=name)

    method = method_that_writes(config, tmp_path)
    threads = [threading.Thread(target=work, args=(name,)) for name in sources[0]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    method.state.masks.finish()
    one, many = TaskMasks(emr_merged), TaskMasks(tmp_path)
    assert one.tasks == many.tasks == ["expert0", "expert1", "expert2"]
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        assert one.tensors[name].own == many.tensors[name].own
        assert all(torch.equal(one.mask(name, t), many.mask(name, t)) for t in range(3))


def test_a_merge_that_nobody_has_checked_keeps_one_base_and_rescaler(emr_trio, tmp_path):
    paths = emr_trio("llama")
    config = MergeConfiguration.model_validate(emr_config(paths))
    ids = [ModelReference.model_validate(str(path)) for path in paths.values()]

    def work(base: int, rescaler: str) -> None:
        method = method_that_writes(config, tmp_path / "out")
        for i, way in enumerate(("global", rescaler)):
            merge_tensors([torch.randn(3) for _ in ids], method, ids=ids, base_index=i * base,
                          name=str(i), parameters={"rescaler": way})

    work(0, "global")
    with pytest.raises(PaveError, match="one base for the whole model.*base_model of the slice"):
        work(1, "global")
    with pytest.raises(PaveError, match="rescaler must be one value for the whole model"):
        work(0, "tensor_mean")
    assert not (tmp_path / "out" / "emr").exists()


def test_the_end_of_a_merge_says_what_it_wrote(emr_trio, tmp_path, capsys):
    merge(emr_config(emr_trio("llama")), tmp_path / "out", quiet=False)
    said = capsys.readouterr().err
    assert "masks for 3 tasks" in said and f"materialize {tmp_path / 'out'} TASK DIR" in said
