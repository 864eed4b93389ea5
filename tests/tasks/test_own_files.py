"""A task's model of an EMR merge is the task's: its config, its tokenizer, its end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import emr_config, make_family, merge

from mergekit_pave import plugin
from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions
from mergekit_pave.storage.masks import TaskMasks
from mergekit_pave.tasks.emr import load_task_model, materialize, task_tensors

plugin.register()
IDS = torch.tensor([[1, 9, 17, 25, 33, 41, 2]])
LABELS = ["no", "yes", "maybe"]


@pytest.fixture
def family(families, tmp_path):
    """`family(kind)` -> copies of a base and two fine-tunes, to be changed."""

    def get(kind: str) -> dict[str, Path]:
        for name, path in families(kind).items():
            shutil.copytree(path, tmp_path / kind / name)
        return {name: tmp_path / kind / name for name in families(kind)}

    return get


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def both(paths: dict, out: Path, task: int, folder: Path) -> list[transformers.PreTrainedModel]:
    """One task's model, from memory and from the folder that `materialize` writes."""
    materialize(out, task, folder, base=str(paths["base"]))
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    base = str(paths["base"])
    return [load_task_model(out, task, base=base).eval(), cls.from_pretrained(folder).eval()]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
@pytest.mark.parametrize("kind, change", [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rms_norm_eps": 0.5, "hidden_act": "gelu"}),
    ("roberta", {"layer_norm_eps": 0.5}),
    ("roberta", {"id2label": dict(enumerate(LABELS)),
                 "label2id": {label: i for i, label in enumerate(LABELS)}}),
    ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    ("bert", {"hidden_act": "relu"}),
])
def test_a_tasks_model_has_the_settings_of_its_fine_tune(family, tmp_path, kind, change, method):
    paths = family(kind)
    edit(paths["expert1"] / "config.json", **change)
    extra = {"parameters": {"rank_ratio": 1.0}} if method == "pave_emr" else {}
    merge(emr_config(paths, method, **extra), tmp_path / "out")
    for task in range(2):
        expert = transformers.AutoConfig.from_pretrained(paths[f"expert{task}"])
        cls = getattr(transformers, expert.architectures[0])
        state = dict(task_tensors(tmp_path / "out", task, base=str(paths["base"])))
        expected = cls.from_pretrained(None, config=expert, state_dict=state).eval()
        for model in both(paths, tmp_path / "out", task, tmp_path / f"task{task}"):
            torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)
            assert model.config.id2label == expert.id2label
    differ = [name for name in change if name not in ("id2label", "label2id")]
    if differ:  # and the base's settings would have given other logits
        base = transformers.AutoConfig.from_pretrained(paths["base"])
        other = cls.from_pretrained(None, config=base, state_dict=state).eval()
        assert not torch.allclose(logits(other), logits(expected))


def test_what_lies_beside_the_weights_is_the_tasks(family, tmp_path):
    paths, out = family("llama"), tmp_path / "out"
    edit(paths["expert0"] / "tokenizer_config.json", eos_token="w3", chat_template="{{ messages }}")
    (paths["expert1"] / "chat_template.jinja").write_text("{{ messages[0] }}")
    edit(paths["expert1"] / "generation_config.json", eos_token_id=[2, 7], temperature=0.5,
         do_sample=True)
    merge(emr_config(paths), out, copy_tokenizer=True)
    for task in range(2):
        model, _ = both(paths, out, task, tmp_path / f"task{task}")
        mine, own = companions(tmp_path / f"task{task}"), companions(paths[f"expert{task}"])
        assert mine.keys() == own.keys()
        for name in mine.keys() - {"config.json", "tokenizer_config.json"}:
            assert mine[name].read_bytes() == own[name].read_bytes()
        read = [transformers.AutoTokenizer.from_pretrained(path)
                for path in (tmp_path / f"task{task}", paths[f"expert{task}"])]
        assert read[0].eos_token == read[1].eos_token
        assert read[0].chat_template == read[1].chat_template
        wanted = transformers.GenerationConfig.from_pretrained(paths[f"expert{task}"])
        assert model.generation_config.eos_token_id == wanted.eos_token_id
        assert model.generation_config.temperature == wanted.temperature


def test_files_that_are_the_merged_models_are_not_kept_again(families, tmp_path):
    merge(emr_config(families("llama")), tmp_path / "out", copy_tokenizer=True)
    masks = TaskMasks(tmp_path / "out")
    for task in range(2):
        kept = masks.companions(task)
        assert kept["tokenizer.json"] is None and "config.json" in kept


def test_the_tensors_of_the_merge_decide_dtype_and_layers(families, tmp_path):
    paths = families("llama")
    config = emr_config(paths) | {"dtype": "bfloat16"}
    merge(config, tmp_path / "out")
    for model in both(paths, tmp_path / "out", 0, tmp_path / "task"):
        assert str(model.config.dtype) == "torch.bfloat16"
    pieces = [{"sources": [{"model": str(paths[name]), "layer_range": [0, 1]}
                           for name in ("base", "expert0", "expert1")]}] * 3
    del config["models"]
    merge(config | {"slices": pieces}, tmp_path / "three")
    for model in both(paths, tmp_path / "three", 1, tmp_path / "tall"):
        assert model.config.num_hidden_layers == 3 and torch.isfinite(logits(model)).all()


def test_a_new_vocabulary_brings_its_tokenizer(family, tmp_path):
    paths = family("llama")
    edit(paths["expert0"] / "config.json", rms_norm_eps=0.5, eos_token_id=7)
    edit(paths["expert0"] / "generation_config.json", eos_token_id=7)
    merge(emr_config(paths) | {"tokenizer": {"source": "union"}}, tmp_path / "out")
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for model in both(paths, tmp_path / "out", 0, tmp_path / "task"):
        assert model.config.vocab_size == merged.vocab_size
        assert model.config.eos_token_id == merged.eos_token_id
        assert model.config.rms_norm_eps == 0.5 and torch.isfinite(logits(model)).all()
    there = tmp_path / "out" / "tokenizer.json"
    assert (tmp_path / "task" / "tokenizer.json").read_bytes() == there.read_bytes()
    assert not (tmp_path / "task" / "generation_config.json").exists()


def test_no_path_of_this_machine_is_kept(tmp_path):
    paths = make_family(tmp_path / "secret", "llama")
    edit(paths["expert0"] / "config.json", _name_or_path=str(tmp_path / "secret" / "x"))
    edit(paths["expert0"] / "tokenizer_config.json", name_or_path=str(tmp_path / "secret" / "x"))
    merge(emr_config(paths), tmp_path / "out")
    for path in (tmp_path / "out" / "emr").iterdir():
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "../x.json", "a/b.json", "", ".hidden.json"])
def test_a_strangers_manifest_writes_no_other_files(families, tmp_path, name):
    out = tmp_path / "out"
    merge(emr_config(families("llama")), out)
    manifest = json.loads((out / "emr" / "manifest.json").read_text())
    manifest["companions"][0].append(name)
    (out / "emr" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PaveError):
        materialize(out, 0, tmp_path / "task", base=str(families("llama")["base"]))
    assert not (tmp_path / "task").exists() and not (tmp_path / "x.json").exists()
