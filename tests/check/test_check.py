"""What `check` says before anything is loaded, and what it must not complain about."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import errors, recipe, write_images
from mergekit.config import MergeConfiguration

from mergekit_pave.check import check, preflight
from mergekit_pave.check.models import Allowances
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions, ModelSource
from mergekit_pave.plugin import register
from mergekit_pave.recipe.reading import read_yaml
from mergekit_pave.recipe.spelling import looks_like_ours

register()
OPTIONS = LoaderOptions()


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch):
    """No weights are read and no forward pass is made."""

    def refuse(*args, **kwargs):
        raise AssertionError("check must not do this")

    monkeypatch.setattr("mergekit_pave.calibration.run.load_model", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(ModelSource, "tensors", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.fixture
def good(families, texts) -> dict:
    return recipe(families("llama"), texts)


def change(raw: dict, path: str, value) -> dict:
    """`raw` with one key set (or, for `...`, removed): `models.0.parameters.weight`."""
    raw = copy.deepcopy(raw)
    *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = raw
    for part in parts:
        place = place[part] if isinstance(place, list) else place.setdefault(part, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


# --- refused -------------------------------------------------------------------------------

MODEL = "models.0.parameters"
SHARED = "parameters"

BAD = [
    # the method
    ("merge_method", "pave-ties", ["'pave-ties'", "did you mean pave_ties?"]),
    ("merge_method", "pave_tie", ["'pave_tie'", "did you mean pave_ties?"]),
    ("merge_method", "ties", ["purified form is pave_ties"]),
    ("merge_method", "frankenmerge", ["pave_ties", "pave_task_arithmetic"]),
    ("merge_method", ..., ["merge_method is missing", "`merge_method: pave_ties`"]),
    ("base_model", ..., ["base_model: is missing", "`base_model: NAME`"]),
    # keys
    ("base_modl", "x", ["top level", "'base_modl'", "did you mean base_model?"]),
    ("normalize", True, ["top level", "'normalize'", "belongs under `parameters`"]),
    ("calibation_dataset", "x", ["top level", "did you mean calibration_dataset?",
                                 "belongs under `parameters`"]),
    ("models.0.weight", 1, ["models[0]", "'weight'", "belongs under `models[0].parameters`"]),
    ("models.0.wieght", 1, ["models[0]", "did you mean weight?", "`models[0].parameters`"]),
    ("models.1.paramters", {}, ["models[1]", "'paramters'", "did you mean parameters?"]),
    ("models.1.layer_range", [0, 2], ["models[1]", "'layer_range'", "`slices[].sources[]`"]),
    (f"{MODEL}.wieght", 1, ["models[0].parameters", "'wieght'", "did you mean weight?"]),
    (f"{MODEL}.calibation_dataset", "x", ["models[0].parameters",
                                          "did you mean calibration_dataset?"]),
    (f"{MODEL}.nsamples", 12, ["models[0].parameters",
                               "did you mean num_calibration_samples?"]),
    (f"{SHARED}.rank-ratio", 0.9, ["parameters", "'rank-ratio'", "did you mean rank_ratio?"]),
    (f"{SHARED}.t", 0.9, ["parameters", "'t'", "known:", "rank_ratio"]),
    (f"{MODEL}.rank_ratio", 0.9, ["models[0].parameters.rank_ratio", "whole merge",
                                  "top level `parameters`"]),
    (f"{MODEL}.normalize", True, ["models[0].parameters.normalize", "top level"]),
    ("dtype", "fp32", ["dtype: fp32 is no dtype", "known: bfloat16, float16, float32, float64"]),
    ("out_dtype", "bfloat", ["out_dtype", "did you mean bfloat16?"]),
    ("out_dtype", "int64", ["out_dtype: int64 is no dtype"]),
    ("chat_template", "lama3", ["chat_template: 'lama3' is neither", "did you mean llama3?"]),
    ("chat_template", "{{ x }}", ["chat_template: '{{ x }}' is neither a template nor"]),
    ("tokenizer", {"sauce": "base"}, ["tokenizer", "did you mean source?"]),
    # lists
    (f"{SHARED}.calibration_dataset", ["a.jsonl", "b.jsonl"],
     ["parameters.calibration_dataset", "single value", "gradient over the layers",
      "`models[].parameters`"]),
    (f"{MODEL}.num_calibration_samples", [8, 16],
     ["models[0].parameters.num_calibration_samples", "single value", "gradient"]),
    (f"{MODEL}.text_column", ["question", "answer"],
     ["models[0].parameters.text_column", "single value", 'text_column: "question,answer"']),
    (f"{MODEL}.covariance", ["a", "b"], ["models[0].parameters.covariance", "single value"]),
    (f"{MODEL}.calibration_seed", [1], ["models[0].parameters.calibration_seed", "single value"]),
    (f"{SHARED}.subspace", ["svd", "random"], ["parameters.subspace", "single value", "`filter`"]),
    # mappings and nothing
    (f"{MODEL}.calibration_dataset", {"path": "x", "name": "main"},
     ["models[0].parameters.calibration_dataset", "not a mapping", "calibration_config"]),
    (f"{MODEL}.calibration_dataset", [{"filter": "mlp", "value": "x"}],
     ["models[0].parameters.calibration_dataset", "single value"]),
    (f"{MODEL}.calibration_dataset", {"filter": "mlp", "value": "x"},
     ["models[0].parameters.calibration_dataset", "single value, not a mapping"]),
    (f"{MODEL}.calibration_dataset", None, ["models[0].parameters.calibration_dataset",
                                            "has no value", "remove the key"]),
    (f"{MODEL}.weight", [], ["models[0].parameters.weight", "has no value"]),
    (f"{SHARED}.rank_ratio", [{"filter": "mlp"}], ["parameters.rank_ratio", "`value`"]),
    (f"{SHARED}.rank_ratio", [{"filer": "mlp", "value": 0.9}],
     ["parameters.rank_ratio", "'filer'", "did you mean filter?"]),
    ("models.0", "some/model", ["models[0]", "mapping such as `model: NAME`"]),
    ("models", "some/model", ["models", "must be a list"]),
    ("models.0.model", ..., ["models[0]", "names no model", "`model: NAME_OR_FOLDER`"]),
    (SHARED, [0.9], ["parameters", "must be a mapping"]),
    (MODEL, "x", ["models[0].parameters", "must be a mapping"]),
    # values
    *[(f"{SHARED}.rank_ratio", value, ["parameters.rank_ratio", "above 0 and at most 1",
                                       str(value)]) for value in (0, -0.5, 1.5, 4000)],
    (f"{SHARED}.rank_ratio", float("nan"), ["parameters.rank_ratio", "finite"]),
    (f"{SHARED}.rank_ratio", "abc", ["parameters.rank_ratio", "must be a number", "'abc'"]),
    (f"{SHARED}.rank_ratio", True, ["parameters.rank_ratio", "must be a number"]),
    (f"{SHARED}.rank_ratio", [0.9, 1.1], ["parameters.rank_ratio", "at most 1", "1.1"]),
    (f"{SHARED}.rank_ratio", [{"filter": "mlp", "value": 2}], ["parameters.rank_ratio", "2"]),
    *[(f"{SHARED}.dampening_frac", value, ["parameters.dampening_frac", "above 0 and at most 1"])
      for value in (0, -1, 1.01)],
    (f"{SHARED}.regularization", 0, ["parameters.regularization", "above 0"]),
    (f"{SHARED}.subspace", "covarience", ["parameters.subspace", "covariance, svd, random"]),
    (f"{SHARED}.rank_allocation", "greedy", ["rank_allocation", "spectral, uniform"]),
    (f"{SHARED}.num_calibration_samples", 0, ["num_calibration_samples", "at least 1"]),
    (f"{SHARED}.num_calibration_samples", 1.5, ["num_calibration_samples", "whole number"]),
    (f"{SHARED}.max_seq_length", "long", ["max_seq_length", "whole number", "'long'"]),
    (f"{SHARED}.calibration_seed", -1, ["calibration_seed", "0 or more"]),
    (f"{MODEL}.calibration_dataset", "  ", ["calibration_dataset", "non-empty"]),
    (f"{MODEL}.calibration_dataset", 7, ["calibration_dataset", "single string"]),
    (f"{MODEL}.weight", "heavy", ["models[0].parameters.weight: must be a number", "'heavy'"]),
    (f"{SHARED}.normalize", "perhaps", ["parameters.normalize: must be true or false"]),
    # what is merged
    (f"{MODEL}.weight", ..., ["models[0]", "needs a value for weight"]),
    (f"{MODEL}.calibration_dataset", ..., ["models[0]", "no calibration data",
                                           "`calibration_dataset:", "`covariance:"]),
    ("slices", [], ["mergekit cannot read"]),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=lambda x: str(x)[:40])
def test_refused(good, path, value, words):
    bad = change(good, path, value)
    if path == "slices":
        del bad["models"]
    found = errors(bad)
    assert len(found) == 1 or path in ("models", "merge_method"), found
    assert "\n" not in found[0] and found[0].endswith((".", "?", "`"))
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize(
    ("name", "ours"),
    [(name, True) for name in ("pave-ties", "pave_tie", "PAVE_TIES", "paveties", "ties_pave",
                               "pvae_ties", "pave", "tsv-m", "regmeans", "EMR")]
    + [(name, False) for name in ("ties", "tie", "pave_ties", "linear", "slerpp", "nonsense")],
)
def test_which_unknown_methods_are_ours(name, ours):
    assert looks_like_ours(name) == ours


def test_all_mistakes_are_listed_at_once(good):
    bad = change(change(good, f"{MODEL}.wieght", 1), f"{SHARED}.rank_ratio", 7)
    assert len(errors(bad)) == 2


@pytest.mark.parametrize("raw", [None, [1, 2], "text", 3])
def test_not_a_mapping(raw):
    assert "not a YAML mapping" in errors(raw)[0]


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (0.01, 0.1, True),
        (0.01, [{"filter": "mlp", "value": 0.1}], True),
        ([{"filter": "mlp", "value": 0.01}], [{"filter": "mlp", "value": 0.1}], True),
        ([{"filter": "mlp", "value": 0.01}], [{"filter": "attn", "value": 0.1}], False),
    ],
)
def test_both_damping_keys(good, first, second, clash):
    good["parameters"].update(dampening_frac=first, regularization=second)
    found = errors(good)
    assert len(found) == clash
    assert not clash or "exclude each other: keep one" in found[0]


def test_same_model_twice(good):
    good["models"][1]["model"] = good["models"][0]["model"]
    assert "expert0 is listed twice" in errors(good)[0]


def test_only_the_base(good):
    good["models"] = [{"model": good["base_model"]}]
    assert "no fine-tuned model beside the base" in errors(good)[0]


def test_too_many_models_for_the_method(good):
    good["merge_method"] = "pave_slerp"
    for model in good["models"]:
        del model["parameters"]["weight"]
    good["parameters"]["t"] = 0.5
    assert "exactly 2 inputs" in errors(good)[0]


def test_required_shared_parameter(good):
    good["merge_method"] = "pave_slerp"
    del good["models"][1], good["models"][0]["parameters"]["weight"]
    assert "needs a value for t" in errors(good)[0]


def sliced(good: dict, *ranges: tuple) -> dict:
    sources = [{"model": good["base_model"]}, *good.pop("models")]
    good["slices"] = [
        {"sources": [{**source, "layer_range": list(r)}
                     for source, r in zip(sources, part, strict=True)]}
        for part in ranges
    ]
    return good


def test_slices_with_unequal_ranges(good):
    found = errors(sliced(good, [(0, 1)] * 3, [(1, 2), (0, 1), (1, 2)]))
    assert len(found) == 1
    assert found[0].startswith("slices[1]: ") and "make the ranges equal" in found[0]


@pytest.mark.parametrize("place", ["base_model", "models.1.model"])
def test_one_folder_under_two_names(good, tmp_path, place):
    (tmp_path / "link").symlink_to(good["models"][0]["model"])
    found = errors(change(good, place, str(tmp_path / "link")))
    assert found and found[0].startswith("models: ") and "are the same; write both" in found[0]


@pytest.mark.parametrize(("part", "words"), [
    ((0, 5), "slices[0]: layer_range ends at 5, and "),
    ((-1, 1), "slices[0]: layer_range [-1, 1] holds no layers"),
    ((1, 1), "slices[0]: layer_range [1, 1] holds no layers"),
    ((2, 1), "slices[0]: layer_range [2, 1] holds no layers"),
])
def test_slices_of_layers_that_are_not_there(good, part, words):
    assert errors(sliced(good, [part] * 3))[0].startswith(words)


def test_templates_and_dtypes_that_mergekit_knows(good):
    for key, value in (("chat_template", "chatml"), ("chat_template", "auto"),
                       ("chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"),
                       ("dtype", "torch.bfloat16"), ("out_dtype", "float64")):
        assert not errors({**good, key: value})


def test_slice_without_the_base(good):
    raw = sliced(good, [(0, 2)] * 3)
    del raw["slices"][0]["sources"][0]
    assert "lack the base" in errors(raw)[0]


def test_adapter_without_cache(good):
    good["models"][0]["model"] += "+some/adapter"
    found = errors(good)
    assert "--lora-merge-cache DIR" in found[0] and "`+`" in found[0]


def test_plus_in_a_path(good):
    good["models"][0]["model"] += "+/nowhere/adapter"
    found = errors(good, LoaderOptions(lora_merge_cache="x"))
    assert "no adapter in /nowhere/adapter" in found[0] and "`+`" in found[0]


@pytest.mark.parametrize("name", ["a@b@c", "a+b+c"])
def test_unreadable_model_name(good, name):
    found = errors(change(good, "models.0.model", name))
    assert name in found[0] and "`@` starts a revision and `+` an adapter" in found[0]


# --- YAML ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2\nb: 3", ["not valid YAML", "line 2"]),
        ("a: 1\n\tb: 2", ["not valid YAML", "line 2"]),
        ("parameters:\n  rank_ratio: 0.9\n  rank_ratio: 0.8",
         ["'rank_ratio' is given twice", "line 3", "keep one"]),
        ("a: 1\n---\nb: 2", ["several YAML documents"]),
        ("a: \x01", ["not valid YAML"]),
    ],
)
def test_bad_yaml(text, words):
    with pytest.raises(PaveError) as caught:
        read_yaml(text, "merge.yml")
    assert "merge.yml" in str(caught.value) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_merge_keys_are_not_duplicates():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc:\n  x: 4"
    assert read_yaml(text) == yaml.safe_load(text)


# --- models --------------------------------------------------------------------------------


def doctored(good: dict, tmp_path: Path, **changes) -> dict:
    """The recipe with its first model replaced by a folder with that config only."""
    folder = tmp_path / "doctored"
    folder.mkdir()
    config = json.loads((Path(good["models"][0]["model"]) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return change(good, "models.0.model", str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["num_hidden_layers 3, the base 2"]),
        ({"hidden_size": 64}, ["hidden_size 64, the base 32"]),
        ({"intermediate_size": 64}, ["intermediate_size 64, the base 48"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads 4, the base 2"]),
        ({"vocab_size": 100}, ["100 tokens, the base 94", "`tokenizer: {source: base}`"]),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
         ["Qwen2ForCausalLM", "LlamaForCausalLM", "one architecture"]),
        ({"architectures": None}, ["`architectures`", "LlamaForCausalLM"]),
        ({"model_type": "never_heard_of"}, ["Cannot read the config", "never_heard_of",
                                            "upgrade transformers"]),
        *[({"quantization_config": {"quant_method": method, **more}}, [method, "full-precision"])
          for method, more in [("gptq", {"bits": 4}), ("awq", {"bits": 4}),
                               ("bitsandbytes", {"load_in_4bit": True}), ("fp8", {})]],
    ],
    ids=str,
)
def test_unsuitable_model(good, tmp_path, changes, words):
    found = errors(doctored(good, tmp_path, **changes))
    assert len(found) == 1 and "models[0]" in found[0] and "doctored" in found[0]
    for word in words:
        assert word in found[0]


def test_heads_of_different_sizes(families, texts, tmp_path):
    labels = {str(i): f"L{i}" for i in range(5)}
    raw = doctored(recipe(families("roberta"), texts), tmp_path, id2label=labels,
                   label2id={v: int(k) for k, v in labels.items()})
    assert "5 labels, the base into 3" in errors(raw)[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ["There is no model folder", "correct the path"]),
        ([], ["has no config.json"]),
        (["adapter_config.json"], ["is an adapter", "MODEL+"]),
        (["weights.gguf"], ["GGUF", "full-precision"]),
    ],
)
def test_missing_model(good, tmp_path, files, words):
    folder = tmp_path / "odd"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    for path in ("models.1.model", "base_model"):
        found = errors(change(good, path, str(folder)))
        assert path.replace(".1.model", "[1]") in found[0] and str(folder) in found[0]
        for word in words:
            assert word in found[0]


def test_gguf_file(good):
    found = errors(change(good, "models.1.model", "/somewhere/model.Q4_K_M.gguf"))
    assert "GGUF" in found[0]


def test_hub_model_that_cannot_be_reached(good):
    found = errors(change(good, "models.1.model", "nobody/nothing"))
    assert "nobody/nothing" in found[0] and "`hf auth login`" in found[0]


# --- data ----------------------------------------------------------------------------------


def test_data_file_missing(good):
    found = errors(change(good, f"{MODEL}.calibration_dataset", "./nowhere.jsonl"))
    assert "models[0]" in found[0] and "nowhere.jsonl" in found[0] and "correct" in found[0]


def test_data_empty(good, tmp_path):
    (tmp_path / "e.jsonl").touch()
    found = errors(change(good, f"{MODEL}.calibration_dataset", str(tmp_path / "e.jsonl")))
    assert "models[0]" in found[0] and "empty" in found[0]


def test_data_column_missing(good):
    found = errors(change(good, f"{MODEL}.text_column", "question"))
    assert "'question'" in found[0] and "'text'" in found[0]


def test_images_for_a_model_of_text(good, tmp_path):
    images = write_images(tmp_path / "images")
    found = errors(change(good, f"{MODEL}.calibration_dataset", str(images)))
    assert "models[0]" in found[0] and "takes text, and" in found[0]


def test_data_split_missing(good):
    found = errors(change(good, f"{MODEL}.calibration_split", "validation"))
    assert "'validation'" in found[0] and "train" in found[0]


def test_covariance_nowhere(good, tmp_path):
    found = errors(change(good, f"{MODEL}.covariance", str(tmp_path / "nowhere")))
    assert "models[0]" in found[0] and "No covariance store" in found[0]
    assert "`mergekit-pave calibrate" in found[0]


def test_covariance_incomplete(good, tmp_path):
    (tmp_path / "calibration.json").write_text("{}")
    found = errors(change(good, f"{MODEL}.covariance", str(tmp_path)))
    assert "manifest.json" in found[0]


@pytest.mark.parametrize("manifest", ["", "{", "[]", "3", '{"kind": "other"}'])
def test_covariance_with_a_strange_manifest(good, tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    found = errors(change(good, f"{MODEL}.covariance", str(tmp_path)))
    assert "not the manifest of a covariance store" in found[0] and "recalibrate" in found[0]


def test_covariance_not_on_the_hub(good):
    found = errors(change(good, f"{MODEL}.covariance", "nobody/nothing"))
    assert "nobody/nothing" in found[0] and "neither" in found[0]


# --- accepted ------------------------------------------------------------------------------

FINE = [
    (f"{SHARED}.rank_ratio", [{"filter": "mlp", "value": 0.9}]),
    (f"{SHARED}.rank_ratio", [{"filter": "mlp", "value": 0.9}, {"value": 0.95}]),
    (f"{SHARED}.rank_ratio", [{"filter": "mlp", "value": [0.9, 1.0]}, {"filter": "*", "value": 1}]),
    (f"{SHARED}.rank_ratio", {"filter": "mlp", "value": 0.9}),
    (f"{SHARED}.rank_ratio", [0.9, 0.95, 1.0]),
    (f"{SHARED}.rank_ratio", "9e-1"),
    (f"{SHARED}.rank_ratio", 1),
    (f"{SHARED}.rank_ratio", ...),
    (f"{SHARED}.dampening_frac", "1e-2"),
    (f"{SHARED}.regularization", "1e-1"),
    (f"{SHARED}.regularization", 1),
    (f"{SHARED}.lambda", "1e-1"),
    (f"{SHARED}.normalize", True),
    (f"{SHARED}.num_calibration_samples", 16.0),
    (f"{SHARED}.num_calibration_samples", "16"),
    (f"{SHARED}.subspace", [{"filter": "mlp", "value": "svd"}, {"value": "covariance"}]),
    (f"{MODEL}.weight", [0, 0.5, 1]),
    (f"{MODEL}.weight", 0),
    (f"{MODEL}.weight", [{"filter": "mlp", "value": 0}, {"value": 1}]),
    (f"{MODEL}.density", [0.1, 1]),
    ("tokenizer", {"source": "base"}),
    ("tokenizer_source", "union"),
    ("dtype", "bfloat16"),
    ("out_dtype", "float16"),
    ("chat_template", "auto"),
    ("name", "a-step-of-mergekit-multi"),
]


@pytest.mark.parametrize(("path", "value"), FINE, ids=lambda x: str(x)[:40])
def test_accepted(good, path, value):
    assert check(change(good, path, value), OPTIONS) == []


def test_base_among_the_models(good):
    good["models"].insert(0, {"model": good["base_model"]})
    assert check(good, OPTIONS) == []


def test_one_model(good):
    del good["models"][0]
    assert check(good, OPTIONS) == []


def test_everything_shared(good, texts):
    for model in good["models"]:
        del model["parameters"]
    good["parameters"].update(weight=0.5, calibration_dataset=str(texts[0]), text_column="text")
    assert check(good, OPTIONS) == []


@pytest.mark.parametrize(
    "shared",
    [
        {"rank_ratio": 1.0}, {"rank_ratio": "1.0"}, {"rank_ratio": [1, 1]},
        {"rank_ratio": [{"filter": "mlp", "value": 1}, {"value": 1.0}]},
        {"subspace": "svd"}, {"subspace": "random", "rank_ratio": 0.5},
        {"subspace": [{"filter": "mlp", "value": "svd"}, {"value": "random"}]},
    ],
    ids=str,
)
def test_no_data_needed(good, shared):
    for model in good["models"]:
        del model["parameters"]["calibration_dataset"]
    good["parameters"].update(shared)
    assert check(good, OPTIONS) == []


@pytest.mark.parametrize(
    "shared",
    [
        {"rank_ratio": [{"filter": "mlp", "value": 1.0}]},  # elsewhere the default holds
        {"rank_ratio": [1.0, 0.9]},
        {"subspace": [{"filter": "mlp", "value": "svd"}]},
    ],
    ids=str,
)
def test_data_needed_for_some_tensors(good, shared):
    for model in good["models"]:
        del model["parameters"]["calibration_dataset"]
    good["parameters"].update(shared)
    assert len(errors(good)) == 2


def test_slices_with_equal_ranges(good):
    raw = sliced(good, [(0, 1)] * 3, [(1, 2)] * 3)
    raw["slices"][0]["parameters"] = {"rank_ratio": 0.8}
    assert check(raw, OPTIONS) == []


@pytest.mark.parametrize(("of_one_slice", "words"), [
    ({"regularization": 0.1}, "exclude each other"),
    ({"purify": "separate", "rank_ratio": 0.9}, "rank_ratio has no effect"),
])
def test_a_fault_of_a_later_slice(good, of_one_slice, words):
    good["parameters"]["dampening_frac"] = 0.1
    raw = sliced(good, [(0, 1)] * 3, [(1, 2)] * 3)
    assert check(raw, OPTIONS) == []
    raw["slices"][1]["parameters"] = of_one_slice
    (found,) = errors(raw)
    assert found.startswith("parameters: ") and words in found


def test_data_for_a_later_slice_only(good):
    """Named once for each model, and looked at although the first slice needs none."""
    raw = sliced(good, [(0, 1)] * 3, [(1, 2)] * 3)
    for piece in raw["slices"]:
        for source in piece["sources"][1:]:
            source["parameters"] = {"weight": 0.5}
    raw["parameters"]["rank_ratio"] = 1.0
    assert errors(raw) == []
    for part in raw["slices"]:
        part["parameters"] = {"rank_ratio": 0.9}
    assert len(errors(raw)) == 2
    del raw["slices"][0]["parameters"]
    assert [e.split(":")[0] for e in errors(raw)] == [f"slices[1].sources[{i}]" for i in (1, 2)]
    raw["parameters"]["calibration_dataset"] = "./nowhere.jsonl"
    assert [e.split(":")[0] for e in errors(raw)] == [f"slices[1].sources[{i}]" for i in (1, 2)]


def test_base_of_each_slice(good):
    raw = sliced(good, [(0, 2)] * 3)
    raw["slices"][0]["base_model"] = raw.pop("base_model")
    assert check(raw, OPTIONS) == []


def test_modules(good):
    models, own = good.pop("models"), {"rank_ratio": 0.8}
    good["modules"] = {"default": {"models": models, "parameters": own}}
    assert check(good, OPTIONS) == []
    good["modules"]["default"]["models"][0]["parameters"]["wieght"] = 1
    assert errors(good)[0].startswith("modules.default.models[0].parameters: unknown key 'wieght'")


def test_covariance_beside_data_is_a_warning(good, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_pave.check.models.fetch_store", lambda *a, **k: None)
    monkeypatch.setattr("mergekit_pave.check.models._check_owner", lambda *a: None)
    (finding,) = check(change(good, f"{MODEL}.covariance", str(tmp_path)), OPTIONS)
    assert (finding.level, finding.where) == ("warning", "models[0]")
    assert "covariance is used" in str(finding)


def test_flags_that_lift_a_refusal(good, tmp_path):
    larger = doctored(good, tmp_path, vocab_size=100)
    assert errors(larger, allowed=Allowances(truncated_embeddings=True)) == []
    assert errors(change(larger, "tokenizer", {"source": "base"})) == []
    config = tmp_path / "doctored" / "config.json"
    other = {**json.loads(config.read_text()), "architectures": ["MistralForCausalLM"],
             "model_type": "mistral", "vocab_size": 94}
    config.write_text(json.dumps(other))
    assert len(errors(larger)) == 1
    assert errors(larger, allowed=Allowances(crimes=True)) == []


@pytest.fixture
def of_class(families, texts, tmp_path):
    """A merge of DebertaV2ForSequenceClassification whose base is of another class."""
    def make(name: str) -> dict:
        raw = recipe(families("deberta"), texts)
        config = json.loads((Path(raw["base_model"]) / "config.json").read_text())
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(
            json.dumps({**config, "architectures": [name]}))
        return change(raw, "base_model", str(tmp_path / "base"))

    return make


def test_architectures_mergekit_takes_by_tensor_name(of_class):
    """A base without the fine-tunes' head: mergekit merges what both have."""
    assert errors(of_class("DebertaV2ForMaskedLM")) == []


def test_a_base_whose_class_has_other_names(of_class):
    """mergekit takes the names of the base's class, and would find nothing of the fine-tunes."""
    found = errors(of_class("DebertaV2Model"))
    assert len(found) == 2
    assert re.search(r"leave 16 weights of .*expert0 out .* a DebertaV2Model, calls encoder.* "
                     r"DebertaV2ForSequenceClassification.from_pretrained", found[0])


# --- preflight -----------------------------------------------------------------------------


def test_preflight_reads_the_source_for_keys_that_mergekit_drops(good):
    source = yaml.safe_dump(change(good, "models.0.wieght", 1))
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    with pytest.raises(PaveError, match="'wieght'"):
        preflight(config, source, OPTIONS)


@pytest.mark.parametrize("source", [None, "", "a label", "merge_method: pave_ties\nmodels: []"])
def test_preflight_without_the_true_source(good, source):
    assert preflight(MergeConfiguration.model_validate(good), source, OPTIONS) == []


def test_preflight_without_a_source_copes_with_spaces(good, families, tmp_path):
    folder = tmp_path / "a model"
    folder.symlink_to(families("llama")["expert0"])
    good["models"][0]["model"] = str(folder)
    config = MergeConfiguration.model_validate(good)
    assert preflight(config, None, OPTIONS) == []
    config.parameters["rank_ratio"] = 2.0
    with pytest.raises(PaveError, match="rank_ratio"):
        preflight(config, None, OPTIONS)


def test_preflight_says_how_many_more(good):
    bad = change(change(good, f"{SHARED}.rank_ratio", 7), f"{MODEL}.wieght", 1)
    with pytest.raises(PaveError, match=r"\(1 more: run `mergekit-pave check`\)"):
        preflight(MergeConfiguration.model_validate(bad), yaml.safe_dump(bad), OPTIONS)


def own(good: dict, method: str, *data: str, **shared) -> dict:
    """A merge by a method of ours that is no twin."""
    models = [{"model": model["model"]} for model in good["models"]]
    for model, dataset in zip(models, data, strict=False):
        model["parameters"] = {"calibration_dataset": dataset}
    return {"merge_method": method, "base_model": good["base_model"], "models": models,
            "parameters": shared}


def test_a_word_is_no_gradient(good):
    (found,) = errors(own(good, "emr", rescaler=["global", "tensor_mean"]))
    assert "parameters.rescaler: must be a single value" in found


@pytest.mark.parametrize("value", [
    [0.5, 1.0], [{"filter": "mlp", "value": [0.5, 1.0]}, {"value": 1.0}]])
@pytest.mark.parametrize("name", ["weight", "lambda"])
@pytest.mark.parametrize("method", ["tsv_m", "regmean", "tsv_regmean"])
def test_our_own_methods_take_gradients_and_filters(good, method, name, value):
    data = () if method == "tsv_m" else ("none", "none")
    assert errors(own(good, method, *data, **{name: value})) == []


@pytest.mark.parametrize(("method", "shared", "clash"), [
    ("regmean", {}, True), ("pave_tsv_regmean", {}, True),
    ("pave_task_arithmetic", {"purify": "separate", "weight": 1}, True),
    ("pave_task_arithmetic", {"purify": "delta", "weight": 1}, False),
])
def test_data_for_some_models_only(good, texts, method, shared, clash):
    found = errors(own(good, method, "none", str(texts[0]), **shared))
    assert ["no common scale" in message for message in found] == [True] * clash
    assert errors(own(good, method, "none", "none", **shared)) == []


def test_without_data_the_whole_weight_is_better_left_alone(good, texts):
    def warnings(data: str, method: str = "pave_task_arithmetic", **shared) -> list[str]:
        raw = own(good, method, data, data, weight=1, **shared)
        return [str(f) for f in check(raw, OPTIONS) if f.level == "warning"]

    (finding,) = warnings("none")  # once, for both models
    start = "models[0], models[1]: calibration_dataset: none with purify: weight"
    assert finding.startswith(start)
    assert finding.endswith("set purify: delta or separate, or give data.")
    half = [{"filter": "mlp", "value": "weight"}, {"value": "delta"}]
    assert len(warnings("none", purify=half)) == 1
    for purify in ("delta", "separate"):
        assert warnings("none", purify=purify) == []
    assert warnings("none", rank_ratio=1.0) == warnings("none", subspace="svd") == []
    assert warnings("none", "regmean") == warnings("none", "pave_regmean", rank_ratio=1.0) == []
    assert len(warnings("none", "pave_regmean")) == 1
    assert not any("purify" in finding for finding in warnings(str(texts[0])))


# --- what a merge would find out in its middle ----------------------------------------------


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
def test_masks_are_told_from_one_base(good, method):
    shared = {"rank_ratio": 1.0} if method == "pave_emr" else {}
    raw = sliced(own(good, method, **shared), [(0, 1)] * 3, [(1, 2)] * 3)
    assert errors(raw) == []
    base, other = raw["base_model"], raw["slices"][1]["sources"][1]["model"]
    wanted = f"slices[1]: {method} needs one base for the whole model: remove the base_model of "
    raw["slices"][1]["base_model"] = other
    assert errors(raw) == [wanted + "the slice."]
    raw["slices"][1]["base_model"] = base
    assert errors(raw) == []
    raw["slices"][0]["base_model"] = raw.pop("base_model")
    found = errors(raw)
    assert len(found) == 2
    assert found[1] == wanted + f"the slice and add `base_model: {base}` at the top level."


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
def test_masks_have_one_rescaler(good, method):
    raw = own(good, method, **({"rank_ratio": 1.0} if method == "pave_emr" else {}))

    def found(value) -> list[str]:
        return errors(change(raw, "parameters.rescaler", value))

    assert found("global") == found([{"filter": "mlp", "value": "tensor_mean"}]) == []
    assert found([{"filter": "mlp", "value": "global"}, {"value": "global"}]) == []
    for value in ([{"filter": "mlp", "value": "global"}],
                  [{"filter": "mlp", "value": "global"}, {"value": "tensor_mean"}]):
        (sentence,) = found(value)
        assert sentence.startswith("parameters: rescaler must be one value for the whole model")
    raw = sliced(raw, [(0, 1)] * 3, [(1, 2)] * 3)
    raw["slices"][1]["parameters"] = {"rescaler": "global"}
    assert len(errors(raw)) == 1
    raw["slices"][0]["parameters"] = {"rescaler": "global"}
    assert errors(raw) == []


@pytest.mark.parametrize("method", ["regmean", "pave_regmean", "tsv_regmean"])
def test_some_model_has_to_weigh_something(good, method):
    raw = own(good, method, "none", "none", weight=0)
    assert errors(raw) == ["models: every weight is 0, which leaves nothing to merge; raise one."]
    assert errors(change(raw, "models.1.parameters.weight", 0.5)) == []
    assert errors(change(raw, "parameters.weight", [{"filter": "mlp", "value": 0}])) == []
