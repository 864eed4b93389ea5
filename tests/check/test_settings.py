"""Settings and habits of a fine-tune that its merge will not have are warned about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import recipe

from mergekit_pave import plugin
from mergekit_pave.check import check
from mergekit_pave.check.settings import check_settings
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.recipe import Recipe

plugin.register()
METHODS = ["tsv_m", "regmean", "tsv_regmean", "matched_regmean", "pave_ties",
           "pave_task_arithmetic", "emr"]


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


def warnings(paths: dict[str, Path], method: str = "regmean", **top) -> list[str]:
    raw = {"merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
           "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)], **top}
    recipe = Recipe.of(yaml.safe_load(yaml.safe_dump(raw)))
    return [str(finding) for finding in check_settings(recipe, LoaderOptions())]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "roberta", "gpt2", "t5", "bert", "vit"])
def test_alike_models_give_no_warning(families, kind, method):
    assert warnings(families(kind), method) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind, change, named", [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
     "rope_parameters.rope_theta 1000000.0, the base 10000.0"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
     "rope_parameters.factor 4.0, the base none; rope_parameters.rope_type linear, the base"),
    ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05, the base 1e-06"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act gelu, the base silu"),
    ("llama", {"max_position_embeddings": 128}, "max_position_embeddings 128, the base 64"),
    ("roberta", {"layer_norm_eps": 0.5}, "layer_norm_eps 0.5, the base 1e-12"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False, the base True"),
    ("t5", {"layer_norm_epsilon": 0.1}, "layer_norm_epsilon 0.1, the base 1e-06"),
    ("vit", {"hidden_act": "relu"}, "hidden_act relu, the base gelu"),
])
def test_other_settings_than_the_base(family, method, kind, change, named):
    paths = family(kind)
    edit(paths["expert1"] / "config.json", **change)
    (warning,) = warnings(paths, method)
    assert warning.startswith(f"models[1]: {paths['expert1']}") and named in warning
    fate = "only this task's model keeps them" if method == "emr" else "the merge has the base's"
    assert fate in warning


@pytest.mark.parametrize("change", [
    {"attention_dropout": 0.3}, {"initializer_range": 0.5}, {"use_cache": False},
    {"transformers_version": "4.0"}, {"unsloth_version": "1"}, {"dtype": "bfloat16"},
    {"_name_or_path": "/x"}, {"pretraining_tp": 2}])
def test_what_changes_no_output_is_not_warned_about(family, change):
    paths = family("llama")
    edit(paths["expert0"] / "config.json", **change)
    assert warnings(paths) == []


def test_other_labels(family):
    paths = family("roberta")
    names = {"0": "no", "1": "yes", "2": "maybe"}
    edit(paths["expert0"] / "config.json", id2label=names,
         label2id={value: int(key) for key, value in names.items()})
    (warning,) = warnings(paths)
    assert "id2label {0: 'no', 1: 'yes', 2: 'maybe'}, the base {0: 'LABEL_0'" in warning
    assert warnings(paths, "emr") == []  # each task keeps its own


@pytest.mark.parametrize("file, change, named", [
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "eos_token '<|im_end|>', there '</s>'"),
    ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "a chat template, there none"),
    ("generation_config.json", {"eos_token_id": [2, 7]},
     "generation settings eos_token_id [2, 7], there 2"),
    ("generation_config.json", {"temperature": 0.6}, "temperature 0.6, there none"),
])
def test_other_habits_than_the_output(family, file, change, named):
    paths = family("llama")
    edit(paths["expert0"] / file, **change)
    (warning,) = warnings(paths)
    assert named in warning and f"from {paths['base']}" in warning
    assert warnings(paths, "emr") == []
    # Where the output takes them from that model, the other one is the odd one.
    others = warnings(paths, tokenizer={"source": str(paths["expert0"])})
    assert not any(warning.startswith("models[0]") for warning in others)
    assert len(others) == ("eos_token '" in named)


def test_a_template_of_its_own_settles_the_template(family):
    paths = family("llama")
    (paths["expert0"] / "chat_template.jinja").write_text("{{ messages }}")
    assert "a chat template, there none" in warnings(paths)[0]
    assert warnings(paths, chat_template="auto") == []
    (paths["base"] / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert "a chat template, there another" in warnings(paths)[0]


def test_the_whole_check_says_so(family, texts):
    paths = family("llama")
    edit(paths["expert0"] / "config.json", rms_norm_eps=0.5)
    found = check(recipe(paths, texts), LoaderOptions())
    assert [f.level for f in found] == ["warning"] and "rms_norm_eps" in str(found[0])
