"""What a calibration may use: a device, memory for weights, memory for sums, a cache folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int

from mergekit_pave.errors import PaveError


@dataclass(frozen=True)
class Resources:
    """What one process of a calibration may use.

    Attributes:
        device: kind of device for the forward passes, or a single one (`cuda:1`).
        max_memory: bytes of weights held in main memory, `None` for what is free.
        statistics_memory: bytes of second moments held at a time, `None` for a share of
            what is free.
    """

    device: torch.device = torch.device("cpu")
    max_memory: int | None = None
    statistics_memory: int | None = None

    @classmethod
    def from_environment(cls, device: torch.device | str = "cpu") -> Resources:
        """`MERGEKIT_PAVE_MAX_MEMORY` and `MERGEKIT_PAVE_STATISTICS_MEMORY`, such as `8GiB`.

        A device that cannot tell its free memory (MPS) leaves the forward passes to the CPU.
        """
        device = torch.device(device)
        if device.type != "cpu" and not hasattr(torch.get_device_module(device), "mem_get_info"):
            device = torch.device("cpu")
        return cls(
            device,
            parse_bytes("MERGEKIT_PAVE_MAX_MEMORY", os.environ.get("MERGEKIT_PAVE_MAX_MEMORY")),
            parse_bytes(
                "MERGEKIT_PAVE_STATISTICS_MEMORY",
                os.environ.get("MERGEKIT_PAVE_STATISTICS_MEMORY"),
            ),
        )

    def weights_budget(self) -> int:
        if self.max_memory is not None:
            return self.max_memory
        return int(psutil.virtual_memory().available * 0.7)

    def statistics_budget(self) -> int:
        if self.statistics_memory is not None:
            return self.statistics_memory
        if self.device.type != "cpu":
            return int(torch.get_device_module(self.device).mem_get_info(self.device)[0] * 0.3)
        return int(psutil.virtual_memory().available * 0.3)


def parse_bytes(name: str, text: str | None) -> int | None:
    """`8GiB`, `500MB` or a number of bytes; raises `PaveError` naming the setting."""
    if not text:
        return None
    try:
        return int(text) if text.isdigit() else convert_file_size_to_int(text)
    except (ValueError, OverflowError):
        raise PaveError(f"{name} must be a size such as 8GiB or 500MB; got {text!r}.") from None


def cache_folder() -> Path:
    """`MERGEKIT_PAVE_CACHE`, or `mergekit-pave` in the user's cache folder."""
    if own := os.environ.get("MERGEKIT_PAVE_CACHE"):
        return Path(os.path.expanduser(own))
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(caches)) / "mergekit-pave"
