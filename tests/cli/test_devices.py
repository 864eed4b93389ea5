"""An accelerator that cannot tell its free memory, as Apple's MPS."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from click import BadParameter

from mergekit_pave.calibration.load import Resources
from mergekit_pave.cli.options import device_of


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: SimpleNamespace())


def test_the_forward_passes_stay_on_the_cpu(mac):
    for resources in (Resources(torch.device("mps")), Resources.from_environment("mps")):
        assert resources.device == torch.device("cpu")
        assert resources.statistics_budget() > 0


def test_auto_is_the_cpu_and_the_name_is_refused(mac):
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(BadParameter, match="'mps' cannot be used here; give cpu"):
        device_of("mps")
