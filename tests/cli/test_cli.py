"""`mergekit-pave`: help, exit codes, one-line errors, and a store made and used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from click.testing import CliRunner
from helpers import invoke, recipe
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_pave import cli
from mergekit_pave.calibration.collect import collect_window
from mergekit_pave.recipe.parameters import CALIBRATION
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore


def option(parameter) -> str:
    return "--" + parameter.name.removeprefix("calibration_").replace("_", "-")


@pytest.fixture
def calibrate(families, texts):
    """Run `calibrate` on a tiny model; later arguments override the first ones."""

    def run(*arguments, model=None):
        return invoke("calibrate", model or families("llama")["expert0"], "--dataset", texts[0],
                      "--num-calibration-samples", 8, *arguments)

    return run


# --- help ----------------------------------------------------------------------------------


def test_help_names_the_commands_and_the_way_to_merge():
    for flag in ("--help", "-h"):
        code, out, _ = invoke(flag)
        assert code == 0
        for word in ("calibrate", "check", "methods", "mergekit-yaml merge.yml OUT", "tsv_regmean"):
            assert word in out


@pytest.mark.parametrize("command", ["calibrate", "check", "methods"])
def test_help_of_a_command(command):
    code, out, err = invoke("-v", command, "--help")
    assert code == 0 and not err
    assert command == "methods" or f"mergekit-pave {command} " in out.partition("Example")[2]


def test_help_of_calibrate_is_complete():
    out = " ".join(invoke("calibrate", "--help")[1].split())
    for parameter in CALIBRATION:
        assert option(parameter) in out
        if parameter.default is not None:
            assert f"[default: {parameter.default}]" in out
    assert "`" not in out.partition("Options:")[2]


def test_version():
    assert invoke("--version")[1].strip().split()[-1].count(".") == 2


def test_methods():
    code, out, _ = invoke("methods")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and {"pave_ties", "pave_task_arithmetic", "pave_dare_ties"} <= set(names)
    assert "https://arxiv.org/abs/2306.01708" in out


def test_installed_command():
    command = Path(sys.executable).with_name("mergekit-pave")
    found = subprocess.run([command, "calibrate", "nowhere", "-o", "out"],
                           capture_output=True, text=True)
    assert found.returncode == 2 and "Missing option '--dataset'" in found.stderr
    assert "Traceback" not in found.stderr


# --- check ---------------------------------------------------------------------------------


@pytest.fixture
def merge_yml(families, texts, tmp_path) -> Path:
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(recipe(families("llama"), texts)))
    return file


def test_check_finds_nothing(merge_yml):
    code, out, err = invoke("check", merge_yml)
    assert code == 0 and not err
    lines = out.splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines[:2]] == ["expert0", "expert1"]
    assert "8 covariances" in lines[0] and lines[-1].endswith("nothing wrong found.")


def test_check_lists_every_error_and_exits_with_1(merge_yml):
    raw = yaml.safe_load(merge_yml.read_text())
    raw["models"][0]["wieght"] = 1
    raw["parameters"]["rank_ratio"] = 7
    merge_yml.write_text(yaml.safe_dump(raw))
    code, out, err = invoke("check", merge_yml)
    assert code == 1 and not out
    first, second = err.splitlines()
    assert first.startswith("error: models[0]: unknown key 'wieght'") or second.startswith(
        "error: models[0]: unknown key 'wieght'")
    assert "error: parameters.rank_ratio: " in err


def test_check_warns_and_passes(merge_yml, calibrate, tmp_path):
    assert calibrate("-o", tmp_path / "store")[0] == 0
    raw = yaml.safe_load(merge_yml.read_text())
    raw["models"][0]["parameters"]["covariance"] = str(tmp_path / "store")
    merge_yml.write_text(yaml.safe_dump(raw))
    code, out, err = invoke("check", merge_yml)
    assert code == 0 and "no error found" in out
    assert err.startswith("warning: models[0]: covariance is used") and err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--unsafe-truncate-embeddings"], []])
def test_check_takes_mergekits_flags(merge_yml, flags, families, tmp_path):
    raw = yaml.safe_load(merge_yml.read_text())
    shutil.copytree(families("llama")["expert0"], tmp_path / "odd")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "odd")
    raw["models"][0]["model"] = str(tmp_path / "odd")
    merge_yml.write_text(yaml.safe_dump(raw))
    code, _, err = invoke("check", merge_yml, *flags)
    assert code == (0 if flags else 1) and bool(flags) != ("100 tokens" in err)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not valid YAML"),
        (b"a: 1\na: 2", "'a' is given twice, keep one of them (line 2"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"- a\n- b", "not a YAML mapping"),
        (b"", "not a YAML mapping"),
    ],
)
def test_check_of_something_else(tmp_path, content, words):
    (tmp_path / "m.yml").write_bytes(content)
    code, out, err = invoke("check", tmp_path / "m.yml")
    assert code == 1 and words in err and err.count("\n") == 1 and not out


def test_check_without_a_file(tmp_path):
    code, _, err = invoke("check", tmp_path / "nowhere.yml")
    assert code == 2 and "does not exist" in err


# --- calibrate -----------------------------------------------------------------------------


def test_a_calibrated_store_serves_a_merge(calibrate, families, texts, tmp_path):
    raw = recipe(families("llama"), texts)
    for i, model in enumerate(raw["models"]):
        store = tmp_path / f"store{i}"
        code, out, _ = calibrate("-o", store, "--dataset", texts[i], model=model["model"])
        assert code == 0 and out.startswith(f"{store}: 8 covariances for 14 weights from ")
        del model["parameters"]["calibration_dataset"]
        model["parameters"]["covariance"] = str(store)
    run_merge(MergeConfiguration.model_validate(raw), str(tmp_path / "out"),
              MergeOptions(quiet=True, copy_tokenizer=False), yaml.safe_dump(raw))
    assert (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_options_reach_the_store(calibrate, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "w1 w2", "a": "w3"}\n' * 9)
    code, _, err = calibrate(
        "-o", tmp_path / "s", "--dataset", tmp_path / "d.jsonl", "--text-column", "q,a",
        "--split", "train[:5]", "--seed", 7, "--max-seq-length", 4, "--batch-size", 2,
        "--max-memory", "1GiB", "--statistics-memory", "10KB")
    assert code == 0, err
    data = CovarianceStore(tmp_path / "s").manifest["data"]
    expected = {"columns": ["q", "a"], "split": "train[:5]", "seed": 7, "max_seq_length": 4,
                "used": 5, "dataset": "d.jsonl"}
    assert {key: data[key] for key in expected} == expected
    assert len(list((tmp_path / "s").glob("covariance-*"))) > 1


def test_a_finished_store_is_not_overwritten(calibrate, tmp_path):
    store = tmp_path / "store"
    assert calibrate("-o", store)[0] == 0
    before = {file: file.stat().st_mtime_ns for file in store.iterdir()}
    code, _, err = calibrate("-o", store)
    assert code == 1 and "already holds a covariance store; choose another folder" in err
    assert before == {file: file.stat().st_mtime_ns for file in store.iterdir()}


def test_an_interrupted_calibration_goes_on(calibrate, tmp_path, monkeypatch):
    store, small = tmp_path / "store", ("--statistics-memory", "16000")
    assert calibrate("-o", tmp_path / "whole", *small)[0] == 0
    collect = cli_calls(monkeypatch, stop_at=2)
    code, _, err = calibrate("-o", store, *small)
    assert code == 1 and "Aborted" in err
    assert len(list(store.glob("covariance-*"))) == 2 and not (store / MANIFEST).exists()
    monkeypatch.undo()
    again = cli_calls(monkeypatch)
    assert calibrate("-o", store, *small)[0] == 0
    assert len(collect) + len(again) == len(list((tmp_path / "whole").glob("covariance-*"))) + 1
    first, second = CovarianceStore(tmp_path / "whole"), CovarianceStore(store)
    assert set(first.sites) == set(second.sites)
    assert all((first.covariance(s) == second.covariance(s)).all() for s in first.sites)


def cli_calls(monkeypatch, stop_at: int | None = None) -> list:
    """Records the windows collected; interrupts, as Ctrl-C does, at window `stop_at`."""
    from mergekit_pave.calibration import run

    calls, collect = [], collect_window

    def recorded(*arguments):
        calls.append(arguments[2])
        if len(calls) - 1 == stop_at:
            raise KeyboardInterrupt
        return collect(*arguments)

    monkeypatch.setattr(run, "collect_window", recorded)
    return calls


def test_another_calibration_is_not_continued(calibrate, families, tmp_path, monkeypatch):
    cli_calls(monkeypatch, stop_at=0)
    calibrate("-o", tmp_path / "store")
    monkeypatch.undo()
    for change in ({"model": families("llama")["expert1"]}, {}):
        code, _, err = calibrate("-o", tmp_path / "store", "--seed", 5, **change)
        assert code == 1 and "unfinished calibration of another model or other data" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--dataset", "./nowhere.jsonl"], 1, ["nowhere.jsonl", "does not exist"]),
        (["--text-column", "question"], 1, ["'question'", "'text'"]),
        (["--split", "validation"], 1, ["'validation'", "train"]),
        (["--num-calibration-samples", "0"], 2, ["at least 1"]),
        (["--batch-size", "x"], 2, ["--batch-size", "'x'"]),
        (["--seed", "-1"], 2, ["0 or more"]),
        (["--max-memory", "lots"], 1, ["--max-memory", "8GiB", "'lots'"]),
        (["--statistics-memory", "-"], 1, ["--statistics-memory", "'-'"]),
        (["--device", "abacus"], 2, ["--device", "'abacus'", "give cpu"]),
        (["--num-samples", "8"], 2, ["--num-samples"]),
    ],
    ids=str,
)
def test_calibrate_refuses(calibrate, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.setattr("mergekit_pave.calibration.run.load_model", None)
    found, out, err = calibrate("-o", tmp_path / "store", *arguments)
    assert found == code and not out
    for word in words:
        assert word in err
    assert not (tmp_path / "store").exists() and "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere", "There is no model folder /nowhere"),
        ("nobody/nothing", "Cannot read the config of nobody/nothing"),
        ("a@b@c", "`@` starts a revision"),
        ("some/model.Q4_K_M.gguf", "GGUF"),
    ],
)
def test_calibrate_refuses_the_model(calibrate, tmp_path, model, words):
    code, _, err = calibrate("-o", tmp_path / "store", model=model)
    assert code == 1 and words in err and err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_calibrate_an_adapter_needs_a_cache(calibrate, families, tmp_path):
    code, _, err = calibrate("-o", tmp_path / "s", model=f"{families('llama')['base']}+some/lora")
    assert code == 1 and "--lora-merge-cache DIR" in err


def test_output_that_cannot_be_a_folder(calibrate, tmp_path):
    (tmp_path / "file").touch()
    assert calibrate("-o", tmp_path / "file")[0] == 2
    code, _, err = calibrate("-o", tmp_path / "file" / "store")
    assert code == 1 and "Cannot write to the folder" in err and "name another one" in err


# --- tracebacks ----------------------------------------------------------------------------


def test_expected_faults_have_a_traceback_with_v_only(tmp_path, caplog):
    arguments = ["calibrate", "/nowhere", "--dataset", "x", "-o", tmp_path / "store"]
    assert invoke(*arguments)[0] == 1 and not caplog.records
    code, _, err = invoke("-v", *arguments)
    assert code == 1 and "Error: There is no model folder /nowhere" in err
    assert "Traceback" in caplog.text and "read_config" in caplog.text


def test_unexpected_faults_are_one_line_without_v(calibrate, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("mergekit_pave.calibration.run.calibrate_to", fail)
    code, _, err = calibrate("-o", tmp_path / "store")
    assert (code, err) == (1, "Error: first line second line (run with -v for the traceback)\n")
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(
            cli.main, ["-v", *_calibrate_arguments(tmp_path)], catch_exceptions=False)


def _calibrate_arguments(folder: Path) -> list[str]:
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text('{"model_type": "llama"}')
    return ["calibrate", str(folder / "m"), "--dataset", "x", "-o", str(folder / "store")]
