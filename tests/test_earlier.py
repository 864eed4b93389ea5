"""Merging into a folder that holds an earlier merge."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import transformers
import yaml
from conftest import make_family
from test_emr import config_of
from test_merge import merge, tensors_of

from mergekit_pave.algebra.emr import elect
from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import check_finished
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
    config, out = config_of(paths, "tsv_m"), tmp_path / "out"
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
    merge(config_of(paths), out, **CARD, out_shard_size=60_000)
    merge(config_of(paths, out_dtype="bfloat16"), out, **CARD)
    found = dict(task_tensors(out, 0, base=base))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_weights_that_no_merge_wrote_stay(paths, tmp_path, caplog):
    out = shutil.copytree(paths["base"], tmp_path / "out")
    with caplog.at_level(logging.WARNING, "mergekit_pave"):
        merge(config_of(paths, "tsv_m"), out, **CARD, out_shard_size=60_000)
    assert (out / "model.safetensors").exists()
    assert "that this merge has not written (model.safetensors): delete them" in caplog.text
    with pytest.raises(PaveError, match="weights of two merges .*merge again into an empty folder"):
        check_finished(out)


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
def test_a_merge_that_writes_nothing_takes_nothing_away(paths, tmp_path, method, monkeypatch):
    out, base = tmp_path / "out", str(paths["base"])
    merge(config_of(paths), out, **CARD)
    (out / "emr" / "notes.txt").write_text("mine")
    report = (out / "pave_report.json").read_bytes()
    expected = dict(task_tensors(out, 1, base=base))
    gone = shutil.copytree(paths["expert0"], tmp_path / "gone")
    config = config_of({**paths, "expert0": gone}, method, **(WEIGHT if method != "emr" else {}))
    if method == "emr":
        from mergekit_pave import check
        monkeypatch.setattr(check, "preflight", lambda *_: [])  # met later than the check
    (gone / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(Exception, match="header"):
        merge(config, out, **CARD)
    found = dict(task_tensors(out, 1, base=base))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (out / "pave_report.json").read_bytes() == report
    assert not list(out.glob(".*"))
    merge(config_of(paths, "task_arithmetic", **WEIGHT), out, **CARD)
    assert [file.name for file in (out / "emr").iterdir()] == ["notes.txt"]
    assert not (out / "pave_report.json").exists()


def test_a_merge_that_has_begun_to_write_takes_the_masks_away(paths, tmp_path, monkeypatch):
    from mergekit_pave.methods import emr

    out, calls = tmp_path / "out", []
    merge(config_of(paths), out, **CARD, out_shard_size=20_000)

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return elect(*arguments)

    monkeypatch.setattr(emr, "elect", failing)
    with pytest.raises(KeyboardInterrupt):
        merge(config_of(paths), out, **CARD, out_shard_size=20_000)
    assert list(out.glob("model-?.safetensors")), "nothing was written before the failure"
    assert not (out / "emr").exists() and not (out / "pave_report.json").exists()
    with pytest.raises(PaveError, match="has no task masks"):
        TaskMasks(out)


def test_the_folder_of_an_input_is_refused(paths, tmp_path):
    base = shutil.copytree(paths["base"], tmp_path / "base")
    before = tensors_of(base)
    (tmp_path / "link").symlink_to(base)
    config = yaml.safe_load(yaml.safe_dump(config_of({**paths, "base": base}, "tsv_m")))
    with pytest.raises(PaveError, match="link is the folder of .*base, which is to be merged"):
        merge(config, tmp_path / "link", **CARD)
    after = tensors_of(base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
