"""What the README promises in a checkable form."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration

from mergekit_pave.recipe.parameters import PARAMETERS, reference_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_parameter_table_is_the_declared_one():
    shown = README.partition("<!-- parameters -->\n")[2].partition("\n<!-- /parameters -->")[0]
    assert shown == reference_table()
    assert len(shown.splitlines()) == len(PARAMETERS) + 2


def test_every_configuration_is_one_that_mergekit_reads():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        config = MergeConfiguration.model_validate(yaml.safe_load(block))
        assert config.merge_method.startswith("pave_")


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r'pip install torch\S+ && pip install -e "\.\[test\]" && pytest', README)
    assert command
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "")
    assert command.group() in ci


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
