"""Merged copies of adapters: kept by content, whole or not there at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import mergekit.common
import peft
import pytest
import torch
import transformers
from helpers import OPTIONS, make_family
from mergekit.common import ModelReference
from safetensors.torch import load_file

from mergekit_pave import plugin
from mergekit_pave.check import check
from mergekit_pave.errors import PaveError
from mergekit_pave.models.adapted import adapted_loader
from mergekit_pave.models.source import LoaderOptions, model_source

plugin.register()


@pytest.fixture
def base(tmp_path) -> Path:
    return make_family(tmp_path, "llama", experts=0)["base"]


def train(base: Path, adapter: Path, seed: int) -> None:
    """An adapter in its folder, over an earlier one if there is one."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(adapter)


def by_mergekit(base: Path, adapter: Path, cache: Path, **options) -> Path:
    reference = ModelReference.model_validate(f"{base}+{adapter}")
    return Path(reference.merged(cache_dir=str(cache), **options).model.path)


def by_us(base: Path, adapter: Path, cache: Path, **options) -> Path:
    reference = ModelReference.model_validate(f"{base}+{adapter}")
    return Path(model_source(reference, LoaderOptions(lora_merge_cache=str(cache), **options)).path)


def weight(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]


def changed(base: Path, adapter: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("merged", [by_mergekit, by_us])
def test_an_adapter_trained_further_is_merged_anew(base, tmp_path, merged):
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    for seed in (1, 2):
        train(base, adapter, seed)
        copy = merged(base, adapter, cache)
        torch.testing.assert_close(weight(copy), changed(base, adapter))
    assert merged(base, adapter, cache) == copy  # and found again


@pytest.mark.parametrize("merged", [by_mergekit, by_us])
def test_a_model_that_changed_is_merged_anew(base, tmp_path, merged):
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    train(base, adapter, 1)
    first = merged(base, adapter, cache)
    other = make_family(tmp_path / "other", "llama", experts=0, seed=5)["base"]
    shutil.copy2(other / "model.safetensors", base / "model.safetensors")
    second = merged(base, adapter, cache)
    assert first != second
    torch.testing.assert_close(weight(second), changed(base, adapter))


@pytest.mark.parametrize("merged", [by_mergekit, by_us])
def test_each_dtype_has_a_copy(base, tmp_path, merged):
    train(base, tmp_path / "adapter", 1)
    copies = {
        merged(base, tmp_path / "adapter", tmp_path / "cache", lora_merge_dtype=dtype)
        for dtype in (None, "float16", "bfloat16")}
    assert len(copies) == 3


@pytest.mark.parametrize("merged", [by_mergekit, by_us])
def test_of_a_failed_copy_nothing_stays(base, tmp_path, merged, monkeypatch):
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    train(base, adapter, 1)
    with monkeypatch.context() as broken:
        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        broken.setattr(mergekit.common.peft.PeftModel, "from_pretrained", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            merged(base, adapter, cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    torch.testing.assert_close(weight(merged(base, adapter, cache)), changed(base, adapter))


def test_what_a_killed_process_left_is_no_copy(base, tmp_path):
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    train(base, adapter, 1)
    copy = by_us(base, adapter, cache)
    shutil.rmtree(copy)
    left = cache / ".mergekit-pave-left"
    (left / "content" / "half").mkdir(parents=True)
    (left / "mark.json").write_text('{"kind": "mergekit-pave scratch"}')
    assert by_us(base, adapter, cache) == copy and (copy / "config.json").exists()
    assert not left.exists()


def test_an_adapter_left_in_the_folder_of_its_model(base, tmp_path):
    train(base, tmp_path / "adapter", 1)
    train(base, base, 2)
    cache = str(tmp_path / "cache")
    with pytest.raises(PaveError, match="base holds an adapter beside its weights"):
        by_us(base, tmp_path / "adapter", tmp_path / "cache")
    raw = {"merge_method": "tsv_m", "base_model": str(base),
           "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}
    assert "holds an adapter" in str(check(raw, LoaderOptions(lora_merge_cache=cache))[-1])
    # Read without a copy, the model is what its own files say.
    loader = adapted_loader(ModelReference.model_validate(raw["models"][0]["model"]), OPTIONS)
    for file in base.glob("adapter_*"):
        file.unlink()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(loader.get_tensor(name), changed(base, tmp_path / "adapter"))


def test_a_model_without_an_adapter_is_itself(base):
    reference = ModelReference.model_validate(str(base))
    assert reference.merged(cache_dir=None) is reference
