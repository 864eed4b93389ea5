"""What a calibration may use: a device, memory for weights, memory for sums, a cache folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import BUILDING, model_class, refuse_quantised
from mergekit_pave.models.loaded import NO_ADAPTER, refuse_other_values, refuse_random
from mergekit_pave.models.source import ModelSource
from mergekit_pave.storage.sizes import from_environment


@dataclass(frozen=True)
class Resources:
    """What one process of a calibration may use.

    Attributes:
        device: kind of device for the forward passes, or a single one (`cuda:1`). One that
            cannot tell its free memory (MPS) leaves them to the CPU.
        max_memory: bytes of weights held in main memory, `None` for what is free.
        statistics_memory: bytes of second moments held at a time, `None` for a share of
            what is free.
    """

    device: torch.device = torch.device("cpu")
    max_memory: int | None = None
    statistics_memory: int | None = None

    def __post_init__(self) -> None:
        kind = self.device.type
        if kind != "cpu" and not hasattr(torch.get_device_module(kind), "mem_get_info"):
            object.__setattr__(self, "device", torch.device("cpu"))

    @classmethod
    def from_environment(cls, device: torch.device | str = "cpu") -> Resources:
        """`MERGEKIT_PAVE_MAX_MEMORY` and `MERGEKIT_PAVE_STATISTICS_MEMORY`, such as `8GiB`."""
        return cls(
            torch.device(device),
            from_environment("MERGEKIT_PAVE_MAX_MEMORY"),
            from_environment("MERGEKIT_PAVE_STATISTICS_MEMORY"),
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


def load_model(
    source: ModelSource,
    *,
    device: torch.device,
    max_memory: int | None = None,
    scratch: Path | None = None,
    other_head: bool = False,
    head: bool = False,
) -> PreTrainedModel:
    """Load for forward passes only, placed by accelerate; weights may stay in their shards.

    Args:
        source: the model.
        device: `cpu`, an accelerator (`cuda:1`), or a kind of them, of which all are used.
        max_memory: bytes of weights to hold in main memory; the rest is read from the
            shards as it is needed. By default what is free, less a reserve.
        scratch: folder for a copy of those weights that cannot be read from their shards:
            of pickled checkpoints, and those that transformers rearranges (experts).
        other_head: the caller replaces the head: one of another size, or none, is no fault.
        head: what follows needs the model's own head, which must not be random.

    Raises:
        PaveError: the checkpoint is quantised, transformers cannot load it, or loads something
            else than its files hold.
    """
    config = source.config()
    refuse_quantised(config, source.label)
    dtype = _compute_dtype(config, device)
    size = _checkpoint_bytes(source, config)
    room = max_memory if max_memory is not None else int(psutil.virtual_memory().available * 0.7)
    placement: dict[str, Any] = {}
    if device.type != "cpu":
        placement = {"device_map": "auto", "max_memory": _accelerator_memory(device, room)}
    elif size > room:
        placement = {"device_map": "auto", "max_memory": {"cpu": room}}
    if placement and scratch is not None:
        placement["offload_folder"] = str(scratch)
    cls = model_class(config)
    extra = {} if not source.trust_remote_code else {"trust_remote_code": True}
    if other_head:
        extra["ignore_mismatched_sizes"] = True
    try:
        with BUILDING:
            model, info = cls.from_pretrained(
                source.path, config=config, dtype=dtype, output_loading_info=True, **NO_ADAPTER,
                **placement, **extra,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise PaveError(f"Cannot load {source.label} for calibration: {error}") from error
    refuse_random(model, info, source.label, head=head)
    refuse_other_values(model, source.tensors(), source.label)
    model.eval()
    return model


def _compute_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """float32 on CPU; on an accelerator the checkpoint's own, float16 as bfloat16.

    float16 overflows in the activations of several model families.
    """
    if device.type == "cpu":
        return torch.float32
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype in (None, torch.float64):
        return torch.float32
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _accelerator_memory(device: torch.device, room: int) -> dict[int | str, int]:
    # Statistics, activations and the workspace of their products share the card.
    module = torch.get_device_module(device)
    indices = range(module.device_count()) if device.index is None else [device.index]
    limits: dict[int | str, int] = {
        index: int(module.mem_get_info(index)[0] * 0.5) for index in indices
    }
    return {**limits, "cpu": room}


def _checkpoint_bytes(source: ModelSource, config: PretrainedConfig) -> int:
    """Bytes of the weights when held as float32, from the sizes of the shards."""
    half = str(getattr(config, "dtype", "")).endswith("16")
    return source.stored_bytes() * (2 if half else 1)
