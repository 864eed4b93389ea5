"""What `compress` and `reconstruct` refuse, and what they leave as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import invoke, tensors_of
from helpers.compress import NORM, UP, raw
from safetensors.torch import save_file

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.tasks import compress_task
from mergekit_pave.tasks.compress import compress
from mergekit_pave.tasks.reconstruct import reconstruct


@pytest.mark.parametrize(("changes", "words"), [
    ({"base_model": None}, "base_model is missing: compress needs `base_model: NAME`"),
    ({"models": None, "slices": []}, "models is missing"),
    ({"models": [{"model": "base"}], "base_model": "base"}, "no fine-tuned model beside the base"),
    ({"models": [{"model": "a"}, {"model": "a"}]}, "a is listed twice"),
    ({"models": [{"model": "./nowhere"}]}, "There is no model folder ./nowhere"),
    ({"base_model": "./nowhere"}, "There is no model folder ./nowhere"),
    ({"models": "x"}, "mergekit cannot read the configuration: models"),
])
def test_configurations_that_are_refused(config, tmp_path, changes, words):
    code, out, err = invoke("compress", config(**changes), tmp_path / "c")
    assert code == 1 and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "c").exists()


def test_the_method_may_be_missing(families, config, tmp_path):
    content = raw(families("llama"))
    del content["merge_method"]
    assert invoke("compress", config(content), tmp_path / "c")[0] == 0


@pytest.mark.parametrize("fraction", ["0", "1.5", "-1", "x", "nan"])
def test_fractions_that_are_refused(families, config, tmp_path, fraction):
    code, _, err = invoke("compress", config(), tmp_path / "c", f"--rank-fraction={fraction}")
    assert code and "fraction" in err and "Traceback" not in err
    with pytest.raises(PaveError, match="rank_fraction must be"):
        compress(raw(families("llama")), tmp_path / "c", rank_fraction=fraction)
    assert not (tmp_path / "c").exists()


def test_folders_that_are_refused(families, config, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name, words in (("used", "already holds mine.txt"), ("file", "is a file")):
        code, _, err = invoke("compress", config(), tmp_path / name)
        assert code == 1 and words in err
    compress(raw(families("llama")), tmp_path / "c")
    task, base = tmp_path / "c" / "expert0", str(families("llama")["base"])
    for name in ("used", "file"):
        with pytest.raises(PaveError, match=f"{name} exists already"):
            reconstruct(task, tmp_path / name, base=base)
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as mounted:  # nobody may mount one for a test
        mounted.setattr(os.path, "ismount", lambda path: os.path.basename(path) == "disk")
        with pytest.raises(PaveError, match="disk is a mount point; name a folder in it"):
            reconstruct(task, tmp_path / "disk", base=base)
    with pytest.raises(PaveError, match="no manifest.json.*: name a task's folder"):
        reconstruct(tmp_path / "c", tmp_path / "m", base=base)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64,
                                   torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_any_dtype_come_back(families, tmp_path, dtype):
    """Buffers of old checkpoints: GPT-NeoX's causal masks, for one."""
    paths = dict(families("llama"))
    for name, changed in (("base", 0), ("expert0", 0), ("expert1", 1)):
        paths[name] = shutil.copytree(paths[name], tmp_path / name)
        state = tensors_of(paths[name])
        state["buffer"] = torch.tensor([0, 1, changed]).to(dtype)
        save_file(state, paths[name] / "model.safetensors", metadata={"format": "pt"})
    compress(raw(paths), tmp_path / "c")
    for name in ("expert0", "expert1"):
        reconstruct(tmp_path / "c" / name, tmp_path / f"m-{name}", base=str(paths["base"]))
        found = tensors_of(tmp_path / f"m-{name}")["buffer"]
        wanted = tensors_of(paths[name])["buffer"]
        assert found.dtype == dtype and torch.equal(found.float(), wanted.float())


def test_a_base_that_differs_in_a_few_rows_is_another(families, tmp_path):
    paths = dict(families("llama"))
    compress(raw(paths), tmp_path / "c")
    other = shutil.copytree(paths["base"], tmp_path / "other")
    state = tensors_of(other)
    assert state["model.embed_tokens.weight"].numel() > 1500  # of which 512 would be a sample
    state["model.embed_tokens.weight"][45:47] = 0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="other is not the base .*embed_tokens"):
        reconstruct(tmp_path / "c" / "expert0", tmp_path / "m", base=str(other))


def test_a_change_of_one_rounding_is_kept(families, tmp_path):
    paths = dict(families("llama"))
    paths["expert0"] = shutil.copytree(paths["base"], tmp_path / "nudged")
    state = tensors_of(paths["expert0"])
    name = "model.layers.0.mlp.up_proj.weight"
    state[name][:, 3] = torch.nextafter(state[name][:, 3], torch.tensor(9.0))
    save_file(state, paths["expert0"] / "model.safetensors", metadata={"format": "pt"})
    compress(raw(paths), tmp_path / "c")
    reconstruct(tmp_path / "c" / "nudged", tmp_path / "m", base=str(paths["base"]))
    assert torch.equal(tensors_of(tmp_path / "m")[name], state[name])


def test_a_merged_adapter_has_its_tokenizer(families, tmp_path):
    """mergekit's copy of model and adapter has none."""
    paths = dict(families("llama"))
    adapter = tmp_path / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    for ships in (True, False):
        if ships:
            tokenizer = transformers.AutoTokenizer.from_pretrained(paths["base"])
            tokenizer.chat_template = "{{ messages }} of the adapter"
            tokenizer.save_pretrained(adapter)
        else:
            for file in companions(adapter).values():
                file.unlink()
        folder = tmp_path / f"c-{ships}"
        made = {"base": paths["base"], "expert0": f"{paths['base']}+{adapter}",
                "expert1": paths["expert1"]}
        options = LoaderOptions(lora_merge_cache=str(tmp_path / "merged"))
        (task, _) = compress(raw(made), folder, options=options)
        reconstruct(folder / task.task, tmp_path / f"m-{ships}", base=str(paths["base"]))
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / f"m-{ships}")
        assert (found.chat_template or "").endswith("of the adapter") == ships
        assert found.get_vocab()


def test_an_empty_folder_stays_the_same_folder(families, tmp_path, monkeypatch):
    compress(raw(families("llama")), tmp_path / "c")
    (tmp_path / "here").mkdir()
    before = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    reconstruct(tmp_path / "c" / "expert0", ".", base=str(families("llama")["base"]))
    assert (tmp_path / "here").stat().st_ino == before
    assert os.path.exists("config.json") and tensors_of(Path("."))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "here"]


def test_models_that_do_not_fit(families, tmp_path):
    paths = families("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_task, "pack", None)  # said before the work
        with pytest.raises(PaveError, match="shares no tensor's name with the base"):
            compress(raw({**paths, "base": families("roberta")["base"]}), tmp_path / "c")
    wide = shutil.copytree(paths["base"], tmp_path / "wide")
    state = tensors_of(wide)
    state[NORM] = torch.ones(33)
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match=r"is \(32,\) and \(33,\) in the base wide"):
        compress(raw({**paths, "base": wide}), tmp_path / "c")
    state[NORM] = torch.ones(32)
    state[UP][0, 0] = torch.inf
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="up_proj.weight of expert0 or of its base holds NaN"):
        compress(raw({**paths, "base": wide}), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_filled(families, tmp_path, there):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    target, link = tmp_path / "disk" / "m", tmp_path / "m"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    reconstruct(tmp_path / "c" / "expert0", link, base=str(paths["base"]))
    assert link.is_symlink() and (link / "config.json").is_file()
    assert tensors_of(target).keys() == tensors_of(paths["expert0"]).keys()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["m"]


def test_reconstruction_needs_the_very_base(families, tmp_path):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    task = tmp_path / "c" / "expert0"
    with pytest.raises(PaveError, match="local base base: name its folder with --base"):
        reconstruct(task, tmp_path / "m")
    with pytest.raises(PaveError, match="expert1 is not the base that .* \\(first difference: "):
        reconstruct(task, tmp_path / "m", base=str(paths["expert1"]))
    with pytest.raises(PaveError, match="There is no model folder /nowhere"):
        reconstruct(task, tmp_path / "m", base="/nowhere")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("damage", [
    "cut", "gone", "model", "manifest", "kind", "format", "how", "dtype", "file", "outside"])
def test_damage_is_named(families, tmp_path, damage):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    task = tmp_path / "c" / "expert0"
    file, manifest = task / "tensors-00000.safetensors", task / "manifest.json"
    words = "is damaged .*; compress again"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "model":
        shutil.rmtree(task / "model")
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"kind": "mergekit-pave compressed model", "format": 3}')
    elif damage in ("how", "dtype", "file", "outside"):
        content = json.loads(manifest.read_text())
        name = next(n for n, t in content["tensors"].items() if t["how"] == "factors")
        if damage in ("how", "dtype"):
            content["tensors"][name][damage] = "x"
        else:
            entry = content["entries"][f"{name}::u"]
            entry["file"] = None if damage == "file" else f"../expert1/{entry['file']}"
        manifest.write_text(json.dumps(content))
    elif damage == "kind":
        manifest.write_text("[]")
        words = "not the manifest of a mergekit-pave compressed model"
    else:
        manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 9'))
        words = "has format 9"
    with pytest.raises(PaveError, match=words):
        reconstruct(task, tmp_path / "m", base=str(paths["base"]))
    assert not (tmp_path / "m").exists()


def test_links_of_a_stranger_are_not_copied(families, tmp_path):
    compress(raw(families("llama")), tmp_path / "c")
    tokenizer = tmp_path / "c" / "expert0" / "model" / "tokenizer.json"
    tokenizer.rename(tmp_path / "secret")
    tokenizer.symlink_to(tmp_path / "secret")
    with pytest.raises(PaveError, match="tokenizer.json leads out of the folder"):
        reconstruct(tmp_path / "c" / "expert0", tmp_path / "m", base=str(families("llama")["base"]))
    assert not (tmp_path / "m").exists()
