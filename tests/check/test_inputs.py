"""Models, data and stores that `check` finds unsuitable, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import errors, recipe, write_images
from helpers.checks import MODEL, change, doctored

from mergekit_pave.plugin import register

register()
pytestmark = pytest.mark.usefixtures("nothing_heavy")


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
        ({"quantization_config": {}}, ["is quantised", "full-precision"]),
        ({"architectures": None}, ["`architectures`", "LlamaForCausalLM"]),
        ({"architectures": 0.5}, ["`architectures`", "LlamaForCausalLM"]),
        ({"hidden_size": ["x"]}, ["Cannot read the config", "hidden_size", "got list"]),
        ({"model_type": []}, ["Cannot read the config", "unhashable"]),
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


@pytest.mark.parametrize(("manifest", "words"), [
    ("", "is damaged"), ("{", "is damaged"), ("[]", "is not the manifest of a"),
    ("3", "is not the manifest of a"), ('{"kind": "other"}', "is not the manifest of a")])
def test_covariance_with_a_strange_manifest(good, tmp_path, manifest, words):
    (tmp_path / "manifest.json").write_text(manifest)
    found = errors(change(good, f"{MODEL}.covariance", str(tmp_path)))
    assert words in found[0] and "covariance store" in found[0] and "recalibrate" in found[0]


def test_covariance_not_on_the_hub(good):
    found = errors(change(good, f"{MODEL}.covariance", "nobody/nothing"))
    assert "nobody/nothing" in found[0] and "neither" in found[0]


@pytest.mark.parametrize(("rows", "words"), [
    ([{"text": ["a list", "of strings"]}], "cannot be read"),
    ([{"text": "a"}] * 3, "has no usable row"),
    ([{"messages": [{"role": "user", "content": "Hello there."}]}], "has no chat template"),
    ([{"text": [5, 6, 7, 8, 100_000]}], "100000"),
])
def test_rows_that_the_models_tokenizer_makes_nothing_of(good, tmp_path, rows, words):
    """Found before any model is calibrated, and not after the first one was."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = errors(change(good, "models.1.parameters.calibration_dataset", str(data)))
    assert found.startswith("models[1]: ") and words in found


@pytest.mark.parametrize(("changes", "words"), [
    ({"tokenizer": {"source": "./nowhere"}}, "tokenizer: No tokenizer could be loaded for"),
    ({"tokenizer_source": "./nowhere"}, "tokenizer_source: No tokenizer could be loaded for"),
    ({"tokenizer": {"source": "base", "tokens": {"<x>": {"source": "./nowhere"}}}},
     "tokenizer.tokens.<x>: ./nowhere is none of the merged models"),
    ({"tokenizer": {"source": "union", "tokens": {"<x>": {"source": {
        "kind": "model_token", "model": "./nowhere", "token": "<y>"}}}}},
     "tokenizer.tokens.<x>: ./nowhere is none of the merged models"),
])
def test_vocabularies_that_mergekit_cannot_align(good, changes, words):
    assert errors({**good, "tokenizer": {"source": "union"}}) == []
    (found,) = errors({**good, **changes})
    assert words in found


def test_a_fine_tune_without_tokenizer_where_vocabularies_are_aligned(good, tmp_path):
    """mergekit would take its tokens to be those of the base."""
    folder = tmp_path / "own"
    shutil.copytree(good["models"][1]["model"], folder)
    for file in folder.glob("*token*"):
        file.unlink()
    good["models"][1]["model"] = str(folder)
    good["parameters"]["rank_ratio"] = 1.0
    assert errors(good) == []
    (found,) = errors({**good, "tokenizer": {"source": "union"}})
    assert found.startswith("tokenizer: ") and str(folder) in found
