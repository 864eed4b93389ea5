"""`mergekit-pave tune`: what it finds, what it costs, and what it refuses."""

from __future__ import annotations

import errno
import math
import shutil
from collections import namedtuple

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import recipe
from mergekit.io.tensor_writer import TensorWriter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation import tuned as module
from mergekit_pave.evaluation.merging import merge_to
from mergekit_pave.evaluation.run import evaluate
from mergekit_pave.evaluation.search import line, peak
from mergekit_pave.evaluation.setup import RowOptions
from mergekit_pave.evaluation.space import AFFINE, space_of
from mergekit_pave.evaluation.strengths import at_strength
from mergekit_pave.evaluation.tune import Budget
from mergekit_pave.evaluation.tuned import Tuned, parse_budget, tune
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin import register


def _tune(raw, out, budget=Budget, methods=(), rows=18, say=lambda text: None) -> Tuned:
    budget = Budget(merges=12) if budget is Budget else budget
    return tune(raw, out, budget, methods, rows=RowOptions(rows=rows), say=say)


@pytest.mark.parametrize("top", [0.2, 1.0, 3.0])
def test_a_line_finds_the_peak_wherever_it_is(top):
    looked = []

    def value(strength):
        looked.append(strength)
        return -math.log(strength / top) ** 2

    found = line(value, 1.0, None, 4)
    best = max(found, key=found.__getitem__)
    assert best == pytest.approx(top, rel=0.03)
    assert len(looked) == len(set(looked)) <= 8


def test_the_peak_is_that_of_the_parabola():
    assert peak({s: 3 - 2 * (math.log(s) - 0.3) ** 2 for s in (0.8, 1.3, 2.0)}) == pytest.approx(
        math.exp(0.3))
    assert peak({1.0: 0.0, 2.0: 1.0}) is None
    assert peak({1.0: 0.0, 2.0: 1.0, 4.0: 2.0}) is None


def test_a_line_ends_with_the_budget():
    left = iter([0.1, 0.2, None])
    assert line(lambda s: next(left), 1.0, 1.0, 5) == {1.0: 0.1, round(1 / 1.5, 4): 0.2}


@pytest.mark.parametrize("method", sorted(AFFINE) + ["pave_ties", "pave_tsv_m", "pave_regmean"])
def test_two_merges_serve_all_strengths(families, texts, tmp_path, method):
    register()
    space = space_of(recipe(families("llama"), texts), method)
    assert space.affine
    for strength in (0.0, 1.0, 0.7):
        merge_to(space.with_values({"lambda": strength}), tmp_path / str(strength),
                 LoaderOptions(), "cpu")
    at_strength(tmp_path / "0.0", tmp_path / "1.0", 0.7, tmp_path / "made")
    made, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "0.7"))
    assert made.keys() == stock.keys()
    start = load_file(tmp_path / "0.0" / "model.safetensors")
    for name in made:
        torch.testing.assert_close(made[name], stock[name], rtol=1e-4, atol=2e-6)
    assert any(not torch.equal(stock[name], start[name]) for name in made)


def _twins(families, tmp_path) -> dict:
    """Two experts of the same weights: the sum of their task vectors is one of them at 0.5."""
    paths = dict(families("bert"))
    shutil.copytree(paths["expert0"], tmp_path / "expert1")
    return {**paths, "expert1": tmp_path / "expert1"}


def _plain(paths, texts, method="task_arithmetic", **parameters) -> dict:
    raw = recipe(paths, texts, method, **parameters)
    for model in raw["models"]:
        model["parameters"]["weight"] = 1.0
    return raw


def test_a_planted_strength_is_found(families, texts, tmp_path):
    raw = _plain(_twins(families, tmp_path), [texts[0]] * 2)
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=4))
    written = yaml.safe_load((tmp_path / "tuned.yml").read_text())
    assert written["parameters"]["lambda"] == pytest.approx(0.5, rel=0.05)
    assert found.best.value > 0.99
    # One merge at 0, one at 1, and a whole line of strengths.
    assert found.tuner.merged == 2
    assert "# Tuned by mergekit-pave" in found.text
    assert "As it was given (task_arithmetic lambda 1)" in found.text


def _opposed(families, tmp_path) -> dict:
    """A second expert whose task vector undoes the first one's, and more."""
    paths = dict(families("bert"))
    shutil.copytree(paths["expert0"], tmp_path / "expert1")
    base, one = (load_file(paths[n] / "model.safetensors") for n in ("base", "expert0"))
    save_file({name: base[name] - 3 * (one[name] - base[name]) for name in base},
              tmp_path / "expert1" / "model.safetensors", {"format": "pt"})
    # Both are asked as the first: the sum of their task vectors takes away what it learned.
    return {**paths, "expert1": tmp_path / "expert1"}


def test_what_is_worse_than_the_base_is_not_chosen(families, texts, tmp_path):
    raw = _plain(_opposed(families, tmp_path), [texts[0]] * 2)
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=4))
    assert yaml.safe_load(found.text)["parameters"]["lambda"] == 0 and found.best.value == 0
    assert "No strength is better than the base" in found.text
    assert found.tuner.merged == 2
    # A method that has no strength 0 cannot give the base, and says so.
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=3), ("nuslerp",))
    assert found.best.value < 0 and "use the base itself" in found.text


def test_the_result_scores_what_it_says(families, texts, tmp_path):
    raw = recipe(families("bert"), texts, "tsv_regmean")
    del raw["parameters"]["rank_ratio"]
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=5))
    (result,) = evaluate([tmp_path / "tuned.yml"], rows=RowOptions(rows=18), quiet=True)
    shares = [task.kept.value for task in result.of_tasks]
    assert sum(shares) / 2 == pytest.approx(found.best.value, abs=1e-3)
    assert found.best.value >= found.tuner.trials[0].value
    assert {"lambda", "balance", "flattening"} <= yaml.safe_load(found.text)["parameters"].keys()


@pytest.mark.parametrize("purify", ["weight", "delta", "separate"])
def test_no_purification_is_always_a_candidate(families, texts, purify):
    register()
    raw = recipe(families("bert"), texts, purify=purify)
    assert 1.0 in space_of(raw).second["rank_ratio"]
    assert space_of(raw).second["rank_ratio"][0] == 0.9  # as it is given


def test_an_interrupted_search_goes_on(families, texts, tmp_path, monkeypatch):
    raw, told = _plain(families("bert"), texts), []

    def interrupt(text):
        told.append(text)
        if sum("keeps" in line for line in told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(raw, tmp_path / "tuned.yml", Budget(merges=4), say=interrupt)
    assert list(tmp_path.glob(".mergekit-pave-*")) == []
    told.clear()
    first = _tune(raw, tmp_path / "tuned.yml", Budget(merges=4), say=told.append)
    assert sum("(known)" in line for line in told) == 3
    again = _tune(raw, tmp_path / "again.yml", Budget(merges=4))
    assert again.tuner.merged == 0
    assert again.text == first.text


def test_minutes_that_are_over_at_once_score_the_first_candidate(families, texts, tmp_path):
    found = _tune(_plain(families("bert"), texts), tmp_path / "tuned.yml", Budget(seconds=1e-9))
    # The base, at strength 0, costs no merge of its own.
    assert len([trial for trial in found.tuner.trials if trial.values["lambda"]]) == 1


def test_a_poor_candidate_is_stopped_early_and_never_chosen(families, texts, tmp_path):
    raw = _plain(_twins(families, tmp_path), [texts[0]] * 2, **{"lambda": 0.5})
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=4), rows=30)
    stopped = [trial for trial in found.tuner.trials if trial.stopped]
    assert stopped and not found.best.stopped
    assert len(stopped[0].scores[0]["distance"]) == 10
    assert all(trial.value < found.best.value for trial in stopped)


def test_methods_share_a_budget_and_the_best_is_taken(families, texts, tmp_path):
    raw = recipe(families("bert"), texts)
    found = _tune(raw, tmp_path / "tuned.yml", Budget(merges=6), ("task_arithmetic", "ties"))
    assert set(found.of_methods) == {"task_arithmetic", "ties"}
    assert found.best.value == max(trial.value for trial in found.of_methods.values())
    assert "# Best of ties: ties " in found.text
    written = yaml.safe_load(found.text)
    assert written["merge_method"] == found.best.space.method
    # A plain method gets no keys that it does not know.
    assert "calibration_dataset" not in written["models"][0]["parameters"]
    assert found.tuner.merged <= 6


def test_a_method_without_lambda_is_scaled_by_its_weights(families, texts):
    register()
    raw = _plain(families("bert"), texts, "task_arithmetic")
    space = space_of(raw)
    assert [m["parameters"]["weight"] for m in space.with_values({"weight": 0.5})["models"]] == [
        0.5, 0.5]


def test_bad_input_is_one_sentence(families, texts, tmp_path, monkeypatch):
    out, raw = tmp_path / "tuned.yml", recipe(families("bert"), texts)

    def refused(words, raw=raw, **options):
        with pytest.raises(PaveError, match=words):
            _tune(raw, out, **options)
        assert not out.exists()

    refused("A budget of 2 merges is too small: 1 method needs at least 3",
            budget=Budget(merges=2))
    refused("2 methods need at least 6", budget=Budget(merges=4), methods=("ties", "tsv_m"))
    refused("nonsense is no merge method", methods=("nonsense",))
    refused("emr makes one model for each task", methods=("emr",))
    refused("lambda is set by layer or by filter",
            {**raw, "parameters": {**raw["parameters"], "lambda": [0.5, 1.0]}})
    refused("needs a configuration with `models`", {"merge_method": "ties", "slices": []})
    refused("is left to evaluate",
            {**raw, "parameters": {**raw["parameters"], "num_calibration_samples": 60}})
    same = {**raw, "models": [{**m, "model": str(families("bert")["base"]) + "/"}
                              for m in raw["models"][:1]] + raw["models"][1:]}
    refused("answers its held-out rows as the base does", same)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1000))
    refused("0.0 GB free")


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
@pytest.mark.parametrize("after", [0, 2], ids=["merge", "strength"])
def test_a_disk_that_fills_up_loses_nothing(
    families, texts, tmp_path, monkeypatch, error, after
):
    raw, told, real = _plain(families("bert"), texts), [], TensorWriter.finalize
    written = []

    def full(writer):
        written.append(writer)
        if len(written) > after:
            raise error
        return real(writer)

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "finalize", full)
        with pytest.raises(PaveError, match="cannot be written to .* what is scored is kept"):
            _tune(raw, tmp_path / "tuned.yml", Budget(merges=3), say=told.append)
    assert list(tmp_path.glob("*tuned*")) == list(tmp_path.glob(".mergekit-pave-*")) == []
    scored = sum("keeps" in line for line in told)
    told.clear()
    _tune(raw, tmp_path / "tuned.yml", Budget(merges=3), say=told.append)
    assert sum("(known)" in line for line in told) == scored == after // 2


def test_models_of_different_architectures_are_refused(families, texts, tmp_path):
    raw = _plain({**families("llama"), "expert1": families("bert")["expert1"]}, texts)
    with pytest.raises(PaveError, match="different architectures, .* evaluate the output"):
        _tune(raw, tmp_path / "tuned.yml", Budget(merges=3))


@pytest.mark.parametrize("text", ["0", "x", "1.5", "-3", "10 hours"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(PaveError, match="--budget must be a number of merges"):
        parse_budget(text)
    assert parse_budget("12").merges == 12
    assert parse_budget("1.5m").seconds == parse_budget("1.5 minutes").seconds == 90


def test_the_command(families, texts, tmp_path):
    config, out = tmp_path / "merge.yml", tmp_path / "tuned.yml"
    config.write_text(yaml.safe_dump(_plain(families("llama"), texts)))
    result = CliRunner().invoke(main, [
        "tune", str(config), "-o", str(out), "--budget", "3", "--rows", "16"])
    assert result.exit_code == 0, result.output
    assert "Tuning task_arithmetic within 3 merges" in result.output
    assert "GB of disk" in result.output
    assert f"{out}: task_arithmetic lambda" in result.output


def test_the_configuration_itself_is_not_overwritten(families, texts, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(text := yaml.safe_dump(_plain(families("llama"), texts)))
    result = CliRunner().invoke(main, ["tune", str(config), "-o", str(config)])
    assert result.exit_code == 1 and "is the configuration itself" in result.output
    assert config.read_text() == text
