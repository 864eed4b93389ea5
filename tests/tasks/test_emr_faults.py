"""EMR merges that fail, end early, are damaged, or cannot be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers
import yaml
from helpers import emr_config, merge
from helpers.emr import MANIFEST, equal
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.emr import elect
from mergekit_pave.errors import PaveError
from mergekit_pave.methods import emr
from mergekit_pave.storage import masks as task_masks
from mergekit_pave.storage.files import appearing
from mergekit_pave.storage.masks import TaskMasks
from mergekit_pave.tasks import emr as emr_models
from mergekit_pave.tasks.emr import load_task_model, materialize, task_tensors


def refused(words: str, function, *arguments, **more) -> None:
    with pytest.raises(PaveError) as caught:
        list(function(*arguments, **more) or ())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_merge_leaves_the_earlier_masks(emr_trio, tmp_path, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 1_000)
    config, out = emr_config(emr_trio("llama")), tmp_path / "out"
    merge(config, out)
    before = {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 15:
            assert list(tmp_path.glob("*/.mergekit-pave-*/content/*/emr/masks-*"))
            raise KeyboardInterrupt
        return elect(*arguments)

    monkeypatch.setattr(emr, "elect", failing)
    for folder in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merge(config, folder, out_shard_size=1_000)
    assert before == {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert not (tmp_path / "new").exists()


def test_a_killed_merge_leaves_nothing_that_counts(emr_trio, tmp_path):
    paths = emr_trio("llama")
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(emr_config(paths)))
    code = (
        "import os, sys, yaml\n"
        "from mergekit.merge import run_merge, MergeOptions\n"
        "from mergekit.config import MergeConfiguration\n"
        "from mergekit_pave.storage import masks as task_masks\n"
        "from mergekit_pave.storage.archive import Filling\n"
        "task_masks.WINDOW = 1_000\n"
        "flush = Filling.flush\n"
        "def dying(self):\n"
        "    flush(self)\n"
        "    if self._files == 3: os._exit(9)\n"
        "Filling.flush = dying\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open('merge.yml')))\n"
        "run_merge(config, 'out', MergeOptions(quiet=True))\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    out = tmp_path / "out"
    (left,) = out.glob(".mergekit-pave-*/content/out/emr")
    assert len(list(left.iterdir())) == 3
    refused("has no task masks", task_tensors, out, 0)
    merge(emr_config(paths), out)
    assert not list(out.glob(".mergekit-pave-*"))
    names = {file.name for file in (out / "emr").iterdir()}
    assert names == {"manifest.json", "masks-00000.safetensors"}


def test_another_merge_replaces_the_masks(emr_trio, tmp_path):
    paths = emr_trio("llama")
    two = {name: paths[name] for name in ("base", "expert2", "expert0")}
    merge(emr_config(paths), tmp_path / "out")
    merge(emr_config(two), tmp_path / "out")
    merge(emr_config(two), tmp_path / "fresh")
    base = str(paths["base"])
    assert TaskMasks(tmp_path / "out").tasks == ["expert2", "expert0"]
    assert equal(dict(task_tensors(tmp_path / "out", "expert2", base=base)),
                 dict(task_tensors(tmp_path / "fresh", 0, base=base)))
    ties = emr_config(two, "ties")
    for model in ties["models"]:
        model["parameters"] = {"weight": 0.5}
    merge(ties, tmp_path / "out")
    assert not (tmp_path / "out" / "emr").exists()


def test_another_programs_folder_is_left_alone(emr_trio, tmp_path):
    paths = emr_trio("llama")
    theirs = tmp_path / "out" / "emr" / "manifest.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"kind": "records"}')
    average = {"merge_method": "linear", "dtype": "float32", "models": [
        {"model": str(paths[name]), "parameters": {"weight": 1}}
        for name in ("expert0", "expert1")]}
    merge(average, tmp_path / "out")
    assert theirs.read_text() == '{"kind": "records"}'


def test_materialising_leaves_a_sibling_alone(emr_merged, tmp_path):
    """`task.2` is being written while `task` appears."""
    with appearing(tmp_path / "task.2") as busy:
        materialize(emr_merged, 0, tmp_path / "task")
        assert busy.is_dir()


def test_materialising_is_all_or_nothing(emr_merged, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def failing(self, error=error):
            raise error

        monkeypatch.setattr(emr_models.TensorWriter, "finalize", failing)
        with pytest.raises((KeyboardInterrupt, PaveError)) as caught:
            materialize(emr_merged, 0, tmp_path / "task")
        assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in str(caught.value)


def test_merges_without_masks_and_unknown_tasks(emr_trio, emr_merged, tmp_path):
    refused("has no task masks", task_tensors, emr_trio("llama")["base"], 0)
    refused("no model folder", load_task_model, tmp_path / "nowhere", 0)
    refused("can be reached", load_task_model, "nobody/nothing", 0)
    refused("0 (expert0), 1 (expert1)", load_task_model, emr_merged, "expert3")
    refused("no task called '3'", load_task_model, emr_merged, 3)
    refused("no task called '-1'", load_task_model, emr_merged, -1)
    refused("rescaler must be one of", load_task_model, emr_merged, 0, rescaler="mean")


def test_models_of_one_name_go_by_number(emr_copy):
    manifest = json.loads((emr_copy / MANIFEST).read_text())
    (emr_copy / MANIFEST).write_text(json.dumps({**manifest, "tasks": ["a/x", "b/x", "0"]}))
    masks = TaskMasks(emr_copy)
    assert [masks.task(name) for name in ("a/x", "b/x", "0", 0, 1, "2")] == [0, 1, 2, 0, 1, 2]
    refused("Several tasks are called 'x'", masks.task, "x")


def test_settings_of_a_stranger(emr_trio, emr_copy, tmp_path):
    """A base on this machine, and a link to a file of it."""
    base = {"base": str(emr_trio("llama")["base"])}
    manifest = json.loads((emr_copy / MANIFEST).read_text())
    here = {**manifest, "base": {"id": "x", "hub": str(tmp_path / "model")}}
    (emr_copy / MANIFEST).write_text(json.dumps(here))
    (emr_copy / "mergekit_config.yml").rename(tmp_path / "mergekit_config.yml")
    refused("name its folder with --base", materialize, emr_copy, 0, tmp_path / "out")
    (emr_copy / MANIFEST).write_text(json.dumps(manifest))
    (emr_copy / "tokenizer.json").rename(tmp_path / "secret")
    (emr_copy / "tokenizer.json").symlink_to(tmp_path / "secret")
    words = "tokenizer.json leads out of the folder"
    refused(words, materialize, emr_copy, 0, tmp_path / "out", **base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"hidden_size": ["x"]}, {"eos_token_id": {}}])
def test_settings_that_no_class_takes(emr_trio, emr_copy, change, monkeypatch):
    own = emr_models._write_companions

    def damaged(folder, task, out):
        own(folder, task, out)
        for name in ("config.json", "generation_config.json"):
            values = json.loads((out / name).read_text())
            (out / name).write_text(json.dumps({**values, **change}))

    monkeypatch.setattr(emr_models, "_write_companions", damaged)
    refused("The settings of task 0 of", load_task_model, emr_copy, 0,
            base=str(emr_trio("llama")["base"]))


def test_another_base_is_refused(emr_trio, emr_merged, emr_copy, tmp_path):
    paths = emr_trio("llama")
    refused("is not the base of this merge, base (first difference: ", task_tensors, emr_merged, 0,
            base=str(paths["expert0"]))
    refused("There is no model folder", task_tensors, emr_merged, 0, base=str(tmp_path / "nowhere"))
    configuration = emr_copy / "mergekit_config.yml"
    configuration.write_text(configuration.read_text().replace(str(paths["base"]), "base"))
    refused("name its folder with --base", task_tensors, emr_copy, 0)
    configuration.unlink()
    refused("name its folder with --base", task_tensors, emr_copy, 0)
    assert equal(dict(task_tensors(emr_copy, 0, base=str(paths["base"]))),
                 dict(task_tensors(emr_merged, 0)))
    assert not (tmp_path / "task").exists()


def test_damaged_files(emr_copy, emr_merged):
    (file,) = (emr_copy / "emr").glob("masks-*")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused("are damaged (masks-00000.safetensors: wrong checksum", task_tensors, emr_copy, 2)
    file.write_bytes(good[:-100])
    refused("are damaged (masks-00000.safetensors: ", task_tensors, emr_copy, 0)
    file.unlink()
    refused("are damaged (masks-00000.safetensors: ", task_tensors, emr_copy, 0)
    file.write_bytes(good)
    text = (emr_copy / MANIFEST).read_text()
    for bad in (text[:-9], "[]", "{}", text.replace('"shape"', '"form"')):
        (emr_copy / MANIFEST).write_text(bad)
        refused("damaged", task_tensors, emr_copy, 0)
    for new in ('"../emr/masks-', '"other/masks-'):
        (emr_copy / MANIFEST).write_text(text.replace('"masks-', new))
        refused("damaged", task_tensors, emr_copy, 0)
    for key, value in (("dtype", "load"), ("own", [1.0])):
        manifest = json.loads(text)
        next(iter(manifest["tensors"].values()))[key] = value
        (emr_copy / MANIFEST).write_text(json.dumps(manifest))
        refused("damaged", task_tensors, emr_copy, 0)
    for value in ("floaty", "int3", 32, ["float32"]):
        (emr_copy / MANIFEST).write_text(json.dumps({**json.loads(text), "dtype": value}))
        refused(f"task masks in {emr_copy / 'emr'} are damaged (manifest.json: ",
                load_task_model, emr_copy, 0)
    manifest = json.loads(text)
    next(iter(manifest["tensors"].values()))["dtype"] = "quint8"
    (emr_copy / MANIFEST).write_text(json.dumps(manifest))
    refused("are damaged (manifest.json: ", task_tensors, emr_copy, 0)
    (emr_copy / MANIFEST).write_text(text.replace('"format": 3', '"format": 1'))
    refused("has format 1", task_tensors, emr_copy, 0)
    (emr_copy / MANIFEST).write_text(text)
    assert equal(dict(task_tensors(emr_copy, 0)), dict(task_tensors(emr_merged, 0)))
    shard = sorted(emr_copy.glob("model-*.safetensors"))[0]
    whole = load_file(shard)
    save_file({name: t[:1].clone() for name, t in whole.items()}, shard)
    refused("has another shape than its task masks", task_tensors, emr_copy, 0)
    shard.unlink()
    refused("is missing, which", task_tensors, emr_copy, 0)


def test_configurations_that_cannot_be(emr_trio, tmp_path):
    paths = emr_trio("llama")
    config = emr_config(paths, parameters={"rescaler": "mean"})
    refused("must be one of tensor_mean, global; got 'mean'", merge, config, tmp_path / "a")
    config["parameters"] = {"rescaler": [{"filter": "mlp", "value": "global"},
                                         {"value": "tensor_mean"}]}
    refused("rescaler must be one value", merge, config, tmp_path / "b")
    config = emr_config(paths)
    sources = [{**m, "layer_range": [0, 2]} for m in config.pop("models")]
    config["slices"] = [{"sources": sources, "base_model": str(paths["expert0"])}]
    refused("remove the base_model of the slice", merge, config, tmp_path / "c")
    broken = tmp_path / "broken"
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"])
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    refused("model.norm.weight of", merge, emr_config({**paths, "expert0": broken}), tmp_path / "d")
    for out in "abcd":
        assert not (tmp_path / out / "emr").exists()
