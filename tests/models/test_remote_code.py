"""A model whose code comes with it: used where the user says so, and nowhere else."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import make_family, merge, recipe

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.tasks.emr import load_task_model, task_tensors

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = make_family(tmp_path, "llama")
    for folder in made.values():
        (folder / "own.py").write_text(CODE)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own", "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own.OwnConfig",
                         "AutoModelForCausalLM": "own.OwnForCausalLM"},
        }
        (folder / "config.json").write_text(json.dumps(config))
    return made


def test_it_runs_where_it_is_trusted(paths, texts, tmp_path, families):
    main(["calibrate", str(paths["expert0"]), "--dataset", str(texts[0]), "-o",
          str(tmp_path / "store"), "--trust-remote-code"], standalone_mode=False)
    assert (tmp_path / "store" / "manifest.json").exists()
    config = recipe(paths, texts) | {"dtype": "float32"}
    found = merge(config, tmp_path / "out", trust_remote_code=True)
    plain = merge(recipe(families("llama"), texts) | {"dtype": "float32"}, tmp_path / "plain")
    # The same weights under the class that transformers knows.
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_task_model_is_of_its_class(paths, tmp_path):
    models = [{"model": str(paths[f"expert{i}"])} for i in range(2)]
    merge({"merge_method": "emr", "base_model": str(paths["base"]), "models": models,
           "dtype": "float32"}, tmp_path / "out", trust_remote_code=True)
    (tmp_path / "out" / "own.py").write_text(CODE)
    where = {"base": str(paths["base"])}
    model = load_task_model(tmp_path / "out", "expert1", trust_remote_code=True, **where)
    assert type(model).__name__ == "OwnForCausalLM"
    expected = dict(task_tensors(tmp_path / "out", "expert1", **where,
                                 options=LoaderOptions(trust_remote_code=True)))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_untrusted_it_is_refused_with_the_flag_to_add(paths, texts, tmp_path):
    with pytest.raises(PaveError, match="code of its own repository.*--trust-remote-code"):
        merge(recipe(paths, texts), tmp_path / "out")
    with pytest.raises(PaveError, match="code of its own repository.*--trust-remote-code"):
        main(["calibrate", str(paths["expert0"]), "--dataset", str(texts[0]), "-o",
              str(tmp_path / "store")], standalone_mode=False)
    assert not (tmp_path / "modules").exists()
