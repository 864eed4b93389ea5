"""Names of data that a glob, a chain of archives or a URL would read as something else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from helpers import write_images

from mergekit_pave.calibration.literal import literal_url
from mergekit_pave.calibration.rows import open_rows
from mergekit_pave.recipe.parameters import CalibrationSpec

# Each with a neighbour that the name would match, or be taken for, as a pattern.
NAMES = [("rows[1]", "rows1"), ("part*", "part-2"), ("row?", "rows"), ("[v2] math", "v math"),
         ("[!a]", "b"), ("**", "deep"), ("{a,b}", "a"), ("a::b", "a"), ("50%20off", "50 off"),
         ("#1", "1"), ("tab\there", "tab"), ("line\nbreak", "line")]


@pytest.fixture(autouse=True)
def own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "rows-cache")


def write_rows(file: Path, word: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(4))
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif file.suffix == ".csv":
        file.write_text("text\n" + "".join(f"{word} {i}\n" for i in range(4)))
    else:
        file.write_text(text)
    return file


def words(path: Path, split: str = "train") -> set[str]:
    rows = open_rows(CalibrationSpec(str(path), split=split))
    return {row["text"].split()[0] for _, row in rows.draw()}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize("name, other", NAMES)
def test_a_file_is_the_one_that_is_named(tmp_path, name, other, ending):
    write_rows(tmp_path / f"{other}{ending}", "OTHER")
    assert words(write_rows(tmp_path / f"{name}{ending}", "mine")) == {"mine"}


@pytest.mark.parametrize("name, other", NAMES)
def test_a_folder_is_the_one_that_is_named(tmp_path, name, other):
    write_rows(tmp_path / other / "train.jsonl", "OTHER")
    write_rows(tmp_path / name / "train.jsonl", "mine")
    write_rows(tmp_path / name / "data" / "test.jsonl", "held-out")
    assert words(tmp_path / name) == {"mine"}
    assert words(tmp_path / name, "test") == {"held-out"}
    assert words(tmp_path / name / "train.jsonl") == {"mine"}


@pytest.mark.parametrize("name, other", NAMES)
def test_a_saved_dataset_is_the_one_that_is_named(tmp_path, name, other):
    for folder, word in ((other, "OTHER"), (name, "mine")):
        datasets.Dataset.from_dict({"text": [f"{word} {i}" for i in range(4)]}).save_to_disk(
            str(tmp_path / "plain"))
        (tmp_path / "plain").rename(tmp_path / folder)
    assert words(tmp_path / name) == {"mine"}


@pytest.mark.parametrize("name, other", NAMES)
def test_files_inside_a_folder_keep_their_names(tmp_path, name, other):
    write_rows(tmp_path / "data" / f"{name}.jsonl", "mine")
    assert words(tmp_path / "data") == {"mine"}


def test_a_file_that_changed_is_read_again(tmp_path):
    file = write_rows(tmp_path / "rows[1].jsonl", "first")
    assert words(file) == {"first"}
    write_rows(file, "other")
    assert words(file) == {"other"}
    folder = write_rows(tmp_path / "[v2]" / "rows.jsonl", "first").parent
    assert words(folder) == {"first"}
    write_rows(folder / "rows.jsonl", "other")
    assert words(folder) == {"other"}


@pytest.mark.parametrize("name, other", NAMES)
def test_a_file_by_its_uri(tmp_path, name, other):
    write_rows(tmp_path / f"{other}.jsonl", "OTHER")
    spec = CalibrationSpec(write_rows(tmp_path / f"{name}.jsonl", "mine").as_uri())
    assert {row["text"].split()[0] for _, row in open_rows(spec).draw()} == {"mine"}


def test_addresses_hold_no_patterns():
    assert literal_url("https://host/a[1]*.jsonl?x=1") == "https://host/a%5B1%5D%2A.jsonl?x=1"
    assert literal_url("hf://datasets/a/b/part*.jsonl") == "hf://datasets/a/b/part*.jsonl"


def test_images_of_a_folder_with_such_a_name(tmp_path):
    rows = open_rows(CalibrationSpec(str(write_images(tmp_path / "[v2] images"))))
    found = [row[rows.columns[0]] for _, row in rows.draw()]
    assert rows.image and len(found) == 12
    assert all(Path(image["path"]).is_file() for image in found)
