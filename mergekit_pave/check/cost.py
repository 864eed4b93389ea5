"""What a merge will cost before it starts: minutes of one core, and bytes to read and write.

    seconds = (per_parameter * parameters + per_operation * operations) * models / 2 * speed

Reading, casting and adding grow with the parameters; factorising grows with
`out * in * min(out, in)` of every linear layer. The rates are those that
`tests/benchmarks/real_size.py` measures with two fine-tunes in bfloat16; `speed` is the time of one
float32 product on this machine over its time there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mergekit_pave.models.layers import empty_model, linear_layers
from mergekit_pave.models.source import LoaderOptions, read_config
from mergekit_pave.recipe.recipe import Recipe

# Seconds of one core per parameter and per operation.
RATES = {
    "ties": (1.3e-07, 4.4e-11),
    "tsv_m": (6.8e-08, 2.4e-10),
    "regmean": (6.7e-08, 1.6e-10),
    "tsv_regmean": (1.3e-07, 5.1e-10),
    "pave_ties": (2.5e-07, 2.3e-10),
}
# Seconds of one core for a product of two float32 matrices of 512 x 512, where these were taken.
_PRODUCT = 1.45e-3


@dataclass(frozen=True)
class Size:
    """Parameters of a model, operations of factorising its linear layers, bytes of a parameter."""

    parameters: int
    operations: int
    bytes: int


def size_of(config: PretrainedConfig, trust_remote_code: bool = False) -> Size:
    """The size of a model of that config, which is built without weights."""
    model = empty_model(config, trust_remote_code)
    shapes = [tuple(module.weight.shape) for module in linear_layers(model).modules.values()]
    dtype = getattr(config, "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return Size(
        sum(parameter.numel() for parameter in model.parameters()),
        sum(a * b * min(a, b) for a, b in shapes),
        (dtype or torch.float32).itemsize)


def costs(recipe: Recipe, options: LoaderOptions) -> Iterator[str]:
    """One line for a merge whose method was measured; none for others, and for slices."""
    config = recipe.config
    method = config.merge_method
    if method not in RATES or not config.models:
        return
    tuned = [entry.model for entry in config.models if entry.model != config.base_model]
    size = size_of(read_config(config.base_model or tuned[0], options), options.trust_remote_code)
    seconds = seconds_of(method, size, len(tuned)) * _speed()
    read = (len(tuned) + (config.base_model is not None)) * size.parameters * size.bytes
    out = getattr(torch, config.out_dtype or config.dtype or "", None)
    written = size.parameters * (out.itemsize if out else size.bytes)
    calibrates = any(e.calibrated and not e.get("covariance") for e in recipe.inputs)
    besides = "calibrating and start-up" if calibrates else "start-up"
    yield (
        f"{method}: {_time(seconds)} of one core of this machine besides {besides}, "
        f"{_bytes(read)} to read, {_bytes(written)} to write.")


def seconds_of(method: str, size: Size, models: int) -> float:
    """Seconds of one core of the machine where the rates were taken."""
    per_parameter, per_operation = RATES[method]
    return (per_parameter * size.parameters + per_operation * size.operations) * models / 2


def _speed() -> float:
    """How many times slower than there a float32 product is on one core here."""
    threads, x = torch.get_num_threads(), torch.ones(512, 512)
    torch.set_num_threads(1)
    try:
        taken = []
        for _ in range(8):
            start = time.thread_time()
            for _ in range(4):
                x @ x
            taken.append((time.thread_time() - start) / 4)
    finally:
        torch.set_num_threads(threads)
    return min(taken) / _PRODUCT


def _time(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 120 else f"about {minutes / 60:.1f} hours"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size > 2**30 / 10 else f"{size / 2**20:.1f} MiB"
