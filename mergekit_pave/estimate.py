"""What a calibration will cost, from configs alone: the model is built without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from mergekit_pave.calibration.collect import SitePlan, plan_sites
from mergekit_pave.calibration.model import empty_model, linear_layers
from mergekit_pave.check import calibration_spec, configuration, inputs, read_config
from mergekit_pave.sources import LoaderOptions

logger = logging.getLogger(__name__)


def sites_of(config: PretrainedConfig, trust_remote_code: bool = False) -> list[SitePlan]:
    """The sites of a model of that config, from a forward pass without weights.

    Where the pass cannot run on the `meta` device every layer counts as its own site, an
    upper bound.
    """
    model = empty_model(config, trust_remote_code).eval()
    modules = linear_layers(model).modules
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long, device="meta")}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        shape = (1, getattr(config, "num_channels", 3), size, size)
        batch = {"pixel_values": torch.ones(shape, device="meta")}
    try:
        return plan_sites(model, modules, batch, device=torch.device("meta"))
    except Exception as error:  # whatever a model's code cannot do without values
        logger.info("No forward pass of %s without weights: %s", type(model).__name__, error)
        return plan_sites(model, modules, None)


def estimates(raw: Any, options: LoaderOptions) -> Iterator[str]:
    """One line per model to calibrate: covariances, memory, disk, tokens."""
    for entry in inputs(configuration(raw)):
        if entry.get("covariance") or not entry.get("calibration_dataset"):
            continue
        sites = sites_of(read_config(entry.model, options), options.trust_remote_code)
        size = sum(site.bytes for site in sites)
        spec = calibration_spec(entry)
        yield (
            f"{entry.model}: {len(sites)} covariances, {_gib(size)} of sums in memory if held "
            f"at once (at least {_gib(max(site.bytes for site in sites))}), {_gib(size // 2)} on "
            f"disk, at most {spec.num_samples * spec.max_seq_length:,} tokens per pass."
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
