"""From a model and its data to a finished covariance store."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import align_module_device
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_pave.calibration.collect import (
    NotFinite,
    SitePlan,
    collect_window,
    plan_sites,
    windows,
)
from mergekit_pave.calibration.generate import generated_samples
from mergekit_pave.calibration.load import Resources, load_model
from mergekit_pave.calibration.processes import ALONE, Workers
from mergekit_pave.calibration.samples import Samples, batches, load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import LinearLayers, is_transposed, linear_layers, warn_of_unseen
from mergekit_pave.models.source import ModelSource, culprit
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.storage.covariances import FORMAT, MANIFEST, CovarianceStore, StoreWriter, Weight
from mergekit_pave.storage.files import locked, make_folder, write_atomically
from mergekit_pave.storage.identity import fingerprint


def calibrate_to(
    source: ModelSource,
    spec: CalibrationSpec,
    folder: Path,
    resources: Resources,
    workers: Workers = ALONE,
) -> CovarianceStore | None:
    """Write the store of one model into `folder`, which may hold an interrupted run.

    Returns:
        The store, in the main process only.

    Raises:
        PaveError: `folder` holds a finished store, or a run for other weights or data, or
            another process is writing to it.
    """
    with ExitStack() as held:

        def prepare() -> Samples:
            _refuse_finished(folder)
            samples = samples_of(source, spec, workers.limit(resources))
            make_folder(folder)
            held.enter_context(locked(folder / ".lock", wait=False))
            _refuse_finished(folder)
            return samples

        samples = workers.from_main(prepare)
        identities = workers.gather(source.identity())
        if len(set(identities)) > 1:
            raise PaveError(
                f"The processes of this calibration see different weights of {source.label}; "
                "give every machine the same copy."
            )
        return calibrate(
            source, samples, folder, resources, spec.batch_size, identities[0], workers
        )


def _refuse_finished(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise PaveError(f"{folder} already holds a covariance store; choose another folder.")


def samples_of(source: ModelSource, spec: CalibrationSpec, resources: Resources) -> Samples:
    """The rows that `spec` asks for, of a dataset or written by the model itself."""
    if spec.generated:
        return generated_samples(source, spec, resources)
    return load_samples(
        spec,
        source.tokenizer,
        source.config(),
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        cache_dir=source.cache_dir,
    )


def calibrate(
    source: ModelSource,
    samples: Samples,
    folder: Path,
    resources: Resources,
    batch_size: int,
    identity: str,
    workers: Workers = ALONE,
) -> CovarianceStore | None:
    """Run the model over the samples and write its covariances, window by window.

    `workers` share the samples; the main one of them writes, and alone returns the store.
    """
    begun = {"model": identity, "data": samples.digest, "format": FORMAT}
    resources = workers.limit(resources)
    scratch = folder / f".offload-{workers.rank}"
    with ExitStack() as made:
        made.callback(shutil.rmtree, scratch, ignore_errors=True)
        with workers.together():
            writer = _begin(folder, begun) if workers.main else None
        with workers.together():
            model = load_model(source, device=resources.device, max_memory=resources.max_memory,
                               scratch=scratch)
            layers = linear_layers(model)
            if not layers.modules:
                raise PaveError(f"{source.label} has no linear layer that could be purified.")
        sites = _collect(source, model, layers, samples, resources, batch_size, writer, workers)
        if writer is None:
            return None
        return finish(writer, source, samples, layers, sites, identity)


def _collect(
    source: ModelSource,
    model: PreTrainedModel,
    layers: LinearLayers,
    samples: Samples,
    resources: Resources,
    batch_size: int,
    writer: StoreWriter | None,
    workers: Workers,
) -> list[SitePlan]:
    """Have the main process's `writer` hold the covariances of all sites; returns the sites."""
    work = list(batches(workers.deal(samples), batch_size))
    budget = min(workers.gather(resources.statistics_budget()))
    sites, todo = workers.from_main(lambda: _plan(model, layers, work, writer, budget))
    label = f"Calibrating {source.label}"
    bar = tqdm(total=len(todo) * len(work), desc=label, unit="batch", disable=not workers.main)
    with bar as progress:
        for window in todo:
            with workers.together():
                try:
                    moments = collect_window(model, layers.modules, window, work, progress)
                except NotFinite as error:
                    raise PaveError(culprit(source) or f"{source.label}: {error}") from error
            workers.total(moments)
            if writer:
                # A second moment of zeros ranks no direction above another.
                for name in [n for n, m in moments.items() if not (m.count and m.sum.any())]:
                    del moments[name]
                writer.take(moments)
    return sites


def _plan(
    model: PreTrainedModel,
    layers: LinearLayers,
    work: Sequence[dict],
    writer: StoreWriter,
    budget: int,
) -> tuple[list[SitePlan], list[list[SitePlan]]]:
    """All sites, and the windows of those that are not finished yet."""
    smallest = min(work, key=lambda batch: sum(value.numel() for value in batch.values()))
    # Of one row: a classifier without a padding token takes no more, and this pass goes through
    # its head.
    one = {name: value[:1] for name, value in smallest.items()}
    sites = plan_sites(model, layers.modules, one)
    return sites, windows([site for site in sites if site.name not in writer.sites], budget)


def _begin(folder: Path, begun: dict[str, Any]) -> StoreWriter:
    """Mark `folder` as this calibration's, or refuse one that another has begun."""
    make_folder(folder)
    path = folder / "calibration.json"
    if path.exists() and path.read_text("utf-8") not in ("", json.dumps(begun)):
        raise PaveError(
            f"{folder} holds an unfinished calibration of another model or other data; delete "
            "it or choose another folder."
        )
    write_atomically(path, lambda file: file.write_text(json.dumps(begun), "utf-8"))
    for left in folder.glob(".offload-*"):  # by processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    return StoreWriter(folder)


logger = logging.getLogger(__name__)


def finish(
    writer: StoreWriter,
    source: ModelSource,
    samples: Samples,
    layers: LinearLayers,
    sites: Sequence[SitePlan],
    identity: str,
) -> CovarianceStore:
    """Write fingerprints and manifest of a store whose covariances are all there.

    Raises:
        PaveError: no layer saw an input.
    """
    weights, skipped = {}, dict(layers.skipped)
    for site in sites:
        for name in site.weights:
            if site.name in writer.sites:
                weights[name] = _entry(site.name, layers.modules[name])
            else:
                what = "zero throughout" if site.calls else "never seen in"
                skipped[name] = f"its input was {what} the forward passes"
    if not weights:
        raise PaveError(
            f"No linear layer of {source.label} saw an input other than zero during "
            "calibration: it overflows, or its architecture cannot be purified."
        )
    _warn_about(source, writer, skipped)
    about = {
        "model": {"id": source.label, "revision": source.revision, "digest": identity},
        "data": samples.about,
        "versions": {
            name: version(name) for name in ("mergekit-pave", "torch", "transformers", "accelerate")
        },
    }
    return writer.finish(weights, skipped, about)


def _entry(site: str, module: nn.Module):
    with align_module_device(module):
        weight = module.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return Weight(site, tuple(weight.shape), is_transposed(module), dtype), fingerprint(weight)


def _warn_about(source: ModelSource, writer: StoreWriter, skipped: dict[str, str]) -> None:
    warn_of_unseen(source.label, skipped)
    short = [(s.count / s.width, name) for name, s in writer.sites.items() if s.count < s.width]
    if short:
        ratio, name = min(short)
        logger.warning(
            "%s: %d of %d covariances come from fewer tokens than features (least: %s, %.2f tokens "
            "per feature); about %.0f times as many samples would fill them.",
            source.label, len(short), len(writer.sites), name, ratio, 1 / ratio,
        )
