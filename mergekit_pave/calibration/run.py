"""From a model and its data to a finished covariance store."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import align_module_device, convert_file_size_to_int
from filelock import FileLock
from tqdm import tqdm

from mergekit_pave.calibration.collect import (
    NotFinite,
    SitePlan,
    collect_window,
    plan_sites,
    windows,
)
from mergekit_pave.calibration.data import CalibrationSpec, Samples, batches, load_samples
from mergekit_pave.calibration.model import (
    LinearLayers,
    ModelSource,
    is_transposed,
    linear_layers,
    load_model,
)
from mergekit_pave.errors import PaveError
from mergekit_pave.fingerprint import digest, fingerprint
from mergekit_pave.store import (
    FORMAT,
    MANIFEST,
    CovarianceStore,
    StoreWriter,
    Weight,
    write_atomically,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What a calibration may use.

    Attributes:
        device: kind of device for the forward passes.
        max_memory: bytes of weights held in main memory, `None` for what is free.
        statistics_memory: bytes of second moments held at a time, `None` for a share of
            what is free.
    """

    device: torch.device = torch.device("cpu")
    max_memory: int | None = None
    statistics_memory: int | None = None

    @classmethod
    def from_environment(cls, device: torch.device | str = "cpu") -> Resources:
        """`MERGEKIT_PAVE_MAX_MEMORY` and `MERGEKIT_PAVE_STATISTICS_MEMORY`, such as `8GiB`.

        A device that cannot tell its free memory (MPS) leaves the forward passes to the CPU.
        """
        device = torch.device(device)
        if device.type != "cpu" and not hasattr(torch.get_device_module(device), "mem_get_info"):
            device = torch.device("cpu")
        return cls(
            device,
            parse_bytes("MERGEKIT_PAVE_MAX_MEMORY", os.environ.get("MERGEKIT_PAVE_MAX_MEMORY")),
            parse_bytes(
                "MERGEKIT_PAVE_STATISTICS_MEMORY",
                os.environ.get("MERGEKIT_PAVE_STATISTICS_MEMORY"),
            ),
        )

    def statistics_budget(self) -> int:
        if self.statistics_memory is not None:
            return self.statistics_memory
        if self.device.type != "cpu":
            return int(torch.get_device_module(self.device).mem_get_info()[0] * 0.3)
        return int(psutil.virtual_memory().available * 0.3)


def parse_bytes(name: str, text: str | None) -> int | None:
    """`8GiB`, `500MB` or a number of bytes; raises `PaveError` naming the setting."""
    if not text:
        return None
    try:
        return int(text) if text.isdigit() else convert_file_size_to_int(text)
    except ValueError:
        raise PaveError(f"{name} must be a size such as 8GiB or 500MB; got {text!r}.") from None


def cache_folder() -> Path:
    """`MERGEKIT_PAVE_CACHE`, or `mergekit-pave` in the user's cache folder."""
    if own := os.environ.get("MERGEKIT_PAVE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mergekit-pave"


def cached_store(
    source: ModelSource, spec: CalibrationSpec, resources: Resources
) -> CovarianceStore:
    """The store for this model and data from the cache, computed first if it is not there.

    Its address is the content of both: the checkpoint's values and the calibration tensors.
    Processes that want the same store wait for one another; an interrupted one is resumed.
    """
    samples = _samples(source, spec)
    model_digest = digest(source.tensors())
    key = hashlib.sha256(f"{FORMAT}|{model_digest}|{samples.digest}".encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if not (folder / MANIFEST).exists():
        _make(folder.parent)
        with _lock(folder.parent / f"{key}.lock"):
            if not (folder / MANIFEST).exists():
                return calibrate(source, samples, folder, resources, spec.batch_size, model_digest)
    return CovarianceStore(folder)


def calibrate_to(
    source: ModelSource, spec: CalibrationSpec, folder: Path, resources: Resources
) -> CovarianceStore:
    """Write the store of one model into `folder`, which may hold an interrupted run.

    Raises:
        PaveError: `folder` holds a finished store, or a run for other weights or data.
    """
    if (folder / MANIFEST).exists():
        raise PaveError(f"{folder} already holds a covariance store; choose another folder.")
    samples = _samples(source, spec)
    return calibrate(
        source, samples, folder, resources, spec.batch_size, digest(source.tensors())
    )


def _samples(source: ModelSource, spec: CalibrationSpec) -> Samples:
    return load_samples(
        spec,
        source.tokenizer,
        source.config(),
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        cache_dir=source.cache_dir,
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _lock(path: Path):
    try:
        return FileLock(path).acquire()
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> PaveError:
    return PaveError(
        f"Cannot write to the folder {folder} ({error.strerror}); name another one with "
        "--output or, for the cache of merges, with MERGEKIT_PAVE_CACHE."
    )


def calibrate(
    source: ModelSource,
    samples: Samples,
    folder: Path,
    resources: Resources,
    batch_size: int,
    model_digest: str,
) -> CovarianceStore:
    """Run the model over the samples and write its covariances, window by window."""
    _own(folder, {"model": model_digest, "data": samples.digest, "format": FORMAT})
    writer = StoreWriter(folder)
    model = load_model(source, device=resources.device, max_memory=resources.max_memory)
    layers = linear_layers(model)
    if not layers.modules:
        raise PaveError(f"{source.label} has no linear layer that could be purified.")
    work = list(batches(samples, batch_size))
    sites = plan_sites(model, layers.modules, min(work, key=_size))
    todo = windows([s for s in sites if s.name not in writer.sites], resources.statistics_budget())
    label = f"Calibrating {source.label}"
    with tqdm(total=len(todo) * len(work), desc=label, unit="batch") as progress:
        for window in todo:
            try:
                moments = collect_window(model, layers.modules, window, work, progress)
            except NotFinite as error:
                raise PaveError(_culprit(source) or f"{source.label}: {error}") from error
            # A second moment of zeros ranks no direction above another.
            useful = {n: m for n, m in moments.items() if m.count and m.sum.any()}
            writer.add({n: (m.mean, m.count) for n, m in useful.items()})
    return _finish(writer, source, samples, layers, sites, model_digest)


def _culprit(source: ModelSource) -> str | None:
    """The sentence about a checkpoint that is broken itself."""
    for name, tensor in source.tensors():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return (
                f"{name} of {source.label} holds NaN or Inf; download or save that checkpoint "
                "again."
            )
    return None


def _size(batch: dict) -> int:
    return sum(value.numel() for value in batch.values())


def _own(folder: Path, identity: dict[str, Any]) -> None:
    """Mark `folder` as this calibration's, or refuse one that another has begun."""
    _make(folder)
    path = folder / "calibration.json"
    if path.exists() and path.read_text("utf-8") != json.dumps(identity):
        raise PaveError(
            f"{folder} holds an unfinished calibration of another model or other data; delete "
            "it or choose another folder."
        )
    write_atomically(path, lambda file: file.write_text(json.dumps(identity), "utf-8"))


def _finish(
    writer: StoreWriter,
    source: ModelSource,
    samples: Samples,
    layers: LinearLayers,
    sites: list[SitePlan],
    model_digest: str,
) -> CovarianceStore:
    weights, skipped = {}, dict(layers.skipped)
    for site in sites:
        for name in site.weights:
            if site.name not in writer.sites:
                what = "zero throughout" if site.calls else "never seen in"
                skipped[name] = f"its input was {what} the forward passes"
                continue
            module = layers.modules[name]
            with align_module_device(module):
                weight = module.weight
                entry = Weight(
                    site.name,
                    tuple(weight.shape),
                    is_transposed(module),
                    str(weight.dtype).removeprefix("torch."),
                )
                weights[name] = (entry, fingerprint(weight))
    if not weights:
        raise PaveError(
            f"No linear layer of {source.label} saw an input other than zero during "
            "calibration: it overflows, or its architecture cannot be purified."
        )
    _warn_about(source, writer, skipped)
    about = {
        "model": {"id": source.label, "revision": source.revision, "digest": model_digest},
        "data": {**samples.notes, "tokens": samples.tokens, "digest": samples.digest},
        "versions": {
            name: version(name) for name in ("mergekit-pave", "torch", "transformers", "accelerate")
        },
    }
    return writer.finish(weights, skipped, about)


def _warn_about(source: ModelSource, writer: StoreWriter, skipped: dict[str, str]) -> None:
    unseen = [name for name, reason in skipped.items() if reason.startswith(("its", "fused"))]
    if unseen:
        logger.warning(
            "%s: %d weights cannot be purified and keep the plain task vector, e.g. %s (%s).",
            source.label, len(unseen), unseen[0], skipped[unseen[0]],
        )
    short = [(s.count / s.width, name) for name, s in writer.sites.items() if s.count < s.width]
    if short:
        ratio, name = min(short)
        logger.warning(
            "%s: %d of %d covariances come from fewer rows than features (least: %s, %.2f rows "
            "per feature); about %.0f times as many samples would fill them.",
            source.label, len(short), len(writer.sites), name, ratio, 1 / ratio,
        )
