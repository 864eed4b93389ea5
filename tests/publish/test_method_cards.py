"""The cards of our own methods, and of twins that purify nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.cards import BEGIN, kept, make_output, recorded_as, texts_of
from huggingface_hub import ModelCard
from mergekit.merge_methods import get

from mergekit_pave import methods as merging
from mergekit_pave.methods.base import ABOUT
from mergekit_pave.plugin import register
from mergekit_pave.publish.card import write_card

register()


PAPERS = {"tsv_m": ["2412.00081"], "regmean": ["2212.09849"], "emr": ["2405.17461"],
          "tsv_regmean": ["2412.00081", "2212.09849"],
          "matched_regmean": ["2212.09849", "2412.00081"]}
PAVES = "2510.14697"


def own(folder: Path, method: str, parameters: str = "{}") -> Path:
    """The output of a merge of two models, with data where the method looks at any."""
    data = "parameters: {calibration_dataset: openai/gsm8k}" if "regmean" in method else ""
    return make_output(folder, f"""\
merge_method: {method}
base_model: org/base
models:
  - model: org/math
    {data}
  - model: /srv/models/code
    {data}
parameters: {parameters}
""")


def test_every_method_of_ours_has_its_words():
    ours = {method.spec.name for method in merging.methods()}
    assert ours == set(ABOUT) == set(PAPERS)
    for name, about in ABOUT.items():
        assert [paper.arxiv for paper in about.papers] == PAPERS[name]
        assert get(name).spec.reference_url == about.papers[0].url


@pytest.mark.parametrize("method", PAPERS)
def test_a_method_of_ours_says_what_it_did(tmp_path, method):
    out = own(tmp_path / "out", method)
    text = write_card(out)
    new = text.partition(BEGIN)[2]
    assert new.count("@misc") == len(PAPERS[method]) and "purified" not in new and PAVES not in new
    for paper in PAPERS[method]:
        assert f"[arXiv {paper}](https://arxiv.org/abs/{paper})" in new
        assert f"eprint = {{{paper}}}" in new
    data = ModelCard(text).data
    assert data.tags == ["mergekit", "merge", method]
    assert data.base_model == ["org/base", "org/math"]
    assert "/srv" not in texts_of(out) and "None" not in text
    assert ("## Calibration" in new) == ("regmean" in method)
    assert write_card(out) == text


def test_settings_of_a_method_of_ours(tmp_path):
    text = write_card(own(tmp_path / "tsv", "tsv_m", "{lambda: 1.2, rank_fraction: [0.1, 0.2]}"))
    assert ("`rank_fraction` as configured, `flattening` 0.0, `strength` plain, `lambda` 1.2, "
            "`lambda_other` 1.0.") in text
    text = write_card(own(tmp_path / "emr", "emr", "{rescaler: global}"))
    assert "`rescaler` global." in text and "materialize" in text


def test_covariances_that_solved_a_merge(tmp_path):
    out = own(tmp_path / "out", "regmean", "{averaging: 0.2}")
    assert "| org/math | [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in (
        write_card(out))
    recorded_as(out, kept(tmp_path, org__math={}))
    text = write_card(out)
    assert "* 2 tensors were merged by their covariances, 1 merged plainly." in text
    assert "linear layers that were not merged by their covariances (vocabulary layer: 1)" in text
    assert "`averaging` 0.2, `flattening` 0.0" in text
    assert "ranks kept" not in text and "rank_ratio" not in text


@pytest.mark.parametrize("method", ["pave_tsv_m", "pave_emr", "pave_regmean"])
def test_a_twin_of_a_method_of_ours_cites_both(tmp_path, method):
    out = own(tmp_path / "out", method)
    recorded_as(out, kept(tmp_path, org__math={"a": (10, 1)}))
    text = write_card(out)
    inner = method.removeprefix("pave_")
    for paper in (PAVES, *PAPERS[inner]):
        assert f"eprint = {{{paper}}}" in text
    assert "were purified before they were merged" in text and "90.00%" in text
    assert "* 2 tensors were purified, 1 merged plainly." in text
    assert ModelCard(text).data.tags == ["mergekit", "merge", "pave", inner]


@pytest.mark.parametrize("method", ["pave_ties", "pave_tsv_m", "pave_regmean"])
def test_what_purified_nothing_does_not_claim_it(tmp_path, method):
    out = own(tmp_path / "out", method, "{rank_ratio: 1.0}")
    state = SimpleNamespace(counts={"purified": set(), "plain": {"a"}}, used={}, ranks={},
                            data_free=set())
    recorded_as(out, state)
    text = write_card(out)
    assert f"Nothing was purified: the merge is that of `{method.removeprefix('pave_')}`." in text
    assert f"eprint = {{{PAVES}}}" not in text and "before they were merged" not in text
    assert "merged plainly" not in text
