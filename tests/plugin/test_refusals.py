"""What cannot be honoured ends a merge in one sentence, before anything heavy begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import tensors_of
from helpers.refusals import merge, refused
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_pave import cli, plugin
from mergekit_pave.errors import PaveError

EARLY = {
    "method": (lambda raw: raw.update(merge_method="pave-ties"), "did you mean pave_ties?"),
    "base": (lambda raw: raw.pop("base_model"), "`base_model: NAME`"),
    "key": (lambda raw: raw.update(nonsense=1), "unknown key 'nonsense'"),
    "dropped": (lambda raw: raw["models"][0]["parameters"].update(wieght=1), "mean weight?"),
    "list": (lambda raw: raw["parameters"].update(covariance=["a", "b"]), "single value"),
    "ratio": (lambda raw: raw["parameters"].update(rank_ratio=4000), "at most 1"),
    "data": (lambda raw: raw["parameters"].update(text_column="question"), "'question'"),
    "store": (lambda raw: raw["parameters"].update(covariance="/nowhere"), "No covariance store"),
    "model": (lambda raw: raw["models"][1].update(model="/nowhere"), "no model folder /nowhere"),
}


@pytest.mark.parametrize("case", EARLY)
def test_stock_command_refuses_in_one_line(good, tmp_path, untouched, case):
    break_it, word = EARLY[case]
    break_it(good)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(good))
    command = [str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    result = CliRunner().invoke(mergekit_yaml, command)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert line.startswith("Error: ") and word in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_duplicate_key_in_the_stock_command(good, tmp_path, untouched):
    text = yaml.safe_dump(good).replace("rank_ratio: 0.9", "rank_ratio: 0.9\n  rank_ratio: 0.8")
    (tmp_path / "merge.yml").write_text(text)
    command = [str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    result = CliRunner().invoke(mergekit_yaml, command)
    assert result.exit_code == 1 and "'rank_ratio' is given twice" in result.output


def test_in_process_merge_raises(good, tmp_path, untouched):
    good["parameters"]["rank_ratio"] = 7
    assert "at most 1" in refused(good, tmp_path / "out")


@pytest.mark.parametrize("name", ["tie", "linear-", "slurp"])
def test_unknown_methods_of_others_are_left_to_mergekit(good, tmp_path, name):
    good["merge_method"] = name
    with pytest.raises(RuntimeError, match="Unimplemented merge method"):
        merge(good, tmp_path / "out")


def stock(raw: dict, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(raw))
    return subprocess.run(
        [Path(sys.executable).with_name("mergekit-yaml"), tmp_path / "merge.yml",
         tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )


def test_installed_command_with_a_misspelt_method(good, tmp_path):
    result = stock({**good, "merge_method": "pave_tie", "base_model": "nobody/nothing"}, tmp_path)
    assert result.returncode == 1
    assert "Error: merge_method: 'pave_tie'" in result.stderr
    assert "did you mean pave_ties?" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"parameters": []}, "parameters: must be a mapping"),
    ({"base_model": "a@b@c"}, "multiple @"),
])
def test_installed_command_with_what_mergekit_cannot_read(good, tmp_path, change, words):
    result = stock({**good, **change}, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert words in result.stderr and result.stderr.startswith("Error: ")


def test_installed_command_stops_in_the_middle_of_a_merge(good, tmp_path):
    good["models"][0]["parameters"]["weight"] = 1e300
    good["parameters"]["num_calibration_samples"] = 2
    result = stock(good, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Error: The merge of " in result.stderr and "NaN or Inf" in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


# --- data, end to end ----------------------------------------------------------------------


def test_data_without_a_usable_row(good, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": null}\n{"text": "  "}\n')
    good["models"][1]["parameters"]["calibration_dataset"] = str(tmp_path / "d.jsonl")
    assert "no usable row" in refused(good, tmp_path / "out")


def test_few_tokens_work_and_warn(good, tmp_path, caplog):
    (tmp_path / "d.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    good["parameters"]["calibration_dataset"] = str(tmp_path / "d.jsonl")
    for model in good["models"]:
        del model["parameters"]["calibration_dataset"]
    assert all(t.isfinite().all() for t in merge(good, tmp_path / "out").values())
    assert "covariances come from fewer tokens than features" in caplog.text
    assert "1 usable rows, fewer than num_calibration_samples 20" in caplog.text


# --- the host ------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["0.1.4", "0.0.6.post1", "0.1.0rc1"])
def test_old_mergekit(monkeypatch, found):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    with pytest.raises(PaveError) as caught:
        plugin.register()
    assert found in str(caught.value) and "0.1.5 or newer" in str(caught.value)
    assert "pip install --upgrade" in str(caught.value)
    with pytest.raises(PaveError, match="0.1.5 or newer"):
        plugin.attach(sys.modules["mergekit.merge"])
    result = CliRunner().invoke(cli.main, ["methods"])
    assert result.exit_code == 1 and "0.1.5 or newer" in result.stderr


@pytest.mark.parametrize("found", ["0.1.5", "0.1.6.dev0", "0.2.0"])
def test_new_mergekit(monkeypatch, found):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert "pave_ties" in plugin.register()


def test_planning_twice_with_one_configuration(good, tmp_path):
    """mergekit rewrites the configuration while planning; a notebook runs it again."""
    config = MergeConfiguration.model_validate(good)
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(config, str(tmp_path / "a"), options, yaml.safe_dump(good))
    run_merge(config, str(tmp_path / "b"), options, yaml.safe_dump(good))
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it is there")
@pytest.mark.parametrize("options, words", [
    ({"device": "cuda"}, "finds no cuda device here: leave --cuda out"),
    ({"multi_gpu": True}, "leave --multi-gpu out"),
])
def test_an_accelerator_that_is_not_there(families, tmp_path, options, words):
    raw = {"merge_method": "tsv_m", "base_model": str(families("llama")["base"]),
           "models": [{"model": str(families("llama")["expert0"])}]}
    assert words in refused(raw, tmp_path / "out", **options)
