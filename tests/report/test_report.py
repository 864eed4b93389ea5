"""The report: its numbers against independent dense computation, its page in a browser."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import merge as run_merge
from helpers import recipe

import mergekit_pave
from mergekit_pave.cli.merges import report as report_command
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.report import measure, page
from mergekit_pave.report import merge as gather
from mergekit_pave.report import survey as sample
from mergekit_pave.report.build import build, summarise
from mergekit_pave.report.figures import figures
from mergekit_pave.report.survey import depths, open_merge, place

CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KINDS = {"self_attn.q_proj": (512, 512), "self_attn.o_proj": (512, 512),
         "mlp.down_proj": (512, 1376)}


def synthetic(models: int, blocks: int, seed: int = 0) -> dict:
    """A report of made-up but plausible numbers, as large as a real one may be."""
    draw = random.Random(seed)
    layers = [
        _synthetic_layer(draw, models, block, kind, shape)
        for block in range(blocks) for kind, shape in KINDS.items()
    ]
    report = {
        "kind": "mergekit-pave report", "format": 1, "version": "0", "method": "pave_ties",
        "base": "acme/base-7b",
        "models": [f"acme/{draw.choice(['math', 'code', 'law'])}-expert-{i}-of-a-long-name"
                   for i in range(models)],
        "settings": {"rank_ratio": [0.98, 0.98], "rank_allocation": "spectral",
                     "subspace": "covariance", "dampening_frac": 0.01, "regularization": None},
        "sampling": {"blocks": list(range(blocks)), "of": blocks, "weights": len(layers),
                     "of_weights": len(layers)},
        "shares": list(measure.SHARES), "layers": layers,
        "covariances": [
            {"model": m, "site": layer["name"], "width": layer["shape"][1],
             "tokens": (n := draw.randrange(300, 40_000)),
             "tokens_per_dimension": n / layer["shape"][1],
             "effective_rank": layer["shape"][1] * draw.uniform(0.02, 0.4)}
            for layer in layers for m in range(models)],
        "coverage": [
            {"purified": {"tensors": len(layers), "reasons": {"linear layer": len(layers)}},
             "plain": {"tensors": 2 * blocks, "reasons": {"not a matrix": 2 * blocks}},
             "skipped": {"tensors": 1, "reasons": {"not in this checkpoint": 1}}}] * models,
    }
    report["summary"] = summarise(report)
    return report


def _synthetic_layer(draw, models, block, kind, shape):
    rank = min(shape)
    rows = []
    for model in range(models):
        fall = draw.uniform(4, 8)
        removed = 10 ** draw.uniform(-6, -3)
        dropped = draw.randrange(3, 16)
        rows.append({
            "model": model, "kept": rank - dropped, "dropped": dropped,
            "spectrum": {"svd": [10 ** (-1.5 * s) for s in measure.SHARES],
                         "covariance": [10 ** (-fall * s) for s in measure.SHARES]},
            "holding": {"svd": 0.8, "covariance": draw.uniform(0.05, 0.3)},
            "error": [10 ** (-fall * s) if s < 1 else 0.0 for s in measure.SHARES],
            "knee": draw.uniform(0.05, 0.3), "energy_removed": removed,
            "energy_removed_svd": 30 * removed, "task_energy_removed": 50 * removed})
    square = [[1.0 if i == j else draw.uniform(0, 0.4) for j in range(models)]
              for i in range(models)]
    return {
        "name": f"model.layers.{block}.{kind}.weight", "block": block, "kind": kind,
        "shape": list(shape), "rank": rank, "rank_ratio": 0.98, "models": rows,
        "interference": {"rank": rank // models, "before": 90.0, "after": draw.uniform(60, 100),
                         "relative_before": draw.uniform(1, 2), "relative_after": 1.0},
        "overlap": {"rank": 8, "chance": {"output": 8 / shape[0], "input": 8 / shape[1]},
                    "output": square, "input": square, "dropped": square}}


def rows(report: dict, name: str) -> dict:
    return next(layer for layer in report["layers"] if layer["name"] == name)


def opened(paths, data, folder, **parameters) -> gather.Merge:
    config = folder / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(paths, data, **parameters)))
    return open_merge(config, LoaderOptions(), CPU)


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


def random_basis(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


# --- measures ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_lost_energy_is_the_error_of_the_truncated_matrix(shape):
    a = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    lost = measure.lost_energy(s)
    for r in range(len(s) + 1):
        kept = (u[:, :r] * s[:r]) @ vh[:r]
        want = (a - kept).square().sum() / a.square().sum()
        assert lost[r].item() == pytest.approx(want.item(), abs=1e-14)


def test_knee_is_where_a_direction_holds_an_average_share():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    energy = values.square() / values.square().sum()
    above = int((energy > 1 / len(values)).sum())
    assert measure.knee(measure.lost_energy(values)) == pytest.approx(above / len(values))


def test_share_holding_counts_the_directions():
    lost = measure.lost_energy(torch.tensor([10.0, 1.0, 0.1, 0.01], dtype=torch.float64))
    assert measure.share_holding(lost) == 0.25
    assert measure.share_holding(lost, 0.9999) == 0.5


def test_output_energy_is_the_mean_over_inputs():
    x = torch.randn(200, 5, dtype=torch.float64)
    w = torch.randn(4, 5, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    want = (x @ w.T).square().sum(1).mean().item()
    assert measure.output_energy(w, covariance) == pytest.approx(want)
    basis = random_basis(4, 2, 0)
    want = (x @ w.T @ basis).square().mean(0)
    torch.testing.assert_close(measure.direction_energy(basis, w, covariance), want)


def test_effective_rank_counts_equal_directions():
    basis = random_basis(9, 4, 1)
    assert measure.effective_rank(3 * basis @ basis.T) == pytest.approx(4, rel=1e-6)


def test_overlap_is_the_mean_squared_cosine():
    a, b = random_basis(9, 3, 4), random_basis(9, 3, 5)
    cosines = torch.linalg.svdvals(a.T @ b)
    assert measure.overlap(a, b) == pytest.approx(cosines.square().mean().item())
    assert measure.overlap(a, a) == pytest.approx(1)


@pytest.mark.parametrize(("name", "block", "kind"), [
    ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
    ("model.layers.3.mlp.experts.7.up_proj.weight", 3, "mlp.experts.*.up_proj"),
    ("encoder.block.1.layer.0.SelfAttention.q.weight", 1, "layer.*.SelfAttention.q"),
    ("decoder.block.1.layer.0.SelfAttention.q.weight", 1, "decoder layer.*.SelfAttention.q"),
    ("h.0.attn.c_attn.weight", 0, "attn.c_attn"),
    ("pooler.dense.weight", None, "pooler.dense"),
])
def test_names_are_sorted_into_layers_and_kinds(name, block, kind):
    assert place(name) == (block, kind)


def test_gradients_run_over_the_layers_of_each_stack():
    found = depths(["text.layers.0.a.weight", "text.layers.4.a.weight", "head.weight",
                           "vision.layers.1.a.weight", "vision.layers.2.b.weight", "one.0.c.bias"])
    assert list(found.values()) == [0, 1, 0, 0.5, 1, 1]


# --- a whole report ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [
    ("llama", "model.layers.1.mlp.down_proj.weight"),
    ("gpt2", "transformer.h.1.attn.c_attn.weight"),
])
def test_numbers_against_the_papers_formula(made, kind, name):
    """With the inverse and dense matrices, as the paper writes it."""
    merge, report = made(kind)
    layer = next(one for one in merge.layers if one.name == name)
    row = rows(report, name)["models"][1]
    weight = merge.weight(layer, 1).double()
    c = merge.covariance(layer, 1).double()
    assert weight.shape == tuple(rows(report, name)["shape"])
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    r = row["kept"]
    purified = (u[:, :r] * s[:r]) @ vh[:r] @ torch.linalg.inv(damped)
    def energy(w):
        return torch.trace(w @ c @ w.T).item()
    removed = energy(weight - purified)
    task = energy(weight - merge.base_weight(layer).double())
    assert row["energy_removed"] == pytest.approx(removed / energy(weight), rel=1e-4)
    assert row["task_energy_removed"] == pytest.approx(removed / task, rel=1e-4)
    assert row["spectrum"]["covariance"][-1] == pytest.approx((s[-1] / s[0]).item(), rel=1e-3)
    half = report["shares"].index(0.5)
    assert row["error"][half] == pytest.approx(
        (s[round(len(s) / 2):].square().sum() / s.square().sum()).item(), rel=1e-3)


def test_kept_ranks_are_those_of_the_merge(made):
    merge, report = made("llama")
    for layer in report["layers"]:
        budget = round(0.1 * layer["rank"] * 2)
        assert sum(row["dropped"] for row in layer["models"]) == budget
    total = sum(layer["rank"] * len(layer["models"]) for layer in report["layers"])
    kept = sum(row["kept"] for layer in report["layers"] for row in layer["models"])
    assert report["summary"]["kept_share"] == pytest.approx(kept / total, rel=1e-5)


def test_coverage_tells_every_tensor_and_why(made):
    merge, report = made("llama")
    for found in report["coverage"]:
        assert sum(part["tensors"] for part in found.values()) == len(merge.base_tensors.names)
        assert found["purified"]["tensors"] == 14
        assert found["plain"]["reasons"]["vocabulary layer"] == 1


def test_tokens_per_dimension_are_the_stores(made):
    merge, report = made("llama")
    assert len(report["covariances"]) == sum(len(m.store.sites) for m in merge.models)
    for c in report["covariances"]:
        site = merge.models[c["model"]].store.sites[c["site"]]
        assert c["tokens_per_dimension"] == pytest.approx(site.count / site.width, rel=1e-5)


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
    for layer in build(merge, sample.choose(merge.layers, None, CPU), CPU)["layers"]:
        for row in layer["models"]:
            own = shown.setdefault(merge.models[row["model"]].label, {})
            own[layer["name"]] = row["dropped"]
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


# --- the page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def largest():
    report = synthetic(30, 80)
    return report, page.render(report, figures(report))


def test_thirty_models_of_eighty_layers_make_a_small_page(largest):
    _, text = largest
    assert len(text.encode()) < 10e6
    assert text.count("<svg") == 7


def test_the_page_asks_for_nothing(largest):
    _, text = largest
    assert "<script" not in text
    assert not re.search(r"""(?:src|xlink:href)\s*=\s*["'](?!data:|#)""", text)
    assert not re.search(r"@import|url\((?![\"']?(?:data:|#))", text)
    assert "default-src 'none'" in text


def test_names_are_text_and_nothing_else():
    report = synthetic(2, 1)
    evil = "<script>alert(1)</script>$x^{\\frac"
    report["models"][0] = report["base"] = evil
    for layer in report["layers"][:1]:
        layer["kind"] = '"><img src=x onerror=alert(1)>'
    text = page.render(report, figures(report))
    assert "<script" not in text and "<img" not in text
    assert html.escape(evil) in text


def test_numbers_are_written_plainly():
    assert page.written(0.98765, "percent") == "98.8%"
    assert page.written(0.0000012, "percent") == "0.00012%"
    assert page.written(1.2e-9, "percent") == "1.2·10⁻⁷%"
    assert page.written(-0.123, "change") == "−12.3%"
    assert page.written(12345, "count") == "12,345"


def test_one_model_has_no_interference_to_show(monkeypatch):
    monkeypatch.setattr(page, "svg", lambda panel: "<svg ></svg>")
    report = synthetic(1, 2)
    report["summary"]["interference"]["change"] = None
    text = page.render(report, figures(report))
    assert "Singular task interference" not in text
    assert "Who conflicts" not in text


@pytest.fixture(scope="module")
def output(families, texts, tmp_path_factory):
    """What the command writes."""
    folder = tmp_path_factory.mktemp("report")
    config = folder / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(families("llama"), texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_PAVE_CACHE", str(folder / "cache"))
        result = CliRunner().invoke(
            report_command, [str(config), "-o", str(folder / "out"), "--layers", "1"])
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_the_command_writes_page_numbers_and_figures(output, families):
    report = json.loads((output / "report.json").read_text())
    assert report["models"] == ["expert0", "expert1"]
    assert report["sampling"] == {"blocks": [1], "of": 2, "weights": 7, "of_weights": 14}
    assert len(list((output / "figures").glob("*.png"))) == 7
    text = (output / "report.html").read_text()
    assert "Sampled." in text
    for secret in (str(output.parent), str(families("llama")["base"].parent), "pytest"):
        assert secret not in text + json.dumps(report)


def test_without_matplotlib_the_extra_is_named(families, texts, tmp_path, monkeypatch):
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(families("llama"), texts)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(report_command, [str(config), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'mergekit-pave[report]'" in result.output
    assert not (tmp_path / "out").exists()


def test_the_merge_does_not_import_the_report():
    package = Path(mergekit_pave.__file__).parent
    users = {"merges.py"}
    for file in package.rglob("*.py"):
        if "report" not in file.parts and file.name not in users:
            assert not re.search(r"mergekit_pave\.report", file.read_text()), file


# --- in a browser --------------------------------------------------------------------------


def browse(path, folder, *options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
         *options, path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_numbers_and_asks_for_nothing(output, tmp_path):
    log = tmp_path / "net.json"
    shown = browse(output / "report.html", tmp_path, f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in shown.stderr
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/"]+)', log.read_text()))
    # What the browser asks on its own account, whatever the page.
    assert {h for h in hosts if not h.endswith(("google.com", "googleapis.com"))} == set()
    assert "google" not in shown.stdout
    report = json.loads((output / "report.json").read_text())
    found = re.findall(r"<data ([^>]*)>([^<]*)</data>", shown.stdout)
    assert len(found) > 25
    for attributes, text in found:
        given = dict(re.findall(r'([\w-]+)="([^"]*)"', attributes))
        value = report
        for part in given["data-key"].split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert float(given["value"]) == value
        assert text == page.written(value, given["data-style"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_no_part_of_the_page_is_wider_than_the_window(largest, tmp_path, width):
    _, text = largest
    # The page forbids scripts, so that this one needs a copy without the policy; a window
    # cannot be as narrow as a phone, a frame can.
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", probe + "</body>")
    (tmp_path / "page.html").write_text(text, "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<script>addEventListener('message', e => document.title = e.data)</script>"
        f'<iframe src="page.html" width="{width}" height="800" frameborder="0"></iframe>')
    shown = browse(frame, tmp_path, "--virtual-time-budget=3000", "--dump-dom")
    assert 0 < int(re.search(r"<title>(\d+)</title>", shown.stdout)[1]) <= width
