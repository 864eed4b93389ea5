"""Forward passes in, covariances out: hooks on linear layers, window by window.

A *site* is one input tensor; the layers that read it (q/k/v, gate/up) share one covariance.
Only the sums of the sites of the current window exist at a time, and hooks only look at
inputs: an offloaded layer's weight is not there to be read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_pave.algebra.second_moment import SecondMoment
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import LinearLayer

logger = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class SitePlan:
    """One input tensor, named after the first weight that reads it.

    Attributes:
        weights: names of all weights that read it, the first is the site's name.
        width: features.
        calls: how often it was read in one forward pass; 0 for a layer that was not reached.
    """

    weights: tuple[str, ...]
    width: int
    calls: int

    @property
    def name(self) -> str:
        return self.weights[0]

    @property
    def bytes(self) -> int:
        return 4 * self.width**2


class NotFinite(PaveError):
    """An input of a linear layer holds NaN or Inf."""


class Stop(Exception):
    """Ends a forward pass once the hooks have seen all that they need."""


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator:
    """Call `see(name, input)` whenever one of `modules` is about to run."""

    def hook(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def pre_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(name, args[0] if args else kwargs["input"])

        return pre_forward

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a batch has to be; accelerate moves that of an offloaded model."""
    return model.device if model.device.type != "meta" else torch.device("cpu")


def forward(
    model: PreTrainedModel,
    batch: Batch,
    device: torch.device | None = None,
    logits: bool = False,
) -> Any:
    """One pass; returns the model's output, `None` when a hook ended it early.

    A language model computes the logits of the last token only, unless `logits`.

    Inputs go to `device`, by default the model's.
    """
    device = device or input_device(model)
    inputs: dict[str, Any] = {
        key: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for key, value in batch.items()
    }
    if "input_ids" in inputs and getattr(model.config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    if not logits and "logits_to_keep" in _arguments(type(model).forward):
        # The logits of every token are often larger than all that is collected.
        inputs["logits_to_keep"] = 1
    try:
        with torch.inference_mode():
            return model(**inputs)
    except Stop:
        return None


@cache
def _arguments(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def plan_sites(
    model: PreTrainedModel,
    modules: Mapping[str, LinearLayer],
    batch: Batch | None,
    device: torch.device | None = None,
) -> list[SitePlan]:
    """Find the sites, in the order of the forward pass, by running it once.

    Without a batch no pass is made and every layer is a site of its own.

    Layers share a site when they are handed the *same tensor object* one after the other.
    The tensor is held while it is compared: its address alone may be reused.
    """
    last: list[Tensor] = []
    groups: list[list[str]] = []
    calls: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == 1:
            if last and x is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
        last[:] = [x]

    if batch is not None:
        with watching(modules, see):
            _try(model, batch, device)
    plans = []
    for group in groups:
        # A layer that runs several times per pass reads several tensors: it shares with none.
        parts = [group] if all(calls[n] == 1 for n in group) else [[n] for n in group]
        plans += [SitePlan(tuple(p), _width(modules[p[0]]), calls[p[0]]) for p in parts]
    unreached = [name for name in modules if name not in calls]
    return plans + [SitePlan((name,), _width(modules[name]), 0) for name in unreached]


def _try(model: PreTrainedModel, batch: Batch, device: torch.device | None) -> None:
    """The first pass of all, which shows whether the model runs on such data.

    Raises:
        PaveError: it does not, as one that needs an input which no data of ours has.
    """
    try:
        forward(model, batch, device)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise PaveError(
            f"A {type(model).__name__} does not run on {' and '.join(batch)} alone "
            f"({type(error).__name__}: {reason}); give this model a `covariance` store, or use "
            "`calibration_dataset: none`."
        ) from error


def _width(module: LinearLayer) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]


def windows(sites: Sequence[SitePlan], budget: int) -> list[list[SitePlan]]:
    """Cut the sites, in order, into runs whose sums fit `budget` bytes (one site at least)."""
    runs: list[list[SitePlan]] = []
    used = 0
    for site in sites:
        if not runs or used + site.bytes > budget:
            runs.append([])
            used = 0
        runs[-1].append(site)
        used += site.bytes
    return runs


def collect_window(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    window: Sequence[SitePlan],
    batches: Sequence[Batch],
    progress: tqdm,
    run: Callable[[int], Any] | None = None,
) -> dict[str, SecondMoment]:
    """Second moments of one window's sites over all batches.

    Args:
        model: the model.
        modules: its linear layers by weight name.
        window: the sites.
        batches: inputs of its forward passes.
        progress: one step per batch.
        run: sends the batch of that number through the part of the model that holds the sites;
            by default the model runs up to the last of them.

    Raises:
        NotFinite: an input holds NaN or Inf.
    """
    moments = {site.name: SecondMoment(site.width) for site in window}
    remaining = expected = sum(site.calls for site in window)
    stop_early = run is None and all(site.calls for site in window)

    def see(name: str, x: Tensor) -> None:
        nonlocal remaining
        moments[name].add(x)
        remaining -= 1
        if stop_early and remaining == 0:
            raise Stop

    with watching({site.name: modules[site.name] for site in window}, see):
        for number, batch in enumerate(batches):
            remaining = expected
            if run:
                run(number)
            else:
                forward(model, batch)
            bad = _first_not_finite(moments)
            if bad:
                raise NotFinite(
                    f"the input of {bad.removesuffix('.weight')} holds NaN or Inf in "
                    f"calibration batch {number} ({_shape(batch)}): the model overflows or its "
                    "weights are broken; check that it runs on this data at all."
                )
            progress.update()
    return moments


def _first_not_finite(moments: Mapping[str, SecondMoment]) -> str | None:
    """The first site that has seen NaN or Inf."""
    seen = {name: moment.finite() for name, moment in moments.items() if moment.count}
    return next((name for name, finite in seen.items() if not finite), None)


def _shape(batch: Batch) -> str:
    name, value = next(iter(batch.items()))
    return f"{name} of shape {tuple(value.shape)}"
