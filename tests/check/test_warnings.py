"""What a check says beside errors: once, and not above a line that belies it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers import recipe

from mergekit_pave import cli, plugin
from mergekit_pave.check import check
from mergekit_pave.models.source import LoaderOptions

plugin.register()


def findings(raw: dict) -> list:
    return check(raw, LoaderOptions())


def checked(raw: dict, tmp_path: Path) -> str:
    (tmp_path / "m.yml").write_text(yaml.safe_dump(raw))
    ran = CliRunner().invoke(cli.main, ["check", str(tmp_path / "m.yml")])
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_nothing_wrong_is_not_said_under_warnings(families, texts, tmp_path):
    good = recipe(families("llama"), texts)
    assert checked(good, tmp_path).endswith("m.yml: nothing wrong found.\n")
    few = recipe(families("llama"), texts, num_calibration_samples=900)
    out = checked(few, tmp_path)
    assert "nothing wrong" not in out and out.endswith("m.yml: 2 warnings, and no error found.\n")


def test_one_warning_for_all_models_that_it_is_about(families, texts):
    raw = recipe(families("llama"), [texts[0], texts[0]], num_calibration_samples=900)
    (warning,) = findings(raw)
    assert warning.where == "models[0], models[1]"
    raw = recipe(families("llama"), texts, num_calibration_samples=900)
    assert [w.where for w in findings(raw)] == ["models[0]", "models[1]"]


def zero(families, method: str, **parameters) -> dict:
    paths = families("llama")
    return {"merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
            "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)],
            "parameters": {"calibration_dataset": "none", **parameters}
            if "pave" in method or "reg" in method else parameters}


@pytest.mark.parametrize("method", [
    "tsv_m", "pave_tsv_m", "regmean", "tsv_regmean", "pave_ties", "pave_task_arithmetic"])
@pytest.mark.parametrize("weight", [0, 0.0, [0, 0]])
def test_a_merge_with_all_weights_0_is_refused(families, method, weight):
    found = findings(zero(families, method, weight=weight))
    assert [f.what for f in found if f.level == "error"] == [
        "every weight is 0, which leaves nothing to merge; raise one."]


@pytest.mark.parametrize("method", ["tsv_m", "pave_task_arithmetic", "tsv_regmean"])
def test_a_lambda_of_0_is_warned_about(families, method):
    raw = zero(families, method, **{"lambda": 0, "weight": 1.0})
    assert any("lambda is 0" in str(f) and f.level == "warning" for f in findings(raw))
    raw["parameters"]["lambda"] = 1.0
    assert not any("lambda is 0" in str(f) for f in findings(raw))


@pytest.mark.parametrize(("need", "fits"), [
    ("self_attn", True), ("layers.1.", True), ("*", True), ("self_atn", False)])
def test_a_filter_that_is_in_no_tensors_name(families, need, fits):
    raw = zero(families, "tsv_m", weight=[{"filter": need, "value": 0.3}, {"value": 1}])
    found = [str(f) for f in findings(raw)]
    assert fits == (found == [])
    assert fits or f"weight has the filter '{need}', which is in no tensor's name" in found[0]
