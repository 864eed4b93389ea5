"""The check that a merge begins with, on configurations that mergekit has parsed."""

from __future__ import annotations

import pytest
import yaml
from helpers import OPTIONS
from helpers.checks import MODEL, SHARED, change
from mergekit.config import MergeConfiguration

from mergekit_pave.check import preflight
from mergekit_pave.errors import PaveError
from mergekit_pave.plugin import register
from mergekit_pave.recipe.recipe import Recipe

register()
pytestmark = pytest.mark.usefixtures("nothing_heavy")


def test_preflight_reads_the_source_for_keys_that_mergekit_drops(good):
    source = yaml.safe_dump(change(good, "models.0.wieght", 1))
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    with pytest.raises(PaveError, match="'wieght'"):
        preflight(Recipe.as_written(config, source), OPTIONS)


@pytest.mark.parametrize("name", ["MAX_MEMORY", "STATISTICS_MEMORY", "DECOMPOSITIONS"])
def test_sizes_in_the_environment_that_are_none(good, monkeypatch, name):
    monkeypatch.setenv(f"MERGEKIT_PAVE_{name}", "lots")
    with pytest.raises(PaveError, match=f"MERGEKIT_PAVE_{name}"):
        preflight(Recipe.of(good), OPTIONS)


@pytest.mark.parametrize("source", [None, "", "a label", "merge_method: pave_ties\nmodels: []"])
def test_preflight_without_the_true_source(good, source):
    config = MergeConfiguration.model_validate(good)
    assert preflight(Recipe.as_written(config, source), OPTIONS) == []


def test_preflight_without_a_source_copes_with_spaces(good, families, tmp_path):
    folder = tmp_path / "a model"
    folder.symlink_to(families("llama")["expert0"])
    good["models"][0]["model"] = str(folder)
    config = MergeConfiguration.model_validate(good)
    assert preflight(Recipe.as_written(config, None), OPTIONS) == []
    config.parameters["rank_ratio"] = 2.0
    with pytest.raises(PaveError, match="rank_ratio"):
        preflight(Recipe.as_written(config, None), OPTIONS)


def test_preflight_says_how_many_more(good):
    bad = change(change(good, f"{SHARED}.rank_ratio", 7), f"{MODEL}.wieght", 1)
    with pytest.raises(PaveError, match=r"\(1 more: run `mergekit-pave check`\)"):
        preflight(Recipe.of(bad), OPTIONS)
