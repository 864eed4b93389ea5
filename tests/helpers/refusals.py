"""Merges that are refused, and checkpoints with one thing changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from helpers import tensors_of
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec


def merge(raw: dict, out: Path, **options) -> dict[str, torch.Tensor]:
    run_merge(
        MergeConfiguration.model_validate(raw), str(out),
        MergeOptions(quiet=True, copy_tokenizer=False, **options), yaml.safe_dump(raw),
    )
    return tensors_of(out)


def refused(raw: dict, out: Path, **options) -> str:
    """The sentence with which a merge ends; what it leaves behind does not look finished."""
    with pytest.raises(PaveError) as caught:
        merge(raw, out, **options)
    assert not (out / "config.json").exists()
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?", ")"))
    return text


def rewrite(source: Path, target: Path, edit) -> Path:
    """A copy of a checkpoint with `edit(tensors)` applied to its tensors."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def calibrated(model: Path, data: Path, folder: Path, samples: int = 20) -> Path:
    source = ModelSource(str(model), model.name, str(model))
    calibrate_to(source, CalibrationSpec(str(data), num_samples=samples), folder, Resources())
    return folder
