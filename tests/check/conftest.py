"""What the tests of `check` share."""

from __future__ import annotations

import pytest

from mergekit_pave.models.source import ModelSource


@pytest.fixture
def nothing_heavy(monkeypatch):
    """No weights are read and no forward pass is made."""

    def refuse(*args, **kwargs):
        raise AssertionError("check must not do this")

    monkeypatch.setattr("mergekit_pave.calibration.run.load_model", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(ModelSource, "tensors", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
