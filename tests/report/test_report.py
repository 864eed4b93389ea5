"""The report of a whole merge: its numbers, its coverage, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import merge as run_merge
from helpers import recipe
from helpers.reports import CPU, opened, rows

from mergekit_pave.cli.merges import report as report_command
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.report import survey as sample
from mergekit_pave.report.build import build
from mergekit_pave.report.survey import open_merge


@pytest.fixture(scope="module")
def made(families, texts, tmp_path_factory):
    """`made(kind)` -> an open merge of two tiny models and its report."""
    done = {}

    def get(kind: str):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MERGEKIT_PAVE_CACHE", str(folder / "cache"))
                merge = opened(families(kind), texts, folder)
                chosen = sample.choose(merge.layers, None, CPU)
                done[kind] = merge, build(merge, chosen, CPU)
        return done[kind]

    return get


# --- a whole report ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [
    ("llama", "model.layers.1.mlp.down_proj.weight"),
    ("gpt2", "transformer.h.1.attn.c_attn.weight"),
])
def test_numbers_against_the_papers_formula(made, kind, name):
    """With the inverse and dense matrices, as the paper writes it."""
    merge, report = made(kind)
    layer = next(one for one in merge.layers if one.name == name)
    row = rows(report, name).models[1]
    weight = merge.weight(layer, 1).double()
    c = merge.covariance(layer, 1).double()
    assert weight.shape == tuple(rows(report, name).shape)
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    r = row.kept
    purified = (u[:, :r] * s[:r]) @ vh[:r] @ torch.linalg.inv(damped)
    def energy(w):
        return torch.trace(w @ c @ w.T).item()
    removed = energy(weight - purified)
    task = energy(weight - merge.base_weight(layer).double())
    assert row.energy_removed == pytest.approx(removed / energy(weight), rel=1e-4)
    assert row.task_energy_removed == pytest.approx(removed / task, rel=1e-4)
    assert row.spectrum.covariance[-1] == pytest.approx((s[-1] / s[0]).item(), rel=1e-3)
    half = report.shares.index(0.5)
    assert row.error[half] == pytest.approx(
        (s[round(len(s) / 2):].square().sum() / s.square().sum()).item(), rel=1e-3)


def test_kept_ranks_are_those_of_the_merge(made):
    merge, report = made("llama")
    for layer in report.layers:
        budget = round(0.1 * layer.rank * 2)
        assert sum(row.dropped for row in layer.models) == budget
    total = sum(layer.rank * len(layer.models) for layer in report.layers)
    kept = sum(row.kept for layer in report.layers for row in layer.models)
    assert report.summary.kept_share == pytest.approx(kept / total, rel=1e-5)


def test_coverage_tells_every_tensor_and_why(made):
    merge, report = made("llama")
    for found in report.coverage:
        parts = (found.purified, found.plain, found.skipped)
        assert sum(part.tensors for part in parts) == len(merge.base_tensors.names)
        assert found.purified.tensors == 14
        assert found.plain.reasons["vocabulary layer"] == 1


def test_tokens_per_dimension_are_the_stores(made):
    merge, report = made("llama")
    assert len(report.covariances) == sum(len(m.store.sites) for m in merge.models)
    for c in report.covariances:
        site = merge.models[c.model].store.sites[c.site]
        assert c.tokens_per_dimension == pytest.approx(site.count / site.width, rel=1e-5)


def test_a_model_equal_to_the_base_is_plain(families, texts, tmp_path):
    paths = dict(families("llama"))
    shutil.copytree(paths["base"], tmp_path / "copy")
    merge = opened({**paths, "expert0": tmp_path / "copy"}, texts, tmp_path)
    assert all(list(layer.own) == [1] for layer in merge.layers)
    assert merge.coverage[0]["plain"]["equals the base"] == 14


def test_filters_and_gradients_are_read_as_mergekit_reads_them(families, texts, tmp_path):
    merge = opened(families("llama"), texts, tmp_path, rank_ratio=[
        {"filter": "down_proj", "value": [0.8, 0.9]}, {"filter": "q_proj", "value": 1.0},
        {"value": 0.95}])
    ratios = {layer.name: layer.settings.rank_ratio for layer in merge.layers}
    assert ratios["model.layers.0.mlp.down_proj.weight"] == 0.8
    assert ratios["model.layers.1.mlp.down_proj.weight"] == 0.9
    assert ratios["model.layers.1.mlp.up_proj.weight"] == 0.95
    assert "model.layers.0.self_attn.q_proj.weight" not in ratios


def whole(raw: dict, layers: int = 2) -> dict:
    """The same merge as its only slice."""
    sources = [{"model": raw["base_model"]}, *raw.pop("models")]
    for source in sources:
        source["layer_range"] = [0, layers]
    return {**raw, "slices": [{"sources": sources, "parameters": raw.pop("parameters")}]}


def weighted(raw: dict, weight) -> dict:
    raw["models"][1]["parameters"]["weight"] = weight
    return raw


def moduled(raw: dict, **parameters) -> dict:
    module = {"models": raw.pop("models"), "parameters": parameters}
    return {**raw, "modules": {"default": module}}


@pytest.mark.parametrize(("kind", "written"), [
    ("llama", lambda raw: weighted(raw, 0)),
    ("llama", lambda raw: weighted(raw, [{"filter": "mlp", "value": 0}, {"value": 0.5}])),
    ("llama", lambda raw: weighted(raw, [0, 0.5])),
    ("llama", lambda raw: whole(raw)),
    ("llama", lambda raw: moduled(raw, rank_ratio=[{"filter": "mlp", "value": 0.8}])),
    # The pooler, outside of the numbered layers, is at the start of a gradient.
    ("bert", lambda raw: {**raw, "parameters": {**raw["parameters"],
                                                   "rank_ratio": [0.7, 0.95]}}),
], ids=["weight", "filter", "gradient", "slice", "module", "outside"])
def test_what_is_purified_is_what_the_merge_purifies(families, texts, tmp_path, kind, written):
    raw = written({**recipe(families(kind), texts), "dtype": "float32"})
    run_merge(raw, tmp_path / "out", write_model_card=True)
    done = {model["id"]: {name: cut for name, (_, cut) in model["ranks"].items()}
            for model in json.loads((tmp_path / "out" / "pave_report.json").read_text())["models"]
            if model["ranks"]}
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(raw))
    merge = open_merge(config, LoaderOptions(), CPU)
    shown = {}
    for layer in build(merge, sample.choose(merge.layers, None, CPU), CPU).layers:
        for row in layer.models:
            own = shown.setdefault(merge.models[row.model].label, {})
            own[layer.name] = row.dropped
    assert shown == done


@pytest.mark.parametrize("parts", [
    [(0, 1), (1, 2)], [(1, 2), (0, 1)], [(1, 2)], [(0, 2), (0, 2)]])
def test_slices_that_are_not_the_whole_model_are_refused(
        families, texts, tmp_path, monkeypatch, parts):
    (piece,) = whole(recipe(families("llama"), texts))["slices"]
    raw = {"merge_method": "pave_task_arithmetic", "base_model": str(families("llama")["base"])}
    raw["slices"] = [
        {**piece, "sources": [{**source, "layer_range": list(part)} for source in piece["sources"]]}
        for part in parts]
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(sample, "open_store", None)  # refused before anything is calibrated
    with pytest.raises(PaveError, match="^slices: .*in a copy .* under `models`, with the param"):
        open_merge(config, LoaderOptions(), CPU)


def test_several_modules_are_refused(families, texts, tmp_path):
    raw = recipe(families("t5"), texts)
    models = raw.pop("models")
    raw["modules"] = {name: {"models": models} for name in ("encoder", "decoder", "shared")}
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(raw))
    with pytest.raises(PaveError, match="^modules: .* with the parameters of one module"):
        open_merge(config, LoaderOptions(), CPU)


def test_a_weight_that_is_missing_somewhere_is_named(families, texts, tmp_path):
    raw = weighted(recipe(families("llama"), texts), [{"filter": "mlp", "value": 1.0}])
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(raw))
    with pytest.raises(PaveError, match=r"models\[1\]: weight has no value for .*self_attn"):
        open_merge(config, LoaderOptions(), CPU)


def test_a_model_that_nothing_is_taken_from_can_be_drawn(families, texts, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(weighted(recipe(families("llama"), texts), 0)))
    result = CliRunner().invoke(
        report_command, [str(config), "-o", str(tmp_path / "out"), "--layers", "1"])
    assert result.exit_code == 0, result.output
    coverage = json.loads((tmp_path / "out" / "report.json").read_text())["coverage"]
    assert [found["purified"]["tensors"] for found in coverage] == [14, 0]
    assert coverage[1]["plain"]["reasons"]["weight is 0 here"] == 14


def test_a_cut_that_drops_nothing_can_be_drawn(families, texts, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(families("llama"), texts, rank_ratio=0.999)))
    result = CliRunner().invoke(
        report_command, [str(config), "-o", str(tmp_path / "out"), "--layers", "1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").exists()


def test_nothing_to_purify_is_said(families, texts, tmp_path):
    with pytest.raises(PaveError, match=r"purifies nothing.*rank_ratio is 1\.0"):
        opened(families("llama"), texts, tmp_path, rank_ratio=1.0)


def test_only_the_papers_form_is_shown(families, texts, tmp_path):
    with pytest.raises(PaveError, match="what `purify: weight` would do: take `purify`"):
        opened(families("llama"), texts, tmp_path, purify="delta", rank_ratio=0.25)


def test_a_method_that_purifies_nothing_has_nothing_to_show(families, texts, tmp_path):
    config = tmp_path / "merge.yml"
    raw = recipe(families("llama"), texts, "regmean")
    del raw["parameters"]["rank_ratio"]
    config.write_text(yaml.safe_dump(raw))
    with pytest.raises(PaveError, match="regmean purifies nothing; .* pave_regmean would do"):
        open_merge(config, LoaderOptions(), CPU)


def test_layers_are_sampled_evenly(made):
    merge, _ = made("llama")
    assert sample.spread(range(80), 5) == [0, 20, 40, 59, 79]
    assert sample.spread([4, 9], 5) == [4, 9]
    assert sample.choose(merge.layers, 1, CPU).blocks == [1]
    assert sample.choose(merge.layers, None, CPU).blocks == [0, 1]
