"""What is published says nothing that was given in confidence."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers import make_store
from helpers.cards import HUB, make_output

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import name_of
from mergekit_pave.publish import card as cards
from mergekit_pave.publish.card import write_card
from mergekit_pave.publish.store_card import store_card


@pytest.mark.parametrize(("url", "public"), [
    ("https://me:secret@host.org/data.jsonl", "https://host.org/data.jsonl"),
    ("https://host.org/data.jsonl?X-Signature=secret&a=b", "https://host.org/data.jsonl"),
    ("https://me:secret@host.org:8080/a/b.csv#secret", "https://host.org:8080/a/b.csv"),
    ("https://secret@host.org", "https://host.org"),
    ("https://host.org?secret", "https://host.org"),
    ("zip://a.csv::https://me:secret@host.org/b.zip?secret=1",
     "zip://a.csv::https://host.org/b.zip"),
    ("hf://datasets/me/data@main/a.csv", "hf://datasets/me/data@main/a.csv"),
    ("openai/gsm8k", "openai/gsm8k"),
])
def test_urls_lose_what_may_be_secret(url, public):
    assert name_of(url) == public


def test_no_password_in_card_configuration_or_record(tmp_path):
    url = "https://me:hunter2@host.org/rows.jsonl?key=hunter3"
    source = HUB.replace("code.jsonl", f'"{url}"') + f"# first tried with {url}\n"
    out = make_output(tmp_path / "out", source)
    write_card(out)
    for file in out.iterdir():
        assert "hunter2" not in file.read_text("utf-8"), file
    config = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    assert config["models"][2]["parameters"]["calibration_dataset"] == (
        "https://host.org/rows.jsonl")
    assert "hunter3" not in (out / "README.md").read_text("utf-8")
    record = json.loads((out / "pave_report.json").read_text("utf-8"))
    assert record["models"][2]["data"]["dataset"] == "https://host.org/rows.jsonl"
    assert "hunter" not in store_card(make_store(tmp_path / "s", dataset=name_of(url)))


def test_no_path_in_settings(tmp_path):
    """Tokenizers keep the folder that they were loaded from, and mergekit copies that."""
    out = make_output(tmp_path / "out", HUB)
    path = str(tmp_path / "private" / "base")
    told = {"config.json": {"_name_or_path": path, "text_config": {"_name_or_path": path}},
            "tokenizer_config.json": {"name_or_path": path, "vocab_file": f"{path}/vocab.txt"},
            "generation_config.json": {"_name_or_path": path}}
    for name, values in told.items():
        (out / name).write_text(json.dumps({"kept": ["/a", 1], **values}))
    (out / "preprocessor_config.json").write_text("no JSON")
    write_card(out)
    for name in told:
        text = (out / name).read_text("utf-8")
        assert str(tmp_path) not in text and json.loads(text)["kept"] == ["/a", 1]
    assert json.loads((out / "tokenizer_config.json").read_text())["vocab_file"] == "vocab.txt"
    assert (out / "preprocessor_config.json").read_text() == "no JSON"


@pytest.mark.parametrize("writes", range(2))
def test_a_card_that_was_cut_short_is_completed_by_the_next_run(tmp_path, monkeypatch, writes):
    """Killed before either of its two files: none with a path is left after another run."""
    private = str(tmp_path / "private folder" / "math.jsonl")
    source = HUB.replace("code.jsonl", json.dumps(private))
    out = make_output(tmp_path / "out", source)
    assert private in (out / "README.md").read_text("utf-8")
    real, done = cards.write_text, []

    def killed(*args):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(real(*args))

    monkeypatch.setattr(cards, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_card(out)
    monkeypatch.undo()
    write_card(out)
    for file in out.iterdir():
        assert str(tmp_path) not in file.read_text("utf-8"), file


def test_a_card_that_names_nothing_any_more_is_no_error(tmp_path):
    out = make_output(tmp_path / "out", HUB)
    assert write_card(out) == write_card(out)
    (out / "mergekit_config.yml").write_text("[]")
    with pytest.raises(PaveError, match="holds no merge configuration"):
        write_card(out)
