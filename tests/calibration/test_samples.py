"""Calibration rows as one model's tensors: content, limits, batches, and refusals."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.samples import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    bert,
    ids,
    llama,
    save_tokenizer,
    t5,
    tokens,
    words,
)
from tokenizers import Tokenizer, models

from mergekit_pave.calibration import samples as data
from mergekit_pave.calibration.limits import is_text_encoder, length_limit
from mergekit_pave.calibration.samples import Samples, batches, load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CalibrationSpec

pytestmark = pytest.mark.usefixtures("private_cache")


def test_plain_text_keeps_its_length_and_gets_one_bos(load):
    samples = load([{"text": words(1, 2, 3)}, {"text": "<s>" + words(4)}, {"text": "<s> w5"}])
    assert sorted(ids(samples)) == [[BOS, *tokens(1, 2, 3)], [BOS, *tokens(4)], [BOS, *tokens(5)]]
    assert all(set(item) == {"input_ids"} for item in samples.items)
    assert samples.items[0]["input_ids"].dtype == torch.long
    assert samples.tokens == 8


def test_columns_are_joined_by_newlines_without_the_empty_ones(load):
    rows = [{"a": words(1), "b": None, "c": words(2)}, {"a": words(3), "b": "", "c": words(4)}]
    assert sorted(ids(load(rows, text_column="a,b,c"))) == [
        [BOS, *tokens(1, 2)], [BOS, *tokens(3, 4)]]


def test_two_columns_are_a_pair_for_encoders(load, tmp_path):
    rows = [{"a": words(1), "b": words(2)}]
    typed = tmp_path / "typed"
    save_tokenizer(typed, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    samples = load(rows, bert(), path=typed, text_column="a,b")
    assert ids(samples) == [[BOS, *tokens(1), EOS, *tokens(2), EOS]]
    assert ids(samples, "token_type_ids") == [[0, 0, 0, 1, 1]]
    # RoBERTa has one token type and DeBERTa none: an index of 1 would be out of range.
    for kind, types in ((transformers.RobertaConfig, 1), (transformers.DebertaV2Config, 0)):
        item, = load(rows, bert(kind, type_vocab_size=types), path=typed, text_column="a,b").items
        assert set(item) == {"input_ids"}
    assert ids(load(rows, text_column="a,b")) == [[BOS, *tokens(1, 2)]]


def test_what_is_a_text_encoder():
    assert is_text_encoder(bert()) and is_text_encoder(bert(transformers.DebertaV2Config))
    assert is_text_encoder(bert(architectures=["BertForSequenceClassification"]))
    assert not is_text_encoder(bert(is_decoder=True))
    assert not is_text_encoder(bert(architectures=["BertLMHeadModel"]))
    assert not is_text_encoder(llama(architectures=["LlamaForSequenceClassification"]))
    assert not is_text_encoder(t5()) and not is_text_encoder(transformers.GPT2Config())


def test_unusable_rows_are_skipped_counted_and_replaced(load, caplog):
    bad = [{"text": value} for value in (None, "", "  \n", "zzz yyy")]
    samples = load(bad + [{"text": words(i)} for i in range(6)], num_samples=6)
    assert sorted(ids(samples)) == [[BOS, *tokens(i)] for i in range(6)]
    skipped = samples.notes["skipped"]
    assert set(skipped) <= {"empty", "no token that the tokenizer knows"} and skipped["empty"] >= 2
    assert "skipped" in caplog.text


@pytest.mark.parametrize("rows, reason", [
    ([{"text": None}, {"text": ""}], "empty: 2"),
    ([{"text": 3}], "not text \\(int\\): 1"),
    ([{"text": "zzz"}], "no token that the tokenizer knows: 1"),
])
def test_no_usable_row(load, rows, reason):
    with pytest.raises(PaveError, match=f"no usable row in text_column 'text' \\({reason}\\)"):
        load(rows)


def test_one_token_is_too_short(load, tmp_path):
    save_tokenizer(tmp_path / "bare", framed="$A")
    with pytest.raises(PaveError, match="fewer than 2 tokens: 1"):
        load([{"text": "w1"}], path=tmp_path / "bare")


def test_an_endless_useless_stream_is_given_up(load, monkeypatch):
    monkeypatch.setattr(data, "GIVE_UP", 5)
    with pytest.raises(PaveError, match="empty: 5"):
        load([{"text": ""}] * 9)


def test_fewer_rows_than_asked(load, caplog):
    samples = load([{"text": words(1, i)} for i in range(3)], num_samples=10)
    assert len(samples.items) == 3
    assert samples.notes["requested"] == 10 and samples.notes["used"] == 3
    assert "3 usable rows, fewer than num_calibration_samples 10" in caplog.text


def test_repeated_rows_are_warned_about(load, caplog):
    load([{"text": words(1, i)} for i in range(10)])
    assert "repeat another" not in caplog.text
    samples = load([{"text": words(1, i % 5)} for i in range(10)])
    assert "5 of the 10 rows" in caplog.text and samples.notes["duplicates"] == 5


# Limits


@pytest.mark.parametrize("config, tokenizer_limit, expected", [
    (llama(), None, 20),
    (llama(max_position_embeddings=9), None, 9),
    (llama(), 7, 7),
    (transformers.GPT2Config(n_positions=9), None, 9),
    (bert(max_position_embeddings=9), None, 9),
    (bert(transformers.RobertaConfig, max_position_embeddings=11, pad_token_id=1), None, 9),
    (bert(transformers.XLMRobertaConfig, max_position_embeddings=64), None, 20),
    (t5(), None, 20),
    (transformers.BartConfig(max_position_embeddings=9), None, 9),
    (transformers.LlavaConfig(text_config=llama(max_position_embeddings=9)), None, 9),
    (transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert(max_position_embeddings=9), bert(max_position_embeddings=12)), None, 9),
])
def test_length_limit(config, tokenizer_limit, expected):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(VOCABULARY)),
        **({"model_max_length": tokenizer_limit} if tokenizer_limit else {}))
    assert length_limit(config, tokenizer, 20) == expected
    assert length_limit(config, tokenizer, 5) == 5


def test_roberta_runs_at_the_limit(load):
    config = bert(transformers.RobertaConfig, max_position_embeddings=12, pad_token_id=1)
    batch, = batches(load([{"text": words(*range(30))}], config), 1)
    assert batch["input_ids"].shape == (1, 10)
    transformers.RobertaModel(config)(**batch)


def test_long_rows_are_cut_and_never_dropped(load):
    samples = load([{"text": words(*range(30))}, {"text": words(1)}], max_seq_length=8)
    assert sorted(map(len, ids(samples))) == [2, 8]
    assert samples.notes["max_seq_length"] == 8
    rows = [{"a": words(1, 2), "b": words(3)}]
    assert ids(load(rows, bert(), text_column="a,b", max_seq_length=2)) == [[BOS, *tokens(1)]]


def test_token_ids_beyond_the_embedding(load, model):
    with pytest.raises(PaveError, match=f"{model} has 6 embedding rows, but its tokenizer .* gives "
                                        "the token id 34"):
        load([{"text": words(1, 30)}], llama(vocab_size=6))
    with pytest.raises(PaveError, match="has 48 embedding rows, but the rows hold the token id 99"):
        load([{"input_ids": [1, 99]}], text_column="input_ids")


# Token ids, and encoder-decoders
def test_token_rows_lose_their_padding(load, tmp_path):
    rows = [{"input_ids": [PAD, PAD, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}]
    samples = load(rows, path=tmp_path / "no-tokenizer-needed", text_column="input_ids",
                   max_seq_length=2)
    assert ids(samples) == [[5, 6]]
    with pytest.raises(PaveError, match="attention_mask of another length"):
        load([{"input_ids": [5, 6], "attention_mask": [1]}], text_column="input_ids")
    with pytest.raises(PaveError, match="'input_ids' holds str, which cannot be read"):
        load([{"input_ids": "w1"}], text_column="input_ids")


def test_one_column_feeds_both_sides_of_an_encoder_decoder(load, tmp_path):
    save_tokenizer(tmp_path / "t5", framed="$A </s>")
    samples = load([{"text": words(1, 2)}], t5(decoder_start_token_id=0), path=tmp_path / "t5")
    assert ids(samples) == [[*tokens(1, 2), EOS]]
    assert ids(samples, "decoder_input_ids") == [[0, *tokens(1, 2)]]
    assert samples.tokens == 6


def test_two_columns_feed_one_side_each(load, tmp_path):
    save_tokenizer(tmp_path / "t5", framed="$A </s>")
    rows = [{"s": words(1, 2, 3), "t": words(4)}]
    bart = transformers.BartConfig(vocab_size=48, decoder_start_token_id=2)
    samples = load(rows, bart, path=tmp_path / "t5", text_column="s,t")
    assert ids(samples) == [[*tokens(1, 2, 3), EOS]]
    assert ids(samples, "decoder_input_ids") == [[2, *tokens(4)]]
    with pytest.raises(PaveError, match="names 3 columns, but .* is an encoder-decoder"):
        load(rows, bart, path=tmp_path / "t5", text_column="s,t,s")
    labelled = [{"input_ids": [5, 6], "labels": [7, 8, -100]}]
    samples = load(labelled, bart, text_column="input_ids,labels")
    assert ids(samples, "decoder_input_ids") == [[2, 7]]


def test_t5_runs_on_its_batches(load, tmp_path):
    save_tokenizer(tmp_path / "t5", framed="$A </s>")
    config = t5(num_layers=1, num_heads=2, d_kv=4, d_ff=8)  # no decoder start: T5 uses its pad
    batch, = batches(load([{"text": words(1, 2)}], config, path=tmp_path / "t5"), 4)
    assert batch["decoder_input_ids"][0, 0] == config.pad_token_id
    transformers.T5Model(config)(**batch)


# Tokenizers


@pytest.mark.parametrize("config", [
    llama(), bert(), bert(transformers.RobertaConfig), transformers.GPT2Config(), t5()])
def test_model_without_tokenizer_files(load, tmp_path, config):
    # For some of these transformers returns an empty tokenizer rather than an error.
    config.save_pretrained(tmp_path / "bare")
    with pytest.raises(PaveError, match="bare.*copy tokenizer.json and"):
        load([{"text": "w1"}], config, path=str(tmp_path / "bare"))


def test_loading_options_reach_the_library(load, monkeypatch, tmp_path):
    seen = {}

    def spy(path, **options):
        seen.update(options, path=path)
        raise OSError("gated\nrepository")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    file = tmp_path / "a.txt"
    file.write_text("w1 w2\n")
    with pytest.raises(PaveError, match="No tokenizer could be loaded for org/model \\(gated\\)"):
        load_samples(CalibrationSpec(str(file)), "org/model", llama(), revision="abc",
                     trust_remote_code=True, cache_dir=tmp_path)
    assert seen == {"path": "org/model", "revision": "abc", "trust_remote_code": True,
                    "cache_dir": tmp_path}


# Identity, batches, notes


MIXED = [{"text": words(*range(1 + i % 5), i % 7)} for i in range(23)]


def test_batches_hold_every_sample_once_and_no_padding(load):
    samples = load(MIXED)
    for size in (1, 2, 3, 50):
        seen = []
        for batch in batches(samples, size):
            assert set(batch) == {"input_ids", "attention_mask"}
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            assert batch["attention_mask"].all() and len(batch["input_ids"]) <= size
            assert PAD not in batch["input_ids"]
            seen += batch["input_ids"].tolist()
        assert sorted(seen) == sorted(ids(samples))
        lengths = list(map(len, seen))
        assert lengths == sorted(lengths, reverse=True)


def test_batches_of_pairs_group_by_every_shape():
    def item(n, m):
        return {"input_ids": torch.ones(n), "decoder_input_ids": torch.ones(m)}

    samples = Samples((item(2, 3), item(3, 2), item(2, 3)), "", 0, {})
    shapes = [{k: tuple(v.shape) for k, v in batch.items() if k != "attention_mask"}
              for batch in batches(samples, 8)]
    assert sorted(shapes, key=str) == [
        {"input_ids": (1, 3), "decoder_input_ids": (1, 2)},
        {"input_ids": (2, 2), "decoder_input_ids": (2, 3)}]


def test_padding_side_and_batch_size_change_nothing(load, tmp_path):
    save_tokenizer(tmp_path / "left", padding_side="left")
    first = load(MIXED)
    assert first.digest == load(MIXED, path=tmp_path / "left", batch_size=1).digest
    assert first.digest != load(MIXED, seed=1).digest
    assert first.digest != load(MIXED, max_seq_length=3).digest
    assert first.digest != load(MIXED, num_samples=3).digest


def test_samples_are_the_same_in_another_process(load, tmp_path, model):
    first = load(MIXED, num_samples=9)
    code = (
        "import sys, transformers, datasets\n"
        "from mergekit_pave.recipe.parameters import CalibrationSpec\n"
        "from mergekit_pave.calibration.samples import load_samples\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[3]\n"
        "config = transformers.LlamaConfig(vocab_size=48, max_position_embeddings=64)\n"
        "spec = CalibrationSpec(sys.argv[1], num_samples=9)\n"
        "sys.stdout.write(load_samples(spec, sys.argv[2], config).digest)\n")
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.jsonl"), model, str(tmp_path / "other")],
        check=True, capture_output=True, text=True)
    assert other.stdout == first.digest  # and nothing else on stdout


def test_notes_are_provenance_without_text_or_local_folders(load, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        samples = load(MIXED, num_samples=9)
    rows = samples.notes.pop("rows")
    assert samples.notes == {
        "dataset": "rows.jsonl", "local": True, "config": None, "split": "train",
        "columns": ["text"], "seed": 42, "streamed": False, "requested": 9, "used": 9,
        "skipped": {}, "duplicates": samples.notes["duplicates"], "max_seq_length": 64,
        "chat_template": False}
    assert len(rows) == 64 and str(tmp_path) not in json.dumps(samples.notes)
    assert "First sample" in caplog.text and "w0" in caplog.text


def test_a_file_that_another_was_copied_over_is_read_again(tmp_path, model):
    """With its time of modification, as `cp -p` and `rsync -t` do."""
    spec = CalibrationSpec(str(tmp_path / "rows.jsonl"), num_samples=4)
    digests = set()
    for word in ("w1", "w2"):
        file = tmp_path / f"{word}.jsonl"
        file.write_text(json.dumps({"text": f"{word} {word}"}) + "\n")
        os.utime(file, (1_000_000_000, 1_000_000_000))
        shutil.copy2(file, spec.dataset)
        digests.add(load_samples(spec, model, llama()).digest)
    assert len(digests) == 2
