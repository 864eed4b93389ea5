"""Task models of an EMR merge: materialised, chosen, published, loaded elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers import emr_config, merge, tensors_of
from helpers.emr import MANIFEST, equal, experts_of, papers_models
from mergekit.common import ModelReference

from mergekit_pave import cli
from mergekit_pave.publish import hub
from mergekit_pave.tasks import emr as emr_models
from mergekit_pave.tasks.emr import load_task_model, materialize, task_tensors


def test_a_materialised_task_is_an_ordinary_model(emr_trio, emr_merged, tmp_path):
    materialize(emr_merged, "expert2", tmp_path / "task")
    files = {file.name for file in (tmp_path / "task").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}
    expected = dict(task_tensors(emr_merged, "expert2"))
    assert equal(tensors_of(tmp_path / "task"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "task")
    loaded = load_task_model(emr_merged, "expert2")
    assert equal(model.state_dict(), loaded.state_dict())
    assert not equal(model.state_dict(), load_task_model(emr_merged, "expert0").state_dict())
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "task")("w1 w2",
                                                                        return_tensors="pt")
    ids = text["input_ids"]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id == 2
    half = load_task_model(emr_merged, "expert2", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_the_rescaler_can_be_chosen_afterwards(emr_trio, emr_merged, tmp_path):
    paths = emr_trio("llama")
    merge(emr_config(paths, parameters={"rescaler": "global"}), tmp_path / "out")
    base = str(paths["base"])
    at_merge = dict(task_tensors(tmp_path / "out", 0, base=base))
    assert equal(at_merge, dict(task_tensors(emr_merged, 0, rescaler="global")))
    assert equal(dict(task_tensors(tmp_path / "out", 0, base=base, rescaler="tensor_mean")),
                 dict(task_tensors(emr_merged, 0)))
    expected = papers_models(tensors_of(paths["base"]), experts_of(paths), "global")[0]
    for name in at_merge:
        np.testing.assert_allclose(at_merge[name].numpy(), expected[name], atol=1e-5)


def test_the_command(emr_merged, tmp_path):
    def invoke(*arguments):
        result = CliRunner().invoke(cli.main, ["materialize", *map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    code, out, _ = invoke(emr_merged, "expert0", tmp_path / "task", "--rescaler", "global")
    assert code == 0 and out == f"{tmp_path / 'task'}: the model of expert0.\n"
    expected = dict(task_tensors(emr_merged, 0, rescaler="global"))
    assert equal(tensors_of(tmp_path / "task"), expected)
    code, out, err = invoke(emr_merged, "icd", tmp_path / "other")
    assert code == 1 and not out and err.count("\n") == 1
    assert "no task called 'icd'" in err and "0 (expert0), 1 (expert1), 2 (expert2)" in err
    code, _, err = invoke(emr_merged, "0", tmp_path / "task")
    assert code == 1 and "exists already" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["task"]


def test_only_public_names_are_written(emr_merged, emr_trio):
    text = (emr_merged / MANIFEST).read_text()
    assert str(emr_trio("llama")["base"].parent) not in text and str(Path.home()) not in text
    assert json.loads(text)["base"] == {"id": "base", "hub": None}
    for file in (emr_merged / "emr").glob("masks-*"):
        assert str(emr_trio("llama")["base"].parent).encode() not in file.read_bytes()


def test_a_push_takes_the_masks_along(emr_merged):
    files = [str(file.relative_to(emr_merged)) for file in emr_merged.rglob("*") if file.is_file()]
    assert set(hub.merge_files(emr_merged)) == set(files) and str(MANIFEST) in files


def test_a_published_merge_names_its_base(emr_merged, emr_trio, monkeypatch, tmp_path, emr_copy):
    """Merge and base by their Hub ids, as someone else would use them."""
    manifest = json.loads((emr_copy / MANIFEST).read_text())
    manifest["base"] = {"id": "org/base", "hub": "org/base"}
    (emr_copy / MANIFEST).write_text(json.dumps(manifest))
    (emr_copy / "mergekit_config.yml").unlink()
    monkeypatch.setattr(emr_models, "snapshot_download", lambda *a, **k: str(emr_copy))
    monkeypatch.setattr(emr_models, "read_config", lambda *a: None)
    base = str(emr_trio("llama")["base"])
    monkeypatch.setattr(ModelReference, "local_path", lambda *a, **k: base)
    assert equal(dict(task_tensors("me/merged", 1)), dict(task_tensors(emr_merged, 1)))


@pytest.mark.parametrize("given", [{}, {"trust_remote_code": True, "cache_dir": "elsewhere"}])
def test_where_and_how_the_base_is_loaded(emr_merged, emr_trio, monkeypatch, emr_copy, given):
    manifest = json.loads((emr_copy / MANIFEST).read_text())
    (emr_copy / MANIFEST).write_text(json.dumps({**manifest, "base": {"id": "x", "hub": "org/x"}}))
    seen, trusted, cache = [], given.get("trust_remote_code", False), given.get("cache_dir")
    expected = load_task_model(emr_merged, 1).state_dict()

    def fetched(*_, cache_dir, **more):
        seen.append(cache_dir)
        return str(emr_copy)

    def located(reference, cache_dir=None, **more):
        seen.append(cache_dir)
        assert str(reference) == "org/x@v2"
        return str(emr_trio("llama")["base"])

    def configured(repo, trust_remote_code, **more):
        assert trust_remote_code is trusted
        return real(repo, **more)

    real = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", configured)
    monkeypatch.setattr(emr_models, "snapshot_download", fetched)
    monkeypatch.setattr(ModelReference, "local_path", located)
    monkeypatch.setattr(
        emr_models, "read_config", lambda _, options: seen.append(options.trust_remote_code))
    model = load_task_model("me/merged", 1, base="org/x@v2", **given)
    assert equal(model.state_dict(), expected)
    assert seen == [cache, trusted, cache]
