"""TSV-Compress (arXiv 2412.00081, section 4.1): fine-tunes as low-rank differences from their base.

Each becomes a folder of its own (`compress_task`), which appears by rename when it is complete.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import name_of
from mergekit_pave.models.source import (
    LoaderOptions,
    model_source,
    paths_of,
    public_reference,
    read_config,
)
from mergekit_pave.recipe.parameters import RANK_FRACTION
from mergekit_pave.recipe.reading import configuration
from mergekit_pave.storage.archive import parsed, read_manifest
from mergekit_pave.storage.files import appearing
from mergekit_pave.storage.identity import digest
from mergekit_pave.storage.low_rank import KIND
from mergekit_pave.tasks.compress_task import Settings, Summary, compress_task


@torch.no_grad()
def compress(
    raw: Any, out: Path | str, *, rank_fraction: float | None = None, dtype: str | None = None,
    device: torch.device | None = None, options: LoaderOptions | None = None,
) -> list[Summary]:
    """Write every fine-tune of a merge configuration to a folder of its own in `out`.

    Tasks that an interrupted run with the same arguments has finished are left as they are.

    Args:
        raw: the parsed YAML; only `base_model` and `models` are looked at.
        out: a new or empty folder, or that of the interrupted run.
        rank_fraction: of each matrix's rank; one over the number of fine-tunes without it.
        dtype: of the singular vectors; each matrix's own without it.
        device: where to decompose.
        options: caches, and whether remote code may run.

    Raises:
        PaveError: a bad configuration, models that do not fit, or a folder in use.
    """
    options, out = options or LoaderOptions(), Path(out)
    rank_fraction = RANK_FRACTION.validate(rank_fraction)
    base, models = _models(raw)
    for model in (base, *models):
        read_config(model, options)
    settings = Settings(len(models), rank_fraction, dtype)
    names = _folders(models)
    _check_output(out, names)
    source = model_source(base, options)
    base_weights = digest(source.tensors())
    summaries = []
    for model, name in zip(models, names, strict=True):
        tuned = model_source(model, options)
        header = {
            "task": name, "model": tuned.label, "base": asdict(public_reference(base)),
            **asdict(settings), "weights": digest(tuned.tensors()), "base_weights": base_weights,
        }
        if not _is_finished(out / name, header):
            with appearing(out / name) as folder:
                compress_task(tuned, source, folder, header, settings,
                              device or torch.device("cpu"))
        manifest = read_manifest(out / name, KIND) or {}
        with KIND.guard(out / name):
            summaries.append(parsed(Summary, manifest["summary"]))
    return summaries


def _models(raw: Any) -> tuple[ModelReference, list[ModelReference]]:
    """The base and the fine-tunes of a parsed YAML file."""
    if not isinstance(raw, dict):
        raise PaveError("The configuration is not a YAML mapping with base_model and models.")
    for key, mend in (("base_model", "`base_model: NAME`"), ("models", "a list of fine-tunes")):
        if not raw.get(key):
            raise PaveError(f"{key} is missing: compress needs {mend} at the top level.")
    config = configuration({"merge_method": "tsv_m", **raw})
    models = [item.model for item in config.models if item.model != config.base_model]
    twice = [model for model, times in Counter(models).items() if times > 1]
    if twice:
        raise PaveError(f"models: {twice[0]} is listed twice; remove one.")
    if not models:
        raise PaveError("models: holds no fine-tuned model beside the base; add one.")
    return config.base_model, models


def _folders(models: Sequence[ModelReference]) -> list[str]:
    """A folder name for each: the last part of its path, numbered where that is not enough."""
    names: list[str] = []
    for model in models:
        parts = [name_of(path).split("/")[-1] for path in paths_of(model)]
        # mergekit reads `+` and `@` in a path as adapter and revision.
        name = re.sub(r"[^\w.-]+", "-", "-".join(parts)).lstrip(".") or "model"
        numbered = (f"{name}-{i}" for i in count(2))
        names.append(name if name not in names else next(n for n in numbered if n not in names))
    return names


def _check_output(out: Path, names: Iterable[str]) -> None:
    """Only finished tasks of an earlier run, and not all of them, may be there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PaveError(f"{out} is a file; choose a folder.")
    present = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")}
    if present - set(names) or present == set(names):
        raise PaveError(f"{out} already holds {min(present)}; choose another folder.")


def _is_finished(folder: Path, header: Mapping[str, Any]) -> bool:
    if not folder.exists():
        return False
    manifest = read_manifest(folder, KIND) or {}
    if all(manifest.get(key) == value for key, value in header.items()):
        return True
    raise PaveError(
        f"{folder} is not from an interrupted run with these models and options; choose another "
        "folder."
    )
