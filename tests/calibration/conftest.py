"""A model with a tokenizer of a few words, and rows loaded for it."""

from __future__ import annotations

import json

import datasets
import pytest
from helpers.samples import llama, save_tokenizer

from mergekit_pave.calibration.samples import load_samples
from mergekit_pave.recipe.parameters import CalibrationSpec


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def model(tmp_path):
    save_tokenizer(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def load(tmp_path, model):
    """Write rows to a file and load them for a model: `load(rows, config, max_seq_length=8)`."""
    def load(rows, config=None, path=model, **spec):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_samples(CalibrationSpec(str(file), **spec), path, config or llama())

    return load
