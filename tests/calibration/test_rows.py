"""Opening calibration datasets: which rows are drawn, and one sentence for every failure."""

import json
import random
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from mergekit_pave.calibration.rows import STREAM_ABOVE, open_rows, permutation
from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import local_path
from mergekit_pave.recipe.parameters import CalibrationSpec

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def texts(spec):
    return [row["text"] for _, row in open_rows(spec).draw()]


TEN = [{"text": f"row {i}", "label": i} for i in range(10)]


def test_spec_reads_the_yaml_keys():
    spec = CalibrationSpec.from_parameters({
        "calibration_dataset": "a.jsonl", "calibration_config": None,
        "calibration_split": "train[:5%]", "text_column": "q,a", "num_calibration_samples": 3.0,
        "max_seq_length": 7, "calibration_batch_size": 2, "calibration_seed": 0, "weight": 1})
    assert spec == CalibrationSpec("a.jsonl", None, "train[:5%]", "q,a", 3, 7, 2, 0)
    defaults = CalibrationSpec.from_parameters({"calibration_dataset": "a.jsonl"})
    assert defaults == CalibrationSpec("a.jsonl", None, "train", "text", 128, 2048, 8, 42)
    with pytest.raises(PaveError, match="calibration_dataset is missing"):
        CalibrationSpec.from_parameters({})
    with pytest.raises(PaveError, match="num_calibration_samples must be at least 1"):
        CalibrationSpec.from_parameters(
            {"calibration_dataset": "a", "num_calibration_samples": 0})


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_permutation_is_one(n):
    state = random.getstate()
    assert sorted(permutation(n, 3)) == list(range(n))
    assert random.getstate() == state


def test_permutation_is_the_same_everywhere_and_uniform():
    assert list(permutation(10, 42)) == [1, 0, 6, 4, 5, 2, 3, 9, 8, 7]
    firsts = [next(permutation(4, seed)) for seed in range(2000)]
    assert all(400 < firsts.count(i) < 600 for i in range(4))
    assert next(permutation(10**15, 0)) < 10**15


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", TEN),
    ("a.JSONL", TEN),
    ("a.json", json.dumps(TEN)),
    ("a.csv", "text,label\n" + "".join(f"row {i},{i}\n" for i in range(10))),
    ("a.tsv", "text\tlabel\n" + "".join(f"row {i}\t{i}\n" for i in range(10))),
    ("a.txt", "".join(f"row {i}\n" for i in range(10))),
    ("bom.txt", "\ufeff" + "".join(f"row {i}\n" for i in range(10))),
    ("bom.csv", '\ufeff"text"\n' + "".join(f"row {i}\n" for i in range(10))),
])
def test_local_files(write, name, content):
    path = write(name, content)
    assert sorted(texts(CalibrationSpec(path))) == sorted(row["text"] for row in TEN)
    assert len(texts(CalibrationSpec(path, split="train[:50%]"))) == 5


def test_parquet_and_gzip(tmp_path, write):
    import gzip

    datasets.Dataset.from_list(TEN).to_parquet(tmp_path / "a.parquet")
    assert len(texts(CalibrationSpec(str(tmp_path / "a.parquet")))) == 10
    write("b.jsonl.gz", gzip.compress(json.dumps(TEN[0]).encode()))
    assert texts(CalibrationSpec(str(tmp_path / "b.jsonl.gz"))) == ["row 0"]


def test_relative_and_home_paths(write, tmp_path, monkeypatch):
    write("a.jsonl", TEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "./a.jsonl", "~/a.jsonl"):
        assert len(texts(CalibrationSpec(name))) == 10


def test_what_counts_as_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for name in ("x.jsonl", "./x", "~/x", "/x", "a/b/c", "gsm8k", "x.csv.gz"):
        assert local_path(name) is not None, name
    for name in ("openai/gsm8k", "imdb", "https://example.org/x.jsonl"):
        assert local_path(name) is None, name


def test_folder_of_data_files(write, tmp_path):
    write("folder/train.jsonl", TEN[:3])
    write("folder/test.jsonl", TEN[3:])
    assert len(texts(CalibrationSpec(str(tmp_path / "folder")))) == 3
    with pytest.raises(PaveError, match="no split 'dev'; set calibration_split to one of 'train'"):
        open_rows(CalibrationSpec(str(tmp_path / "folder"), split="dev"))
    with pytest.raises(PaveError, match="no configuration 'x'; set calibration_config to one of "
                                        "'default'"):
        open_rows(CalibrationSpec(str(tmp_path / "folder"), config="x"))


def test_saved_dataset(tmp_path):
    data = datasets.Dataset.from_list(TEN).with_format("torch")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(
        tmp_path / "dict")
    assert len(texts(CalibrationSpec(str(tmp_path / "one"), split="train[:3]"))) == 3
    assert len(texts(CalibrationSpec(str(tmp_path / "dict"), split="test"))) == 4
    assert len(texts(CalibrationSpec(str(tmp_path / "dict"), split="train[:2]+test"))) == 6
    (_, row), *_ = open_rows(CalibrationSpec(str(tmp_path / "one"), text_column="label")).draw()
    assert type(row["label"]) is int  # no tensors, whatever format it was saved with
    with pytest.raises(PaveError, match="no split 'dev'.*'train', 'test'"):
        open_rows(CalibrationSpec(str(tmp_path / "dict"), split="dev"))


def test_one_saved_split_goes_by_its_name_and_by_train(tmp_path):
    data = datasets.Dataset.from_list(TEN, split="validation")
    data.save_to_disk(tmp_path / "one")
    assert len(texts(CalibrationSpec(str(tmp_path / "one")))) == 10
    assert len(texts(CalibrationSpec(str(tmp_path / "one"), split="validation[:4]"))) == 4


def test_draw_is_seeded_and_leaves_the_global_state_alone(write):
    path = write("a.jsonl", TEN)
    state = random.getstate()
    first = texts(CalibrationSpec(path))
    assert first == texts(CalibrationSpec(path))
    assert first != texts(CalibrationSpec(path, seed=1))
    assert first != [row["text"] for row in TEN]
    assert random.getstate() == state


def test_columns(write):
    path = write("a.jsonl", [{"question": "q", "answer": "a", "n,m": "both", "messages": []}])

    def columns(name):
        return open_rows(CalibrationSpec(path, text_column=name)).columns

    assert columns("question, answer") == ("question", "answer")
    assert columns("n,m") == ("n,m",)
    assert columns("text") == ("messages",)  # the default falls back to a chat
    with pytest.raises(PaveError, match="no column 'body'; set text_column to .*'question'"):
        columns("body")
    with pytest.raises(PaveError, match="no column 'reply'"):
        columns("question,reply")


def test_default_column_missing(write):
    path = write("a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(PaveError, match="no column 'text'; set text_column .*'question', 'answer'"):
        open_rows(CalibrationSpec(path))


def test_token_rows_keep_their_mask(write):
    path = write("a.jsonl", [{"input_ids": [1, 2], "attention_mask": [1, 0], "x": 1}])
    (_, row), = open_rows(CalibrationSpec(path, text_column="input_ids")).draw()
    assert row == {"input_ids": [1, 2], "attention_mask": [1, 0]}


def test_image_folder_is_found_by_its_one_image_column(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / label / "1.png")
    rows = open_rows(CalibrationSpec(str(tmp_path / "pictures")))
    assert rows.image and rows.columns == ("image",) and rows.count == 2
    assert {"bytes", "path"} == set(next(rows.draw())[1]["image"])


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"damaged: a.jsonl, line 2 is not JSON"),
    ("a.jsonl", '{"text": "a"}\n[1, 2]\n', r"damaged: a.jsonl, line 2 is not a JSON object"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl, line 2 is not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800 b"}\n', r"line 2 holds half a character"),
    ("a.json", '[{"text": "a"},\n{"text": }]', r"damaged: a.json, line 2 is not JSON"),
    ("a.txt", "good\nthr\u00e9e\n".encode("latin-1"), r"a.txt, line 2 is not UTF-8"),
    ("a.csv", "text,label\na,1\nb,2,3,4\n", r"could not be read: .*line 3"),
    ("a.parquet", b"no parquet", r"could not be read: Parquet"),
    ("a.jsonl", "", r"is an empty file"),
    ("a.jsonl", "\n", r"has no rows"),
    ("a.csv", "text\n", r"no rows in split 'train'"),
    ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
     r"a.txt is a Git LFS pointer"),
    ("a.xlsx", "x", r"not a kind of file that can be read; name a local .jsonl"),
])
def test_unreadable_files(write, name, content, sentence):
    with pytest.raises(PaveError, match=sentence) as raised:
        list(open_rows(CalibrationSpec(write(name, content))).draw())
    assert "\n" not in raised.value.message
    assert "calibration_dataset" in raised.value.message


def test_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PaveError, match=f"does not exist .*{tmp_path / 'data' / 'x.jsonl'}"):
        open_rows(CalibrationSpec("data/x.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PaveError, match="has no data files"):
        open_rows(CalibrationSpec("./empty"))


def test_splits_and_configurations_of_one_file(write):
    path = write("a.jsonl", TEN)
    with pytest.raises(PaveError, match="no split 'test'; set calibration_split to one of 'train'"):
        open_rows(CalibrationSpec(path, split="test"))
    with pytest.raises(PaveError, match="'train\\[:x\\]' of .* is not a split; write it as"):
        open_rows(CalibrationSpec(path, split="train[:x]"))
    with pytest.raises(PaveError, match="has no rows in split 'train\\[:0\\]'"):
        open_rows(CalibrationSpec(path, split="train[:0]"))
    with pytest.raises(PaveError, match="calibration_config 'main' means nothing"):
        open_rows(CalibrationSpec(path, config="main"))


def test_files_with_different_columns(write, tmp_path):
    write("folder/train-1.csv", "text\na\n")
    write("folder/train-2.csv", "other,label\na,1\n")
    with pytest.raises(PaveError, match="different columns or types; name one file"):
        open_rows(CalibrationSpec(str(tmp_path / "folder")))


def test_dataset_script(write, tmp_path):
    write("corpus/corpus.py", "import datasets\n")
    with pytest.raises(PaveError, match="dataset script.*convert it to Parquet"):
        open_rows(CalibrationSpec(str(tmp_path / "corpus")))


@pytest.mark.parametrize("error, sentence", [
    (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
     "could not be reached on the Hub; check .*HF_HUB_OFFLINE.*or name a local .jsonl"),
    (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
     "is gated on the Hub; accept its terms"),
    (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or c"),
     "neither a file or folder here nor a dataset you can read"),
    (ValueError("Config name is missing.\nPlease pick one among the available configs: "
                "['main', 'socratic']\nExample"), "set calibration_config to one of 'main', 'soc"),
    (ValueError("BuilderConfig 'c' not found. Available: ['main', 'socratic']"),
     "no configuration 'c'; set calibration_config to one of 'main', 'socratic'"),
    (ValueError("Couldn't find cache for a/b for config 'c'\nAvailable configs in the cache: "
                "['main']"), "not in the offline cache \\(cached: 'main'\\)"),
    (ModuleNotFoundError("No module named 'aiohttp'"), "needs the Python package aiohttp; install"),
    (RuntimeError("Something\nnobody foresaw"), "could not be read: Something; repair it"),
])
def test_hub_failures(monkeypatch, error, sentence):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(PaveError, match=sentence) as raised:
        open_rows(CalibrationSpec("a/b", config="c"))
    assert "\n" not in raised.value.message and raised.value.__cause__ is error


class _Hub:
    """Stands in for the Hub: a dataset of ten rows that reports a size."""

    def __init__(self, monkeypatch, size, offline=False):
        self.streaming = None
        builder = type("Builder", (), {"info": datasets.DatasetInfo(download_size=size)})
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: builder)
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)

    def load(self, path, config, split, streaming=False):
        self.streaming = streaming
        data = datasets.Dataset.from_list(TEN)
        return data.to_iterable_dataset() if streaming else data


@pytest.mark.parametrize("size, offline, split, streamed", [
    (10, False, "train", False),
    (STREAM_ABOVE + 1, False, "train", True),
    (None, False, "train", True),
    (None, True, "train", False),
    (None, False, "train[:5]", False),
])
def test_large_hub_datasets_are_streamed(monkeypatch, size, offline, split, streamed):
    hub = _Hub(monkeypatch, size, offline)
    spec = CalibrationSpec("a/b", split=split)
    rows = open_rows(spec)
    assert rows.streamed == hub.streaming == streamed
    assert rows.count == (None if streamed else 10)
    drawn = texts(spec)
    assert sorted(drawn) == sorted(row["text"] for row in TEN)
    assert drawn == texts(spec) != texts(CalibrationSpec("a/b", split=split, seed=7))


def test_failures_while_streaming_are_explained(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("lost")

    _Hub(monkeypatch, None)
    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(PaveError, match="could not be reached"):
        list(open_rows(CalibrationSpec("a/b")).draw())


def test_a_test_split_is_warned_about(write, tmp_path, caplog):
    write("folder/test.jsonl", TEN)
    write("folder/train.jsonl", TEN)
    open_rows(CalibrationSpec(str(tmp_path / "folder"), split="train"))
    assert "test split" not in caplog.text
    for _ in range(2):  # the check, and then the calibration
        open_rows(CalibrationSpec(str(tmp_path / "folder"), split="train[:1]+test[:2]"))
    assert caplog.text.count("looks like a test split") == 1


def test_nothing_is_printed_and_progress_bars_come_back(write, capfd):
    open_rows(CalibrationSpec(write("a.jsonl", TEN)))
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_importing_rows_loads_no_heavy_library():
    code = ("import sys, mergekit_pave.calibration.rows; "
            "sys.exit(bool({'datasets', 'transformers', 'pandas'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
