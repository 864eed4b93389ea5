"""Versions of mergekit, and its noise."""

from __future__ import annotations

import logging
from importlib import metadata

import pytest
import torch
import transformers
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_pave import plugin
from mergekit_pave.errors import PaveError

plugin.register()


@pytest.mark.parametrize("found", ["0.1.5", "0.1.5+g1a2b3c", "0.1.5.post1", "0.1.5.dev3", "0.1.6",
                                   "0.1.10rc1", "0.2", "0.1.5-1"])
def test_versions_of_mergekit_that_will_do(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    plugin._require_mergekit()


@pytest.mark.parametrize("found", ["0.1.4", "0.1.4.post1", "0.1.4+g1a2b3c", "0.1", "0.0.9"])
def test_versions_of_mergekit_that_are_too_old(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(PaveError, match=f"0.1.5 or newer, found {found}".replace("+", r"\+")):
        plugin._require_mergekit()


def test_a_merge_does_not_tell_its_user_of_a_word_that_mergekit_uses(families, tmp_path, caplog):
    paths = families("llama")
    raw = {"merge_method": "linear", "dtype": "bfloat16",
           "models": [{"model": str(paths["base"]), "parameters": {"weight": 1.0}}]}
    transformers.utils.logging._get_library_root_logger().propagate = True
    transformers.configuration_utils.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        run_merge(MergeConfiguration.model_validate(raw), str(tmp_path / "out"),
                  MergeOptions(quiet=True))
    assert "torch_dtype" not in caplog.text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert str(config.dtype) == "torch.bfloat16"
    # The filter is for that call alone.
    transformers.configuration_utils.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        config.torch_dtype = "float32"
    assert "torch_dtype" in caplog.text


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 1, 4), (2, 1, 3, 3)])
def test_della_takes_entries_that_are_alone_in_their_row(shape):
    """As the gate of a cross attention, or the probe of SigLIP's pooling head."""
    torch.manual_seed(0)
    draws = torch.stack([sparsify.della_magprune(torch.ones(shape), 0.5, 0.1)
                         for _ in range(400)])
    assert set(draws.unique().tolist()) == {0.0, 1.0} and 0.4 < draws.mean() < 0.6
    assert torch.equal(sparsify.della_magprune(torch.ones(shape), 1.0, 0.1), torch.ones(shape))
