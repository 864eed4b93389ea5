"""Values of rows: joined columns, odd images, endless streams, and what is said of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import transformers
from helpers import write_images, write_tokenizer
from PIL import Image

from mergekit_pave.calibration import samples as sampling
from mergekit_pave.calibration.rows import Rows, SkipRow
from mergekit_pave.calibration.samples import load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CalibrationSpec

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
ASKED = [{"role": "user", "content": "w1 w2"}]
ANSWERED = [{"role": "assistant", "content": "w3"}]


@pytest.fixture
def model(tmp_path) -> Path:
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def config(kind: str = "LlamaConfig", **settings) -> transformers.PretrainedConfig:
    return getattr(transformers, kind)(vocab_size=94, max_position_embeddings=64, **settings)


def load(tmp_path: Path, model: Path, rows: list[dict], columns: str, config=None):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = CalibrationSpec(str(file), text_column=columns)
    return load_samples(spec, model, config or globals()["config"]())


def read(tmp_path, model, row: dict, columns: str) -> str:
    (item,) = load(tmp_path, model, [row], columns).items
    return transformers.AutoTokenizer.from_pretrained(model).decode(
        item["input_ids"], skip_special_tokens=True)


def test_chats_in_several_columns_are_one_chat(tmp_path, model):
    together = load(tmp_path, model, [{"messages": ASKED + ANSWERED}], "messages")
    rows = [{"prompt": ASKED, "completion": ANSWERED}]
    apart = load(tmp_path, model, rows, "prompt,completion")
    assert apart.digest == together.digest and apart.notes["chat_template"] is True
    for empty in ([], None):
        rows = [{"prompt": ASKED, "completion": ANSWERED, "note": None},
                {"prompt": ASKED + ANSWERED, "completion": empty, "note": None}]
        loaded = load(tmp_path, model, rows, "prompt,completion,note")
        assert len(loaded.items) == 2 and loaded.notes["duplicates"] == 1


@pytest.mark.parametrize("row, holds", [
    ({"prompt": ASKED, "completion": "w3"}, "'completion' holds str"),
    ({"prompt": "w3", "completion": ASKED}, "'prompt' holds str"),
    ({"prompt": ["w1", "w2"], "completion": "w3"}, r"'prompt' holds \[str"),
    ({"prompt": [1, 2], "completion": [3]}, r"'prompt' holds \[int"),
])
def test_lists_that_make_no_chat_together_are_named(tmp_path, model, row, holds):
    with pytest.raises(PaveError, match=f"text_column {holds}.* cannot be read"):
        load(tmp_path, model, [row], "prompt,completion")


@pytest.mark.parametrize("kind", ["LlamaConfig", "BertConfig"])
def test_a_number_beside_text_is_read_as_it_is_written(tmp_path, model, kind):
    as_text, as_number = (
        load(tmp_path, model, [{"q": "w1", "a": answer}], "q,a", config(kind))
        for answer in ("5", 5))
    assert as_text.digest == as_number.digest


def test_numbers_of_a_csv_with_gaps_keep_their_form(tmp_path, model):
    file = tmp_path / "rows.csv"
    file.write_text("q,a\nw1,5\nw1,\n")
    loaded = load_samples(CalibrationSpec(str(file), text_column="q,a"), model, config())
    wanted = load(tmp_path, model, [{"q": "w1", "a": "5"}, {"q": "w1", "a": ""}], "q,a")
    assert {len(item["input_ids"]) for item in loaded.items} == {
        len(item["input_ids"]) for item in wanted.items}


@pytest.mark.parametrize("row, columns, kind", [
    ({"text": 7}, "text", "int"), ({"text": 7.5}, "text", "float"),
    ({"text": True}, "text", "bool"), ({"q": "w1", "a": True}, "q,a", "bool"),
    ({"q": "w1", "a": {"b": 1}}, "q,a", "{'b': int}")])
def test_what_a_value_is_instead_of_text_is_said(tmp_path, model, row, columns, kind):
    with pytest.raises(PaveError) as caught:
        load(tmp_path, model, [row], columns)
    assert f"not text ({kind}): 1" in str(caught.value)


def test_what_a_manifest_says_of_skipped_rows_has_no_words_of_them(tmp_path, model):
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'secret' %}{{ raise_exception(m.content) }}"
        "{% endif %}{{ m.content }} {% endfor %}")
    rows = [{"messages": ASKED}, {"messages": [{"role": "secret", "content": "w1"}]},
            {"messages": [{"role": "user", "content": "secret"}]},
            {"messages": [{"role": "user", "content": {"secret": 1}}]}]
    notes = load(tmp_path, model, rows, "messages").notes
    assert sum(notes["skipped"].values()) == 3 and "secret" not in json.dumps(notes)


# Images


@pytest.mark.parametrize("fault", [
    SyntaxError("broken PNG"), struct.error("unpack"), EOFError(), KeyError("tag"), IndexError(),
    Image.DecompressionBombError("too large"), TypeError("None"), ZeroDivisionError()])
@pytest.mark.parametrize("when", ["load", "convert"])
def test_whatever_pillow_raises_is_one_image_that_is_skipped(
    tmp_path, monkeypatch, families, fault, when
):
    folder = write_images(tmp_path / "images", 6)
    Image.new("RGB", (5, 5)).save(folder / "odd.png")
    original = getattr(Image.Image, when)

    def broken(self, *args, **kwargs):
        if self.size == (5, 5):
            raise fault
        return original(self, *args, **kwargs)

    vit = families("vit")["base"]
    # Of a PNG file `load` is the reader's own.
    kind = type(Image.open(folder / "odd.png")) if when == "load" else Image.Image
    original = getattr(kind, when)
    monkeypatch.setattr(kind, when, broken)
    loaded = load_samples(
        CalibrationSpec(str(folder)), vit, transformers.AutoConfig.from_pretrained(vit))
    assert len(loaded.items) == 6 and loaded.notes["skipped"] == {"not a readable image": 1}


# Streams


class Endless:
    """A stream with usable rows at its beginning only."""

    def __init__(self, usable: int):
        self.usable, self.read = usable, 0

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict]:
        while True:
            self.read += 1
            yield {"text": "w1" if self.read <= self.usable else ""}


@pytest.mark.parametrize("usable", [0, 1, 3])
def test_an_endless_stream_is_given_up_when_nothing_usable_comes(monkeypatch, usable):
    monkeypatch.setattr(sampling, "GIVE_UP", 50)
    stream = Endless(usable)
    rows = Rows(CalibrationSpec("web/corpus"), stream, ("text",), False, None)

    def encoder(row):
        if not row["text"]:
            raise SkipRow("empty")
        return row

    if usable:
        items, indices, skipped, _ = sampling._encode(rows, encoder, rows.spec.num_samples)
        assert len(items) == len(indices) == usable and skipped == {"empty": 50}
    else:
        with pytest.raises(PaveError, match="empty: 50"):
            sampling._encode(rows, encoder, rows.spec.num_samples)
    assert stream.read == usable + 50


def test_rows_of_a_finite_dataset_are_all_tried(monkeypatch):
    monkeypatch.setattr(sampling, "GIVE_UP", 2)
    data = datasets.Dataset.from_dict({"text": ["w1"] + [""] * 20 + ["w2"]})
    rows = Rows(CalibrationSpec("x", num_samples=2), data, ("text",), False, None)
    kept = SimpleNamespace(draw=lambda: iter(enumerate(data)), spec=rows.spec,
                           streamed=rows.streamed, columns=rows.columns)

    def encoder(row):
        if not row["text"]:
            raise SkipRow("empty")
        return row

    assert len(sampling._encode(kept, encoder, kept.spec.num_samples)[0]) == 2


# Folders of unlike files


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("files", [
    {"a.jsonl": jsonl({"text": "a"}), "b.jsonl": jsonl({"other": 1})},
    {"a.jsonl": jsonl({"text": "a"}), "b.jsonl": jsonl({"text": "a", "other": 1})},
    {"a.jsonl": jsonl({"text": "a", "n": 1}), "b.jsonl": jsonl({"text": "a", "n": "one"})},
    {"a.jsonl": jsonl({"text": "a", "n": {"a": 1}}),
     "b.jsonl": jsonl({"text": "a", "n": {"b": 1}})},
    {"a.jsonl": jsonl({"text": "a"}), "b.jsonl": jsonl({"text": ["a"]})},
    {"a.csv": "text\na\n", "b.csv": "text,other\na,b\n"},
    {"a.csv": "n,text\n1,a\n", "b.csv": "n,text\none,a\n"},
])
def test_a_folder_of_unlike_files_is_called_one(tmp_path, model, files):
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / "data" / name).write_text(text)
    with pytest.raises(PaveError, match="has files with different columns or types"):
        load_samples(CalibrationSpec(str(tmp_path / "data")), model, config())


def test_a_folder_of_several_kinds_of_files_is_warned_about(tmp_path, model, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("text\nw1\n")
    (tmp_path / "data" / "b.jsonl").write_text(jsonl({"text": "w2"}))
    load_samples(CalibrationSpec(str(tmp_path / "data")), model, config())
    assert "files of several kinds (csv, json)" in caplog.text
