"""What sentence-transformers and image processors need beside a merge."""

from __future__ import annotations

import json

import pytest
from helpers import make_family, merge

from mergekit_pave.models.folder import sentence_files
from mergekit_pave.publish.hub import merge_files


def _as_sentences(folder, paths=("", "1_Pooling")):
    modules = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


@pytest.fixture
def embeddings(tmp_path):
    paths = make_family(tmp_path / "models", "bert")
    return {"merge_method": "tsv_m", "base_model": str(paths["base"]), "dtype": "float32",
            "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)]}, paths


def test_pooling_goes_along_and_is_published(embeddings, tmp_path):
    config, paths = embeddings
    _as_sentences(paths["base"])
    merge(config, tmp_path / "out", write_model_card=True)
    expected = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    for name in expected:
        there = (tmp_path / "out" / name).read_bytes()
        assert there == (paths["base"] / name).read_bytes()
    assert expected <= set(merge_files(tmp_path / "out"))


def test_pooling_of_an_expert_where_the_base_has_none(embeddings, tmp_path):
    config, paths = embeddings
    _as_sentences(paths["expert1"])
    merge(config, tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_a_later_merge_of_other_models_keeps_none_of_it(embeddings, tmp_path):
    config, paths = embeddings
    _as_sentences(paths["expert0"])
    merge(config, tmp_path / "out", write_model_card=True)
    (paths["expert0"] / "modules.json").unlink()
    merge(config, tmp_path / "out", write_model_card=True)
    assert not (tmp_path / "out" / "modules.json").exists()
    assert not (tmp_path / "out" / "1_Pooling").exists()


def test_a_list_of_modules_leads_to_no_other_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    _as_sentences(model, ("", "../secret", str(tmp_path / "secret"), "..", "1_Pooling"))
    assert set(sentence_files(model)) == {
        "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    (model / "modules.json").write_text("{")
    assert sentence_files(model) == {}


def test_images_take_their_processor_along_and_miss_no_tokenizer(tmp_path, caplog):
    from transformers import AutoImageProcessor

    paths = make_family(tmp_path / "models", "vit")
    config = {"merge_method": "tsv_m", "base_model": str(paths["base"]), "dtype": "float32",
              "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)]}
    merge(config, tmp_path / "out", copy_tokenizer=True)
    assert "Failed to copy" not in caplog.text
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == \
        AutoImageProcessor.from_pretrained(paths["base"]).size


@pytest.mark.slow
def test_sentence_transformers_loads_the_merge(tmp_path, embeddings):
    library = pytest.importorskip("sentence_transformers")
    config, paths = embeddings
    from sentence_transformers import models

    body = models.Transformer(str(paths["base"]), max_seq_length=64)
    pooling = models.Pooling(body.get_word_embedding_dimension(), pooling_mode="max")
    library.SentenceTransformer(modules=[body, pooling], device="cpu").save(str(paths["base"]))
    merge(config, tmp_path / "out", copy_tokenizer=True)
    loaded = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert loaded.max_seq_length == 64 and "max" in str(loaded[1].get_config_dict())
    assert loaded.encode(["w1 w2", "w3"]).shape == (2, 32)
