"""Covariances of rows that the models' own ones have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_pave.calibration.data import CalibrationSpec
from mergekit_pave.calibration.run import Resources, cached_store, calibrate, samples_of
from mergekit_pave.check.inputs import calibration_spec
from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import CALIBRATION
from mergekit_pave.report.gather import Merge, Model
from mergekit_pave.store import CovarianceStore


def from_files(
    merge: Merge, files: Sequence[str], device: torch.device
) -> list[CovarianceStore]:
    """One held-out dataset per model, read with the keys of its calibration data."""
    if len(files) != len(merge.models):
        names = ", ".join(model.label for model in merge.models)
        raise PaveError(
            f"--held-out was given {len(files)} times for {len(merge.models)} models: give it "
            f"once for each of {names}, in this order."
        )
    resources = Resources.from_environment(device.type)
    return [cached_store(model.source, _spec(model, file), resources)
            for model, file in zip(merge.models, files, strict=True)]


def _spec(model: Model, dataset: str) -> CalibrationSpec:
    values = {p.name: model.entry.get(p.name) for p in CALIBRATION}
    # They belong to the other dataset.
    values |= {"calibration_dataset": dataset, "calibration_config": None,
               "calibration_split": None}
    return CalibrationSpec.from_parameters(values)


def split(
    merge: Merge, fraction: float, folder: Path, device: torch.device
) -> tuple[Merge, list[CovarianceStore]]:
    """Calibrate on a part of each model's rows and, apart, on the rest (`fraction` of them).

    Returns:
        The merge with the first part's stores, and the stores of the rest. Both lie in
        `folder`, which has to stay while they are read.
    """
    resources = Resources.from_environment(device.type)
    fitted, held = [], []
    for number, model in enumerate(merge.models):
        if model.entry.get("covariance"):
            raise PaveError(
                f"{model.label} has a finished covariance store, whose rows cannot be split: "
                "give it rows of its task with --held-out."
            )
        parts = _parts(model, fraction, resources)
        identity = model.source.identity()
        stores = [
            calibrate(model.source, part, folder / f"{number}-{i}", resources,
                      calibration_spec(model.entry).batch_size, identity)
            for i, part in enumerate(parts)
        ]
        fitted.append(replace(model, store=stores[0]))
        held.append(stores[1])
    return replace(merge, models=fitted), held


def _parts(model: Model, fraction: float, resources: Resources):
    samples = samples_of(model.source, calibration_spec(model.entry), resources)
    count = len(samples.items)
    if count < 2:
        raise PaveError(f"{model.label} has a single calibration row, which cannot be split.")
    # The draw of rows is random already, so that the end of it is a random part.
    cut = min(max(1, round(count * (1 - fraction))), count - 1)
    for items in (samples.items[:cut], samples.items[cut:]):
        share = len(items) / count
        yield replace(samples, items=items, tokens=round(samples.tokens * share),
                      digest=f"{samples.digest}:{len(items)}")
