"""Keys, values, models and slices that `check` refuses, and YAML."""

from __future__ import annotations

import pytest
import yaml
from helpers import errors
from helpers.checks import MODEL, SHARED, change, sliced

from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin import register
from mergekit_pave.recipe.reading import read_yaml
from mergekit_pave.recipe.spelling import looks_like_ours

register()
pytestmark = pytest.mark.usefixtures("nothing_heavy")


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
