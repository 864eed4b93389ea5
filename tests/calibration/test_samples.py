"""Calibration rows as one model's tensors: content, limits, batches, and refusals."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import datasets
import numpy
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mergekit_pave.calibration import samples as data
from mergekit_pave.calibration.limits import is_text_encoder, length_limit
from mergekit_pave.calibration.samples import Samples, batches, load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CalibrationSpec

PAD, BOS, EOS, UNK = range(4)
WORDS = {f"w{i}": 4 + i for i in range(40)} | {"user": 44, "assistant": 45, ":": 46}
VOCABULARY = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK, **WORDS}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ m.role }} : {{ m.content }} {% endfor %}")


def save_tokenizer(folder, framed="<s> $A", pair="<s> $A </s> $B </s>", **options):
    """A word-level tokenizer; `framed` says which special tokens it adds to a text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=framed, pair=pair.replace("$B </s>", "$B:1 </s>:1"),
        special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.enable_padding(length=32)  # what some published tokenizers were saved with
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", **options).save_pretrained(folder)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def model(tmp_path):
    save_tokenizer(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def load(tmp_path, model):
    """Write rows to a file and load them for a model: `load(rows, config, max_seq_length=8)`."""
    def load(rows, config=None, path=model, **spec):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_samples(CalibrationSpec(str(file), **spec), path, config or llama())

    return load


def llama(**options):
    return transformers.LlamaConfig(
        **{"vocab_size": 48, "max_position_embeddings": 64, "hidden_size": 8,
           "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, **options})


def bert(kind=transformers.BertConfig, **options):
    return kind(**{"vocab_size": 48, "max_position_embeddings": 64, "hidden_size": 8,
                   "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
                   **options})


def t5(**options):
    return transformers.T5Config(vocab_size=48, d_model=8, **options)


def ids(samples, name="input_ids"):
    return [item[name].tolist() for item in samples.items]


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def tokens(*numbers):
    return [4 + n for n in numbers]


# Text


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
    assert "Skipped" in caplog.text


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


# Chats


@pytest.fixture
def chatty(tmp_path):
    save_tokenizer(tmp_path / "chatty", chat_template=TEMPLATE)
    return str(tmp_path / "chatty")


MESSAGES = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SHARED = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "w1"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}]


@pytest.mark.parametrize("column, chat, asked", [
    ("messages", MESSAGES, "text"), ("conversations", SHARED, "text"),
    ("dialogue", SHARED, "dialogue"), ("messages", PARTS, "messages")])
def test_chats_use_the_models_own_template(load, chatty, column, chat, asked):
    samples = load([{column: chat}], path=chatty, text_column=asked)
    assert ids(samples) == [[BOS, 44, 46, *tokens(1), 45, 46, *tokens(2)]]  # a single BOS
    assert samples.notes["chat_template"] is True
    assert load([{"text": "w1"}], path=chatty).notes["chat_template"] is False


def test_chat_without_a_template(load, model):
    with pytest.raises(PaveError, match=f"tokenizer of {model} has no chat template; add a "
                                        "chat_template.jinja .* or name a column of plain text"):
        load([{"messages": MESSAGES}])


def test_rows_that_the_template_refuses_are_skipped(load, chatty):
    refused = [{"role": "system", "content": "w9"}, *MESSAGES]
    samples = load([{"messages": refused}, {"messages": MESSAGES}], path=chatty)
    assert samples.notes["skipped"] == {"refused by the chat template": 1}
    with pytest.raises(PaveError, match=r"refused by the chat template \(no system\): 1"):
        load([{"messages": refused}], path=chatty)


@pytest.mark.parametrize("messages, problem", [
    ([{"role": "narrator", "content": "secret"}], "a message with an unknown role ('narrator')"),
    ([{"content": "secret"}], "a message with an unknown role (None)"),
    ([{"role": "user", "content": [{"type": "secret"}]}],
     "a message whose content is not text ([{'type': str}])"),
    ([{"role": "user", "content": None}], "a message whose content is not text (NoneType)"),
])
def test_strange_messages_are_skipped_and_their_text_not_shown(load, chatty, messages, problem):
    samples = load([{"messages": messages}, {"messages": MESSAGES}], path=chatty)
    assert samples.notes["skipped"] == {problem.partition(" (")[0]: 1}
    with pytest.raises(PaveError, match=re.escape(problem)) as raised:
        load([{"messages": messages}], path=chatty)
    assert "secret" not in raised.value.message


def test_a_template_that_writes_the_date_gives_the_same_rows_every_day(load, tmp_path):
    save_tokenizer(tmp_path / "dated", chat_template=(
        "{{ strftime_now('%f') }} {% for m in messages %}{{ m.content }} {% endfor %}"))
    once, again = (load([{"messages": MESSAGES}], path=tmp_path / "dated") for _ in range(2))
    assert once.digest == again.digest


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_needs_no_text(load, chatty, key):
    call = [MESSAGES[0], {"role": "assistant", "content": None, key: [{"name": "w2"}]}]
    assert load([{"messages": call}], path=chatty).notes["skipped"] == {}


def test_negative_token_ids(load, model):
    with pytest.raises(PaveError, match="the token id -1; .* attention_mask"):
        load([{"input_ids": [5, 6, -1]}], text_column="input_ids")


@pytest.mark.parametrize("value, problem", [
    ("[{'role': 'user'}]", "holds str"), (["a", "b"], "holds \\[str, ... 2 in all\\]"),
    ({"en": "a"}, "holds {'en': str}")])
def test_columns_of_another_shape(load, chatty, value, problem):
    with pytest.raises(PaveError, match=f"'messages' {problem}, which cannot be read"):
        load([{"messages": value}], path=chatty)


def test_empty_chats_are_skipped_and_tool_calls_reach_the_template(load, tmp_path):
    save_tokenizer(tmp_path / "tools", chat_template=(
        "{% for m in messages %}{{ m.content }} {% if m.tool_calls is defined %}"
        "{{ m.tool_calls[0].name }} {% endif %}{% endfor %}"))
    call = [{"role": "user", "content": "w1"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "w2"}]}]
    samples = load([{"messages": []}, {"messages": call}], path=tmp_path / "tools")
    assert ids(samples) == [tokens(1, 2)] and samples.notes["skipped"] == {"empty": 1}


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


# Images


@pytest.fixture
def vit(tmp_path):
    folder = tmp_path / "vit"
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def vit_config(**options):
    return transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=8, **options)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        Image.new(mode, (5 + i, 9), i).save(folder / f"{i}.png")
    return folder


def test_image_folder(pictures, vit):
    samples = load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    assert samples.tokens == len(samples.items) == 4
    assert all(item["pixel_values"].shape == (3, 8, 8) for item in samples.items)
    batch, = batches(samples, 8)
    assert set(batch) == {"pixel_values"} and batch["pixel_values"].shape == (4, 3, 8, 8)


def test_saved_images_and_broken_ones(tmp_path, vit, caplog):
    good = Image.fromarray(numpy.zeros((4, 4, 3), numpy.uint8))
    features = datasets.Features({"img": datasets.Image()})
    rows = [{"img": good}, {"img": None}, {"img": {"bytes": b"broken", "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    samples = load_samples(CalibrationSpec(str(tmp_path / "saved")), vit, vit_config())
    assert len(samples.items) == 1
    assert samples.notes["skipped"] == {"empty": 1, "not a readable image": 1}


def test_image_paths_start_at_the_file_that_names_them(load, pictures, vit):
    rows = [{"file": "pictures/0.png"}, {"file": str(pictures / "1.png")}, {"file": "gone.png"}]
    samples = load(rows, vit_config(), path=vit, text_column="file")
    assert len(samples.items) == 2 and samples.notes["skipped"] == {"not a readable image": 1}


def test_images_that_the_processor_refuses_are_skipped(pictures, vit, monkeypatch):
    def refuse(self, images, **options):
        if images.size[0] == 5:
            raise ValueError("too narrow")
        return original(self, images=images, **options)

    kind = type(transformers.AutoImageProcessor.from_pretrained(vit))
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", refuse)
    samples = load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    assert samples.notes["skipped"] == {"refused by the image processor": 1}


def test_images_and_text_do_not_mix(load, pictures, vit, model):
    with pytest.raises(PaveError, match="takes images, but text_column 'text' holds text"):
        load([{"text": "w1 w2."}], vit_config(), path=vit)
    with pytest.raises(PaveError, match="takes images, but text_column names 2 columns"):
        load([{"a": "w1", "b": "w2"}], vit_config(), path=vit, text_column="a,b")
    with pytest.raises(PaveError, match="model takes text, and .*pictures' has images"):
        load_samples(CalibrationSpec(str(pictures)), model, llama())
    with pytest.raises(PaveError, match="holds images, but no image processor could be loaded"):
        load_samples(CalibrationSpec(str(pictures)), model, vit_config())
    with pytest.raises(PaveError, match="takes input_features, and calibration data can be text"):
        load([{"text": "w1"}], transformers.WhisperConfig())


def test_missing_pillow(load, monkeypatch, pictures, vit):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(PaveError, match=r"pip install mergekit-pave\[vision\]"):
        load_samples(CalibrationSpec(str(pictures)), vit, vit_config())
    with pytest.raises(PaveError, match=r"pip install mergekit-pave\[vision\]"):
        load([{"text": "0.png"}], vit_config(), path=vit)


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
    with pytest.raises(PaveError, match="no tokenizer could be loaded for org/model \\(gated\\)"):
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
