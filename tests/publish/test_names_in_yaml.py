"""Names of models and data that YAML would read as something else, through cards and records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_pave import cli
from mergekit_pave.models.names import last_part, name_of
from mergekit_pave.publish.card import write_card
from mergekit_pave.publish.scrub import scrub_card, scrub_configuration
from mergekit_pave.tasks.emr import load_task_model

NAMES = ["[v2] math", "*best*", "!x", "{a}", "a: b", "null", "2024-01-01", "~x", "-x", "- x", "#1",
         "a #b", "line\nbreak", "&anchor", "*", "%tag", "@at", "`tick`", "'quoted", '"quoted',
         "|", ">", "?", "? x", "yes", "1e3", "0x10", ".inf", "a,b", "tab\there", "a\\b", "é ü",
         "<<", "=", "---", "...", ":", "a:", "{{ jinja }}", " lead", "trail ", "a]b"]
STYLES = {
    "plain": lambda text: text, "single": lambda text: "'" + text.replace("'", "''") + "'",
    "double": lambda text: json.dumps(text, ensure_ascii=False)}


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_stable_and_printable(name):
    public = last_part(f"/srv/work/{name}")
    assert public in (last_part(public), name_of(public)) and "\n" not in public
    assert "/srv" not in public
    read = yaml.safe_load(yaml.safe_dump({"model": public}))["model"]
    assert read == public


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_says_the_same_without_the_paths(name, style):
    path = f"/srv/work/{name}"
    flow = "merge_method: ties\nmodels: [{{model: {p}}}, {{model: org/b+{p}}}]\nbase_model: {p}\n"
    source = flow.format(p=STYLES[style](path)) if style == "plain" else (
        f"merge_method: ties # from /srv/work/x\nbase_model: {STYLES[style](path)}\n"
        f"models: [{{model: {STYLES[style](path)}}}, {{model: {STYLES[style]('org/b+' + path)}}}]\n"
        f"dtype: float32\n")
    try:
        raw = yaml.safe_load(source)
        assert raw["base_model"] == raw["models"][0]["model"] == path
    except (yaml.YAMLError, AssertionError):
        return  # no YAML, or another name, as it stands
    clean = scrub_configuration(yaml.safe_load(source))
    said = yaml.safe_load(clean)
    public = last_part(path)
    if "+" not in name and "@" not in name:
        assert said["base_model"] == said["models"][0]["model"] == public
        assert said["models"][1]["model"] == f"org/b+{public}"
    assert "/srv" not in clean and said["merge_method"] == "ties"
    assert scrub_configuration(said) == clean
    card = scrub_card(f"of {path}\n\n```yaml\n{source}```\n", raw)
    assert "/srv" not in card and clean in card


@pytest.mark.parametrize("scalar", ["|-\n  /srv/work/[a]\n", ">-\n  /srv/work/[a]\n",
                                    "&it /srv/work/[a]\nmodels: [{model: *it}]\n",
                                    "!!str /srv/work/[a]\n", '"/srv/\\\n  work/[a]"\n'])
def test_every_way_to_write_a_scalar(scalar):
    clean = scrub_configuration(yaml.safe_load(f"base_model: {scalar}dtype: float32\n"))
    said = yaml.safe_load(clean)
    assert "/srv" not in clean and said["dtype"] == "float32"
    assert said["base_model"] == "./[a]"
    assert all(model["model"] == "./[a]" for model in said.get("models", []))


ON_DISK = ["[v2] math", "*best*", "!x", "{a}", "a: b", "null", "2024-01-01", "line\nbreak", "-x",
           "#1", "a #b", "'"]


@pytest.fixture(scope="module")
def merged(families, tmp_path_factory):
    """`merged(name)` -> an EMR merge of a fine-tune whose folder is called so."""

    def make(name: str) -> tuple[Path, Path]:
        folder, paths = tmp_path_factory.mktemp("names"), families("llama")
        shutil.copytree(paths["expert0"], folder / name)
        raw = {"merge_method": "emr", "base_model": str(paths["base"]), "dtype": "float32",
               "models": [{"model": str(folder / name)}, {"model": str(paths["expert1"])}]}
        (folder / "m.yml").write_text(yaml.safe_dump(raw, allow_unicode=True), "utf-8")
        ran = CliRunner().invoke(mergekit_yaml, [str(folder / "m.yml"), str(folder / "out")])
        assert ran.exit_code == 0, ran.output
        return folder / "out", folder / name

    return make


@pytest.mark.parametrize("name", ON_DISK)
def test_a_model_of_such_a_name_goes_all_the_way(merged, name):
    out, model = merged(name)
    load_task_model(out, 0)
    if "\n" not in name:
        load_task_model(out, name)
    card = write_card(out)
    said = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    assert said["models"][0]["model"] == last_part(str(model))
    assert str(out.parent) not in card
    assert write_card(out) == card
    compressed = CliRunner().invoke(
        cli.main, ["compress", str(out.parent / "m.yml"), str(out.parent / "small")])
    assert compressed.exit_code == 0, compressed.output
