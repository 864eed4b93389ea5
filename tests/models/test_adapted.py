"""Adapters that are applied while tensors are read, against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import CLASSES, errors, make_family, merge
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_pave import plugin
from mergekit_pave.errors import PaveError
from mergekit_pave.models.adapted import adapted_loader
from mergekit_pave.models.adapters import plain
from mergekit_pave.models.source import LoaderOptions

plugin.register()
OPTIONS = LoaderOptions()


def adapter(base: Path, folder: Path, kind: str, seed: int = 0, **settings) -> Path:
    """A random adapter of every kind of factor that the settings ask for."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[kind]).from_pretrained(base)
    config = peft.LoraConfig(r=2, lora_alpha=3, **settings)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    model = getattr(transformers, CLASSES[kind]).from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(merged.state_dict())


def reference(base: Path, folder: Path) -> ModelReference:
    return ModelReference.model_validate(f"{base}+{folder}")


Q = ["q_proj", "down_proj"]
KINDS = {
    "plain": ("llama", {"target_modules": Q}),
    "rank-stabilised": ("llama", {"target_modules": Q, "use_rslora": True}),
    "dora": ("llama", {"target_modules": Q, "use_dora": True}),
    "patterns": ("llama", {"target_modules": Q, "rank_pattern": {"q_proj": 4},
                           "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 5}}),
    "some layers": ("llama", {"target_modules": Q, "layers_to_transform": [1]}),
    "vocabulary": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved whole": ("llama", {"target_modules": Q, "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("roberta", {"target_modules": ["query"], "bias": "all"}),
    "bias of factors": ("roberta", {"target_modules": ["query"], "lora_bias": True}),
    "a head": ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)
def test_tensors_are_those_of_pefts_merge(families, tmp_path, kind, settings):
    base = families(kind)["base"]
    folder = adapter(base, tmp_path / "adapter", kind, **settings)
    loader, stored = adapted_loader(reference(base, folder), OPTIONS), load_file(
        base / "model.safetensors")
    expected = by_peft(base, folder, kind)
    changed = 0
    for name in loader.index.tensor_paths:
        own = name if name in expected else next(n for n in expected if n.endswith("." + name))
        found = loader.get_tensor(name)
        torch.testing.assert_close(found, expected[own], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(found, stored[name])
    assert changed == sum(not torch.equal(expected[own], value) for own, value in getattr(
        transformers, CLASSES[kind]).from_pretrained(base).state_dict().items())


def test_what_only_peft_can_apply_is_refused(families, tmp_path):
    base = families("llama")["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=Q)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change in ({"init_lora_weights": "pissa"}, {"peft_type": "LOHA"},
                   {"layer_replication": [[0, 2]]}, {"a_later_version": True}):
        file.write_text(json.dumps({**settings, **change}))
        with pytest.raises(PaveError, match="add --lora-merge-cache DIR"):
            adapted_loader(reference(base, folder), OPTIONS)
        config = {"merge_method": "tsv_m", "base_model": str(base),
                  "models": [{"model": f"{base}+{folder}"}, {"model": str(base)}]}
        assert any("add --lora-merge-cache DIR" in error for error in errors(config))


PARTS = {
    "no prefix": (lambda s: {k.removeprefix("base_model.model."): v for k, v in s.items()},
                  "no place for it"),
    "half": (lambda s: {k: v for k, v in s.items() if "layers.1." not in k}, "lacks 4 tensors"),
    "one factor": (lambda s: {k: v for k, v in s.items() if "lora_B" not in k}, "lacks 4 tensors"),
    "ranks": (lambda s: {k: torch.cat([v, v]) if "lora_A" in k else v for k, v in s.items()},
              "does not fit"),
}


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("change, words", PARTS.values(), ids=PARTS)
def test_what_peft_would_leave_out_is_refused(families, tmp_path, change, words, cache):
    """peft loads such an adapter in part or not at all, and merges what it has."""
    base = families("llama")["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=Q)
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    options = LoaderOptions(lora_merge_cache=str(tmp_path / "copies") if cache else None)
    config = {"merge_method": "tsv_m", "base_model": str(base),
              "models": [{"model": f"{base}+{folder}"}]}
    (found,) = errors(config, options)
    assert words in found
    with pytest.raises(PaveError, match=words):
        merge(config, tmp_path / "out", lora_merge_cache=options.lora_merge_cache)


def test_an_adapters_own_name_in_its_tensors(families, tmp_path):
    base = families("llama")["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=Q)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file).items()
    save_file({key.replace(".weight", ".default.weight"): value for key, value in tensors}, file)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = adapted_loader(reference(base, folder), OPTIONS).get_tensor(name)
    torch.testing.assert_close(found, by_peft(base, folder, "llama")[name], rtol=1e-5, atol=1e-6)


def test_a_check_finds_what_only_peft_can_apply_to_a_tied_head(families, tmp_path):
    config = transformers.AutoConfig.from_pretrained(families("llama")["base"])
    config.tie_word_embeddings, base = True, tmp_path / "tied"
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=["embed_tokens"])
    config = {"merge_method": "tsv_m", "base_model": str(base),
              "models": [{"model": f"{base}+{folder}"}]}
    (found,) = errors(config)
    assert "add --lora-merge-cache DIR" in found


def test_a_prompt_is_no_change_of_weights(families, tmp_path):
    base = families("llama")["base"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    config = {"merge_method": "tsv_m", "base_model": str(base),
              "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}
    (found,) = errors(config, LoaderOptions(lora_merge_cache=str(tmp_path / "copies")))
    assert "changes no weights" in found


@pytest.mark.parametrize("method, parameters", [
    ("tsv_m", {}), ("regmean", {"calibration_dataset": "none"}), ("emr", {}),
    ("matched_regmean", {"calibration_dataset": "none"}),
])
def test_a_merge_without_copies_is_that_of_the_copies(families, tmp_path, method, parameters):
    base = families("llama")["base"]
    models = [f"{base}+{adapter(base, tmp_path / f'a{i}', 'llama', i, target_modules=Q)}"
              for i in range(2)]
    config = {"merge_method": method, "base_model": str(base), "dtype": "float32",
              "models": [{"model": model} for model in models], "parameters": parameters}
    without = merge(config, tmp_path / "without")
    copies = merge(config, tmp_path / "with", lora_merge_cache=str(tmp_path / "cache"))
    assert without.keys() == copies.keys()
    for name, value in copies.items():
        torch.testing.assert_close(without[name], value, rtol=1e-4, atol=1e-5)


def test_the_change_keeps_its_rank_where_the_model_is_bfloat16(tmp_path):
    base = make_family(tmp_path, "llama", experts=0, dtype=torch.bfloat16)["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(base / "model.safetensors")[name].float()

    def rank(dtype):
        found = adapted_loader(reference(base, folder), OPTIONS, dtype).get_tensor(name).float()
        values = torch.linalg.svdvals(found - stored)
        return int((values > 1e-5 * values[0]).sum())

    assert rank("float32") == 2 and rank(None) > 2


def test_data_go_through_a_merged_copy(families, texts, tmp_path):
    base = families("llama")["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=Q)
    data = {"calibration_dataset": str(texts[0])}
    config = {"merge_method": "regmean", "base_model": str(base), "parameters": data,
              "models": [{"model": f"{base}+{folder}"}, {"model": str(base)}]}
    assert any("data go through the merged copy" in error for error in errors(config))
    with pytest.raises(PaveError, match="--lora-merge-cache"):
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions())
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(families, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = families("llama")["base"]
    with pytest.raises(PaveError, match="The adapter nobody/nothing cannot be had"):
        adapted_loader(ModelReference.model_validate(f"{base}+nobody/nothing"), OPTIONS)


@pytest.mark.parametrize("change", [{"lora_alpha": "x"}, {"alpha_pattern": {"(": 1}}, []])
def test_settings_that_are_none(families, tmp_path, change):
    base = families("llama")["base"]
    folder = adapter(base, tmp_path / "adapter", "llama", target_modules=Q)
    file = folder / "adapter_config.json"
    settings = {**json.loads(file.read_text()), **change} if change else change
    file.write_text(json.dumps(settings))
    with pytest.raises(PaveError):
        adapted_loader(reference(base, folder), OPTIONS)


def test_only_a_part_of_a_name_that_is_default_is_left_out():
    name = "base_model.model.default_head.proj.lora_A"
    assert plain(f"{name}.default.weight") == plain(f"{name}.weight") == f"{name}.weight"
