"""The report's page: small, self-contained, the same in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers import recipe
from helpers.reports import synthetic

import mergekit_pave
from mergekit_pave.cli.merges import report as report_command
from mergekit_pave.errors import PaveError
from mergekit_pave.report import page
from mergekit_pave.report.evaluated import read_evaluation
from mergekit_pave.report.figures import figures

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


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
    image = '"><img src=x onerror=alert(1)>'
    report = replace(report, models=[evil, *report.models[1:]], base=evil, layers=[
        replace(report.layers[0], kind=image), *report.layers[1:]])
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
    report = replace(report, summary=replace(
        report.summary, interference=replace(report.summary.interference, change=None)))
    text = page.render(report, figures(report))
    assert "Singular task interference" not in text
    assert "Who conflicts" not in text


def test_an_evaluation_is_a_figure_of_the_page(tmp_path):
    def of(model, value):
        return {"model": model, "kept": value and {
            "value": value, "low": value - 0.1, "high": value + 0.2}}

    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"ties": {"tasks": [of("math<b>", 0.8), of("law", None)]},
                                "tsv": {"tasks": [of("math<b>", 0.9), of("law", -0.25)]}}))
    report = replace(synthetic(2, 2), evaluation=read_evaluation(file))
    axes = figures(report)["kept"].axes[0]
    bars = {bar.get_label(): bar for bar in axes.containers}
    assert [bar.lines[0].get_xdata().tolist() for bar in bars.values()] == [[80], [90, -25]]
    ends = bars["tsv"].lines[2][0].get_segments()[1][:, 0]
    assert ends == pytest.approx([-35, -5])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["math<b>", "law"]
    text = page.render(report, figures(report))
    assert "What does the merge keep?" in text and "math<b>" not in text
    for wrong in ("[]", "{}", "{", '{"a": {"tasks": [{"model": "x", "kept": {}}]}}'):
        file.write_text(wrong)
        with pytest.raises(PaveError, match="evaluat"):
            read_evaluation(file)


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
