"""What `check` must not complain about, what it warns of, and what a merge would find late."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import OPTIONS, errors, recipe
from helpers.checks import MODEL, SHARED, change, doctored, own, sliced, with_weights

from mergekit_pave.check import check
from mergekit_pave.check.models import Allowances
from mergekit_pave.plugin import register

register()
pytestmark = pytest.mark.usefixtures("nothing_heavy")


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
    with_weights(tmp_path / "doctored")
    assert errors(larger, allowed=Allowances(truncated_embeddings=True)) == []
    assert errors(change(larger, "tokenizer", {"source": "base"})) == []
    config = tmp_path / "doctored" / "config.json"
    other = {**json.loads(config.read_text()), "architectures": ["MistralForCausalLM"],
             "model_type": "mistral", "vocab_size": 94}
    config.write_text(json.dumps(other))
    with_weights(config.parent)
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
        with_weights(tmp_path / "base")
        return change(raw, "base_model", str(tmp_path / "base"))

    return make


def test_architectures_mergekit_takes_by_tensor_name(of_class):
    """A base without the fine-tunes' head: mergekit merges what both have."""
    found = [str(f) for f in check(of_class("DebertaV2ForMaskedLM"), OPTIONS)
             if "left out of the merge" in str(f)]
    assert len(found) == 2
    assert "expert0 have no place in the base" in found[0] and "classifier.bias" in found[0]


def test_a_base_whose_class_has_other_names(of_class):
    """mergekit takes the names of the base's class, and would find nothing of the fine-tunes."""
    found = errors(of_class("DebertaV2Model"))
    assert len(found) == 1
    assert re.search(r"leave \d+ weights of .*expert0 out .* a DebertaV2Model, calls embed.* "
                     r"DebertaV2ForSequenceClassification.from_pretrained", found[0])


def test_a_word_is_no_gradient(good):
    (found,) = errors(own(good, "emr", rescaler=["global", "tensor_mean"]))
    assert "parameters.rescaler: must be a single value" in found


@pytest.mark.parametrize("value", [
    [0.5, 1.0], [{"filter": "mlp", "value": [0.5, 1.0]}, {"value": 1.0}]])
@pytest.mark.parametrize("name", ["weight", "lambda"])
@pytest.mark.parametrize("method", ["tsv_m", "regmean", "tsv_regmean", "matched_regmean"])
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


@pytest.mark.parametrize("method", ["regmean", "pave_regmean", "tsv_regmean", "matched_regmean"])
def test_some_model_has_to_weigh_something(good, method):
    raw = own(good, method, "none", "none", weight=0)
    assert errors(raw) == ["models: every weight is 0, which leaves nothing to merge; raise one."]
    assert errors(change(raw, "models.1.parameters.weight", 0.5)) == []
    assert errors(change(raw, "parameters.weight", [{"filter": "mlp", "value": 0}])) == []
