"""A model's covariance store: the one it names, or the cached one, computed if need be."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate as compute
from mergekit_pave.calibration.run import calibrate_to, samples_of
from mergekit_pave.errors import PaveError
from mergekit_pave.models.merged_copies import NOT_THERE
from mergekit_pave.models.source import LoaderOptions, ModelSource, model_source
from mergekit_pave.recipe.parameters import CalibrationSpec, CovarianceSource
from mergekit_pave.recipe.reading import model_reference
from mergekit_pave.storage.archive import MANIFEST
from mergekit_pave.storage.covariances import FINGERPRINTS, FORMAT, CovarianceStore
from mergekit_pave.storage.files import cache_folder, locked, make_folder


def calibrate(
    model: str,
    dataset: str,
    output: Path | str,
    *,
    resources: Resources | None = None,
    options: LoaderOptions | None = None,
    **keys: Any,
) -> CovarianceStore:
    """Compute a model's covariances on its own task data, into a store on disk.

    Args:
        model: folder or Hub id, `MODEL[@REVISION][+ADAPTER]`.
        dataset: a dataset of the Hub, a local file or a folder.
        output: folder for the store; an interrupted run goes on where it stopped.
        resources: device and memory, by default the CPU and what is free.
        options: how the model is loaded.
        keys: further fields of `recipe.parameters.CalibrationSpec`, such as `num_samples=64` or
            `text_column="question,answer"`.

    Returns:
        The second moment `C` (in, in) float32 of every linear layer's inputs, the mean over tokens.

    Raises:
        PaveError: no model or data there, or data that the model cannot read.
    """
    options = options or LoaderOptions()
    spec = CalibrationSpec(dataset, **keys)
    source = model_source(model_reference(model), options)
    calibrate_to(source, spec, Path(output), resources or Resources())
    return CovarianceStore(output)


def cached_store(
    source: ModelSource, spec: CalibrationSpec, resources: Resources
) -> CovarianceStore:
    """The store for this model and data from the cache, computed first if it is not there.

    Its address is the content of both: the model's weights and settings, and the calibration
    tensors. Processes that want the same store wait for one another; an interrupted one is resumed.
    """
    samples = samples_of(source, spec, resources)
    stamp, identity = source.stamp(), source.identity()
    key = hashlib.sha256(f"{FORMAT}|{identity}|{samples.digest}".encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if not (folder / MANIFEST).exists():
        make_folder(folder.parent)
        with locked(folder.parent / f"{key}.lock"):
            if not (folder / MANIFEST).exists():
                compute(source, samples, folder, resources, spec.batch_size, identity, stamp)
    store = CovarianceStore(folder)
    # The same rows may have had another name when they were calibrated, perhaps a private one.
    store.manifest["data"] = samples.about
    return store


def fetch_store(
    where: str, options: LoaderOptions, covariances: bool = True
) -> CovarianceStore:
    """Open the store at a local folder, or download it from the Hub (data set or model).

    Args:
        where: folder or Hub id, perhaps `ID@REVISION`.
        options: the Hub's cache.
        covariances: False to download only what tells whose they are.

    Raises:
        PaveError: there is no complete store.
    """
    if os.path.exists(where) or where.startswith((".", "/", "~")):
        return CovarianceStore(Path(os.path.expanduser(where)))
    repo, _, revision = where.partition("@")
    error: Exception | None = None
    for repo_type in ("dataset", "model"):
        try:
            folder = snapshot_download(
                repo,
                repo_type=repo_type,
                revision=revision or None,
                cache_dir=options.cache_dir,
                allow_patterns=[MANIFEST, "*.safetensors" if covariances else FINGERPRINTS],
            )
            return CovarianceStore(folder, complete=covariances)
        except NOT_THERE as failure:
            error = failure
    raise PaveError(
        f"covariance: {where!r} is neither a local folder nor a covariance store on the Hub "
        f"that can be reached ({type(error).__name__})."
    ) from error


def open_store(
    model: ModelSource, source: CovarianceSource, options: LoaderOptions, device: torch.device
) -> CovarianceStore:
    """A model's covariances: the store it names, else the cached one, computed if need be.

    Args:
        model: whose they are.
        source: the store it names, or its calibration data.
        options: for a store that has to be downloaded.
        device: for forward passes.

    Raises:
        PaveError: no store, no data, or statistics of other weights.
    """
    if source.store:
        store = fetch_store(source.store, options)
    elif source.data:
        store = cached_store(model, source.data, Resources.from_environment(device.type))
    else:
        raise PaveError(
            f"{model.label} has no calibration data: set calibration_dataset (its own task data) "
            "or covariance (a store) under its parameters."
        )
    store.verify(model.tensors(), model.label)
    return store
