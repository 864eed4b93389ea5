"""From a model and its data to a finished covariance store."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_pave.calibration.blocks import Walk
from mergekit_pave.calibration.collect import NotFinite, SitePlan, collect_window, windows
from mergekit_pave.calibration.finish import Entry, entries_within, finish
from mergekit_pave.calibration.generate import generated_samples
from mergekit_pave.calibration.load import Resources, load_model
from mergekit_pave.calibration.plan import STATES, Plan, make_plan, missing
from mergekit_pave.calibration.processes import ALONE, Workers
from mergekit_pave.calibration.samples import Samples, batches, load_samples
from mergekit_pave.calibration.states import States
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import LinearLayers, linear_layers
from mergekit_pave.models.source import ModelSource, culprit
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.storage.archive import MANIFEST
from mergekit_pave.storage.covariances import (
    FINGERPRINTS,
    FORMAT,
    CovarianceStore,
    StoreWriter,
    windows_in,
)
from mergekit_pave.storage.files import locked, make_folder, scratch, write_text

logger = logging.getLogger(__name__)


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
        stamp = source.stamp()
        identities = workers.gather(source.identity())
        if len(set(identities)) > 1:
            raise PaveError(
                f"The processes of this calibration see different weights of {source.label}; "
                "give every machine the same copy."
            )
        return calibrate(
            source, samples, folder, resources, spec.batch_size, identities[0], stamp, workers
        )


def _refuse_finished(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise PaveError(f"{folder} already holds a covariance store; choose another folder.")


def samples_of(source: ModelSource, spec: CalibrationSpec, resources: Resources) -> Samples:
    """The rows that `spec` asks for, of a dataset or written by the model itself."""
    if spec.generated:
        return generated_samples(source, spec, resources)
    return load_samples(spec, source.tokenizer, source.config(), **source.loading)


def calibrate(
    source: ModelSource,
    samples: Samples,
    folder: Path,
    resources: Resources,
    batch_size: int,
    identity: str,
    stamp: tuple[tuple[int, ...], ...],
    workers: Workers = ALONE,
) -> CovarianceStore | None:
    """Run the model over the samples and write its covariances, window by window.

    `identity` is that of the model's files while they had this `stamp`, and of no other ones.
    `workers` share the samples; the main one of them writes, and alone returns the store.
    """
    begun = {"model": identity, "data": samples.digest, "format": FORMAT}
    resources = workers.limit(resources)
    with ExitStack() as made:
        with workers.together():
            writer = _begin(folder, begun) if workers.main else None
        with workers.together():
            make_folder(folder)  # this process may be on another machine
            offloaded = made.enter_context(scratch(folder))
            model = load_model(source, device=resources.device, max_memory=resources.max_memory,
                               scratch=offloaded)
            source.refuse_changed(stamp)
            layers = linear_layers(model)
            if not layers.modules:
                raise PaveError(f"{source.label} has no linear layer that could be purified.")
        sites, entries = _collect(source, model, layers, samples, resources, batch_size, writer,
                                  workers, offloaded)
        if writer is None:
            return None
        source.refuse_changed(stamp)  # some weights may have stayed in their files
        return finish(writer, source, samples, layers, sites, entries, identity)


@dataclass
class _Collector:
    """Collects windows of sites with all processes, and has the main one write them."""

    source: ModelSource
    model: PreTrainedModel
    layers: LinearLayers
    work: list[dict]
    writer: StoreWriter | None
    workers: Workers
    progress: tqdm

    def window(
        self, window: Sequence[SitePlan], run: Callable[[int], Any] | None = None
    ) -> None:
        """Collect one window; `run` is that of `collect_window`."""
        with self.workers.together():
            try:
                moments = collect_window(
                    self.model, self.layers.modules, window, self.work, self.progress,
                    *([run] if run else []))
            except NotFinite as error:
                raise PaveError(
                    culprit(self.source) or f"{self.source.label}: {error}") from error
        self.workers.total(moments)
        if self.writer:
            # A second moment of zeros ranks no direction above another.
            for name in [n for n, m in moments.items() if not (m.count and m.total.any())]:
                del moments[name]
            self.writer.take(moments)

    def through_blocks(self, plan: Plan, states: States, entries: dict[str, Entry]) -> bool:
        """Collect all windows, block by block; False if the model does not allow it.

        `entries` are filled in for the layers whose weights are held on the way.

        A probe goes ahead of the batches through every block, and is compared with what it
        met in an ordinary pass before anything is collected there.
        """
        main = self.workers.main
        probe = [plan.probe] if main else []
        walk = Walk(self.model, plan.blocks, [*self.work, *probe], states)

        def ahead(block: int) -> bool:
            try:
                walk.run(block, len(self.work), True)
                return walk.agrees(plan.marks)
            except Exception as error:  # the model carries more from block to block than was kept
                logger.info("Block %s of %s: %s", block, self.source.label, error)
                return False

        with walk.walking():
            for block, todo in enumerate(plan.steps):
                with walk.at(block):
                    inside = block < len(plan.blocks)
                    if inside and not self.workers.from_main(partial(ahead, block)):
                        return False
                    for window in todo[:-1]:
                        self.window(window, partial(walk.run, block, keep=False))
                    if todo:
                        self.window(todo[-1], partial(walk.run, block, keep=True))
                    else:
                        for number in range(len(self.work)):
                            walk.run(block, number, True)
                            self.progress.update()
                    if main and inside:
                        entries |= entries_within(plan.sites, self.layers, f"{plan.blocks[block]}.")
        return True


def _collect(
    source: ModelSource,
    model: PreTrainedModel,
    layers: LinearLayers,
    samples: Samples,
    resources: Resources,
    batch_size: int,
    writer: StoreWriter | None,
    workers: Workers,
    folder: Path,
) -> tuple[list[SitePlan], dict[str, Entry]]:
    """Have the main process's `writer` hold the covariances of all sites.

    Returns:
        The sites, and what is known of some layers by then.
    """
    work = list(batches(workers.deal(samples), batch_size))
    budget = min(workers.gather(resources.statistics_budget()))
    done = writer.sites if writer else {}
    plan = workers.from_main(lambda: make_plan(model, layers, work, done, budget))
    runs = sum(max(1, len(windows)) for windows in plan.steps) or len(plan.windows)
    bar = tqdm(
        total=runs * len(work), desc=f"Calibrating {source.label}", unit="batch",
        disable=not workers.main)
    with bar as progress:
        collector = _Collector(source, model, layers, work, writer, workers, progress)
        if plan.blocks:
            states = States(int(budget * STATES), folder / "states")
            entries: dict[str, Entry] = {}
            if collector.through_blocks(plan, states, entries):
                return plan.sites, entries
            logger.info("%s does not run block by block; its windows cost a pass each.",
                        source.label)
            plan = workers.from_main(
                lambda: Plan(plan.sites, windows(missing(plan.sites, done), budget)))
        for window in plan.windows:
            collector.window(window)
    return plan.sites, {}


def _begin(folder: Path, begun: dict[str, Any]) -> StoreWriter:
    """Mark `folder` as this calibration's, or refuse one that another has begun."""
    make_folder(folder)
    path, run = folder / "calibration.json", json.dumps(begun)
    marked = path.exists()
    if marked and path.read_bytes() not in (b"", run.encode()):
        raise PaveError(
            f"{folder} holds an unfinished calibration of another model or other data; delete "
            "it or choose another folder."
        )
    theirs = [file.name for file in (*windows_in(folder), folder / FINGERPRINTS) if file.exists()]
    if theirs and not marked:
        raise PaveError(
            f"{folder} holds {theirs[0]}, which is not of this calibration; choose another folder."
        )
    write_text(path, run)
    return StoreWriter(folder, run)
