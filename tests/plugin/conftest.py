"""Stores of two tiny fine-tunes, and a merge that takes everything from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import recipe
from helpers.refusals import calibrated


@pytest.fixture(scope="session")
def stores(families, texts, tmp_path_factory) -> list[Path]:
    """A covariance store of each fine-tune of the llama family."""
    folder = tmp_path_factory.mktemp("stores")
    return [calibrated(families("llama")[f"expert{i}"], texts[i], folder / str(i))
            for i in range(2)]


@pytest.fixture
def published(families, texts, stores, tmp_path) -> dict:
    """A merge that takes everything from stores, the first of them to be tampered with."""
    raw = recipe(families("llama"), texts)
    shutil.copytree(stores[0], tmp_path / "store")
    for model, store in zip(raw["models"], [tmp_path / "store", stores[1]], strict=True):
        del model["parameters"]["calibration_dataset"]
        model["parameters"]["covariance"] = str(store)
    return raw


@pytest.fixture
def untouched(monkeypatch):
    """Fails the test when mergekit begins with the merge."""

    def refuse(*args, **kwargs):
        raise AssertionError("the merge was begun")

    monkeypatch.setattr("mergekit.merge.get_architecture_info", refuse)
    monkeypatch.setattr("mergekit_pave.calibration.run.load_model", refuse)
