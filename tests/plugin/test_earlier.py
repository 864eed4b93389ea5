"""Merging into a folder that holds an earlier merge."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time

import mergekit.merge
import pytest
import torch
import transformers
import yaml
from helpers import emr_config, make_family, merge, tensors_of
from mergekit.config import MergeConfiguration
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions

from mergekit_pave.errors import PaveError
from mergekit_pave.models.headers import check_finished
from mergekit_pave.plugin import output
from mergekit_pave.storage.masks import TaskMasks
from mergekit_pave.tasks.emr import task_tensors


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def _loads_what_was_merged(out, expected):
    found = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


WEIGHT = {"parameters": {"weight": 1.0}}
CARD = {"write_model_card": True}


@pytest.mark.parametrize("first", [{"out_shard_size": 60_000}, {}, {"safe_serialization": False}])
@pytest.mark.parametrize("second", [{"out_shard_size": 60_000}, {"out_shard_size": 30_000}, {}])
def test_no_weights_of_the_earlier_merge_are_left(paths, tmp_path, first, second):
    config, out = emr_config(paths, "tsv_m"), tmp_path / "out"
    merge({**config, "parameters": {"lambda": 5.0}}, out, **CARD, **first)
    (out / "notes.bin").touch()
    expected = merge(config, tmp_path / "fresh", **CARD, **second)
    merge(config, out, **CARD, **second)
    names = {file.name for file in (tmp_path / "fresh").iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"notes.bin"}
    assert _loads_what_was_merged(out, expected)
    check_finished(out)


def test_task_models_are_those_of_the_last_merge(paths, tmp_path):
    out, base = tmp_path / "out", str(paths["base"])
    merge(emr_config(paths), out, **CARD, out_shard_size=60_000)
    merge(emr_config(paths, out_dtype="bfloat16"), out, **CARD)
    found = dict(task_tensors(out, 0, base=base))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_weights_that_no_merge_wrote_stay(paths, tmp_path, caplog):
    out = shutil.copytree(paths["base"], tmp_path / "out")
    with caplog.at_level(logging.WARNING, "mergekit_pave"):
        merge(emr_config(paths, "tsv_m"), out, **CARD, out_shard_size=60_000)
    assert (out / "model.safetensors").exists()
    assert "that this merge has not written (model.safetensors): delete them" in caplog.text
    with pytest.raises(PaveError, match="weights of two merges .*merge again into an empty folder"):
        check_finished(out)


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_a_merge_that_writes_nothing_takes_nothing_away(paths, tmp_path, method, monkeypatch):
    out, base = tmp_path / "out", str(paths["base"])
    merge(emr_config(paths), out, **CARD)
    (out / "emr" / "notes.txt").write_text("mine")
    report = (out / "pave_report.json").read_bytes()
    expected = dict(task_tensors(out, 1, base=base))
    gone = shutil.copytree(paths["expert0"], tmp_path / "gone")
    config = emr_config({**paths, "expert0": gone}, method, **(WEIGHT if method != "emr" else {}))
    if method == "emr":
        from mergekit_pave import check
        from mergekit_pave.plugin import run_merge

        monkeypatch.setattr(check, "preflight", lambda *_: [])  # met later than the check
        monkeypatch.setattr(run_merge, "architecture", lambda *_: None)
    (gone / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(Exception, match="header"):
        merge(config, out, **CARD)
    found = dict(task_tensors(out, 1, base=base))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (out / "pave_report.json").read_bytes() == report
    assert not list(out.glob(".*"))
    merge(emr_config(paths, "task_arithmetic", **WEIGHT), out, **CARD)
    assert [file.name for file in (out / "emr").iterdir()] == ["notes.txt"]
    assert not (out / "pave_report.json").exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "emr", "tsv_m"])
def test_an_earlier_merge_is_whole_until_the_new_one_is(paths, tmp_path, monkeypatch, method):
    out, writes = tmp_path / "out", []
    merge(emr_config(paths), out, **CARD, out_shard_size=20_000)
    (out / "notes.txt").write_text("mine")
    before = {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    write = TensorWriter._write_shard_task

    def failing(*args, **kwargs):
        writes.append(1)
        if len(writes) == 4:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(TensorWriter, "_write_shard_task", failing)
    config = emr_config(paths, method, **(WEIGHT if method == "task_arithmetic" else {}))
    with pytest.raises(KeyboardInterrupt):
        merge(config, out, **CARD, out_shard_size=20_000)
    assert len(writes) == 4, "nothing was written before the failure"
    assert before == {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def test_what_an_earlier_merge_wrote_beside_its_weights_goes_with_it(paths, tmp_path):
    out = tmp_path / "out"
    merge(emr_config(paths), out, **CARD)
    (out / "notes.txt").write_text("mine")
    (out / "special_tokens_map.json").write_text("{}")  # of another base's tokenizer
    merge(emr_config(paths, "tsv_m"), out, write_model_card=False)
    merge(emr_config(paths, "tsv_m"), tmp_path / "fresh", write_model_card=False)
    names = {file.name for file in (tmp_path / "fresh").iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"notes.txt"}
    assert "README.md" not in names


def test_a_folder_that_is_no_merge_keeps_its_files(paths, tmp_path):
    out = tmp_path / "out"
    mine = ("notes.txt", ".manifest.json.1.tmp", "emr/manifest.json",
            "emr/masks-00000.safetensors", ".mergekit-pave-0/note")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("mine")
    merge(emr_config(paths, "tsv_m"), out, **CARD)
    merge(emr_config(paths, "task_arithmetic", **WEIGHT), out, **CARD)
    assert all((out / name).read_text() == "mine" for name in mine)


MINE = ("train.py", "lid.model", "notes.jinja", "rows_tokenizer.json", "rows.jsonl", "x.tmp",
        "model-2.bin", "model-1-of-2.safetensors", "adapter_config.json", ".offload-1/x",
        "covariance-00000.safetensors.part", "1_Pooling/rows.jsonl", "emr/notes.txt")


@pytest.mark.parametrize("method", ["tsv_m", "task_arithmetic", "emr"])
def test_files_that_look_like_a_merges_own_stay(paths, tmp_path, method):
    out = tmp_path / "out"
    merge(emr_config(paths), out, **CARD)
    for name in MINE:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "modules.json").write_text('[{"path": "1_Pooling"}]')
    config = emr_config(paths, method, **(WEIGHT if method == "task_arithmetic" else {}))
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config), str(out), MergeOptions(**CARD, quiet=True))
    assert all((out / name).read_text() == "mine" for name in MINE)


@pytest.mark.parametrize("method", ["tsv_m", "task_arithmetic", "emr"])
def test_masks_of_another_merge_behind_a_link_stay(paths, tmp_path, method):
    merge(emr_config(paths), tmp_path / "other", **CARD)
    before = sorted((tmp_path / "other" / "emr").iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "emr").symlink_to(tmp_path / "other" / "emr")
    config = emr_config(paths, method, **(WEIGHT if method == "task_arithmetic" else {}))
    with pytest.raises(PaveError, match="is a link to the task masks|which is no folder"):
        merge(config, tmp_path / "out", **CARD)
    assert sorted((tmp_path / "other" / "emr").iterdir()) == before and TaskMasks(
        tmp_path / "other")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "emr"])
def test_what_is_in_the_way_is_named_before_anything_is_removed(paths, tmp_path, name):
    out = tmp_path / "out"
    merge(emr_config(paths, "tsv_m"), out, **CARD)
    if name == "emr":
        (out / name).write_text("mine")
    else:
        (out / name).unlink()
        (out / name).mkdir()
    before = sorted(out.rglob("*"))
    with pytest.raises(PaveError, match=f"{name} is in the way|emr, which is no folder"):
        merge(emr_config(paths), out, **CARD)
    assert sorted(out.rglob("*")) == before


def test_two_merges_into_one_folder_are_not_mixed(paths, tmp_path, monkeypatch):
    """Both end at the same time; files of one do not replace some of the other's."""
    out, meet = tmp_path / "out", threading.Barrier(2)
    configs = [emr_config(paths, "tsv_m", parameters={"lambda": x}) for x in (1.0, 9.0)]
    wholes = [merge(config, tmp_path / str(i), **CARD, out_shard_size=20_000)
              for i, config in enumerate(configs)]
    alone, replace = output.alone_in, os.replace

    def together(folder):
        meet.wait(60)
        return alone(folder)

    def slowly(*names):
        time.sleep(0.02)
        replace(*names)

    monkeypatch.setattr(output, "alone_in", together)
    monkeypatch.setattr(output.os, "replace", slowly)
    threads = [threading.Thread(target=merge, args=(config, out),
                                kwargs={**CARD, "out_shard_size": 20_000}) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = tensors_of(out)
    assert any(all(torch.equal(found[name], whole[name]) for name in whole) for whole in wholes)
    check_finished(out)


@pytest.mark.parametrize("name", ["manifest.json", "masks-00000.safetensors"])
def test_masks_do_not_replace_files_of_the_user(paths, tmp_path, name):
    theirs = tmp_path / "out" / "emr" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"kind": "mine"}')
    (theirs.parent / "notes.txt").write_text("mine")
    with pytest.raises(PaveError, match=f"holds {name}, and no merge has written that"):
        merge(emr_config(paths, "emr"), tmp_path / "out", **CARD)
    assert theirs.read_text() == '{"kind": "mine"}'
    theirs.unlink()
    merge(emr_config(paths, "emr"), tmp_path / "out", **CARD)
    merge(emr_config(paths, "emr"), tmp_path / "out", **CARD)  # over its own
    assert (theirs.parent / "notes.txt").read_text() == "mine"
    assert TaskMasks(tmp_path / "out").tasks


def test_the_folder_of_an_input_is_refused(paths, tmp_path):
    base = shutil.copytree(paths["base"], tmp_path / "base")
    before = tensors_of(base)
    (tmp_path / "link").symlink_to(base)
    config = yaml.safe_load(yaml.safe_dump(emr_config({**paths, "base": base}, "tsv_m")))
    with pytest.raises(PaveError, match="link is the folder of .*base, which is to be merged"):
        merge(config, tmp_path / "link", **CARD)
    after = tensors_of(base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
