"""What a calibration will cost, from configs alone: the model is built without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from mergekit_pave.calibration.collect import SitePlan, plan_sites
from mergekit_pave.calibration.generate import LENGTH
from mergekit_pave.calibration.limits import length_limit, main_input
from mergekit_pave.calibration.needs import empty_inputs
from mergekit_pave.calibration.rows import open_rows
from mergekit_pave.models.layers import empty_model, linear_layers
from mergekit_pave.models.source import LoaderOptions, read_config
from mergekit_pave.recipe.inputs import calibration_spec
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


def sites_of(config: PretrainedConfig, trust_remote_code: bool = False) -> list[SitePlan]:
    """The sites of a model of that config, from a forward pass without weights.

    Where no such pass is possible every layer counts as its own site, an upper bound.
    """
    # Fake tensors tell transformers not to look at values, which `meta` alone does not;
    # in bfloat16 because some kernels of mixtures of experts are only described for it.
    model = empty_model(config, trust_remote_code).eval().to("meta", torch.bfloat16)
    modules = linear_layers(model).modules
    try:
        with _quiet_fakes(), FakeTensorMode(allow_non_fake_inputs=True):
            batch = empty_inputs(model.config, model.main_input_name == "pixel_values")
            plan = plan_sites(model, modules, batch, device=torch.device("meta"))
            return [site for site in plan if site.calls]
    except Exception as error:  # whatever a model's code cannot do without values
        logger.info("No forward pass of %s without weights: %s", type(model).__name__, error)
        return plan_sites(model, modules, None)


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """torch logs an operation that it cannot fake as an error; here it is an expected end."""
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    before, fakes.disabled = fakes.disabled, True
    try:
        yield
    finally:
        fakes.disabled = before


def estimates(recipe: Recipe, options: LoaderOptions) -> Iterator[str]:
    """One line per model to calibrate: covariances, memory, disk, tokens."""
    for entry in recipe.inputs:
        if not entry.calibrated or entry.get("covariance"):
            continue
        config = read_config(entry.model, options)
        sites = sites_of(config, options.trust_remote_code)
        size = sum(site.bytes for site in sites)
        spec = calibration_spec(entry)
        yield (
            f"{entry.model}: {len(sites)} covariances, {_gib(size)} of sums in memory if held "
            f"at once (at least {_gib(max(site.bytes for site in sites))}), {_gib(size // 2)} on "
            f"disk, {_amount(config, spec)}."
        )


def _amount(config: PretrainedConfig, spec: CalibrationSpec) -> str:
    if spec.generated:
        drawn = spec.num_samples * min(LENGTH, length_limit(config, None, spec.max_seq_length))
        return f"at most {drawn:,} tokens to generate before the first pass"
    data = open_rows(spec)
    rows = min(spec.num_samples, data.count or spec.num_samples)
    if main_input(config) == "pixel_values":
        return f"{rows:,} images per pass"
    most = rows * length_limit(config, None, spec.max_seq_length)
    return f"at most {most:,} tokens per pass ({rows} rows, column {', '.join(data.columns)})"


def _gib(size: int) -> str:
    if size < 2**30 / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:.1f} GiB"
