"""What the README and the documents promise in a checkable form."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_pave.methods.layers import MergeState
from mergekit_pave.methods.tsv_regmean import TsvRegMean
from mergekit_pave.plugin import register
from mergekit_pave.plugin.run_merge import say_what_is_done

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def reference():
    where = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_declares(reference):
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert reference.filled(text) == text, "run python docs/make_reference.py"
    assert all(f"<!-- {name} -->" in text for name in reference.PARTS)


def test_every_environment_variable_is_in_the_reference():
    code = [*(ROOT / "mergekit_pave").rglob("*.py"), *(ROOT / "startup").glob("*.py")]
    named = {name for file in code
             for name in re.findall(r"MERGEKIT_PAVE_[A-Z]+(?:_[A-Z]+)*", file.read_text("utf-8"))}
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert named and all(f"| `{name}` |" in text for name in named)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_configuration_is_one_that_mergekit_reads(document):
    names = register()
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
        config = MergeConfiguration.model_validate(yaml.safe_load(block))
        assert config.merge_method in names


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    prose = re.sub(r"```.*?```", "\n\n", README, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\|)", prose):
        assert len(paragraph.split()) <= 90, paragraph


def test_the_last_line_of_a_merge_is_the_one_shown():
    state = MergeState()
    state.counts = {"purified": {str(i) for i in range(224)},
                    "plain": {str(i) for i in range(67)}}
    assert state.coverage(TsvRegMean.treated) in README


def test_what_a_merge_says_comes_next_is_what_is_shown(capsys):
    say_what_is_done("./merged", "tsv_regmean", MergeState(), has_data=False)
    assert capsys.readouterr().err in README
    say_what_is_done("./merged", "tsv_regmean", MergeState(), has_data=True)
    assert "--held-out" not in capsys.readouterr().err


def test_the_two_commands_are_one_line_each_and_ci_runs_that_of_the_tests():
    part = README.partition("## Two commands")[2].partition("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    assert commands == ["bash examples/quickstart/run.sh\n", "bash tests/run.sh\n"]
    assert all((ROOT / command.split()[1]).is_file() for command in commands)
    assert commands[1] in (ROOT / ".ci" / "run").read_text("utf-8")


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), target
        assert not anchor or anchor in _anchors(there), target


def test_sentences_in_troubleshooting_are_ones_that_the_code_says():
    code = " ".join(re.sub(r'"\s*f?"', "", file.read_text("utf-8"))
                    for file in (ROOT / "mergekit_pave").rglob("*.py"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [q for q in re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
              if not q.startswith("Unimplemented")]  # mergekit's own
    assert len(quoted) >= 8
    for sentence in quoted:
        for part in re.split(r"\.\.\.|; did|\b[NM]\b|\?", sentence):
            assert part.strip() in code, part
