"""The processes of one calibration: one as a rule, several under `accelerate launch`.

Every process holds the model and runs its share of the samples; the main one reads the data,
plans, and writes. What all must agree on is sent by the main process, never read twice from a
disk that nodes may see differently.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env

from mergekit_pave.algebra.second_moment import SecondMoment
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.samples import Samples
from mergekit_pave.errors import PaveError

logger = logging.getLogger(__name__)
T = TypeVar("T")
# How long to wait for a process that hangs; one that dies is noticed at once. A download of the
# model, and the slowest process's share of one window, have to fit in.
TIMEOUT = timedelta(hours=2)
_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


class Elsewhere(PaveError):
    """Ends a process silently, because the main one prints the message."""

    def show(self, file: Any = None) -> None:
        pass


@dataclass(frozen=True)
class Workers:
    """This process among all of a calibration.

    Attributes:
        rank: of this process; 0 is the main one.
        count: processes in all.
        local_rank: of this process on its machine.
        local_count: processes on this machine.
        device: of this process alone, `None` when it may use every one of its kind.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    device: torch.device | None = None

    @classmethod
    @contextmanager
    def launched(cls, device: torch.device) -> Iterator[Workers]:
        """The processes that `accelerate launch` (or `torchrun`, `mpirun`) has started.

        All but the main one keep silent.
        """
        if get_int_from_env(_SIZES, 1) == 1:
            _warn_if_alone()
            yield cls()
            return
        local_count = get_int_from_env(["LOCAL_WORLD_SIZE"], 1)
        if device.type != "cpu" and local_count > torch.get_device_module(device).device_count():
            raise PaveError(
                f"{local_count} processes were started on a machine with "
                f"{torch.get_device_module(device).device_count()} {device.type} devices; give "
                "accelerate launch a --num_processes of one per device."
            )
        with _together():
            state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
        workers = cls(
            state.process_index, state.num_processes, state.local_process_index, local_count,
            state.device,
        )
        with _speaking() if workers.main else _silent():
            yield workers
        state.destroy_process_group()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def limit(self, resources: Resources) -> Resources:
        """This process's device, and its share of the free memory where no size was given."""
        if self.count == 1:
            return resources
        own = replace(resources, device=self.device or resources.device)
        weights, sums = own.weights_budget(), own.statistics_budget()
        if resources.max_memory is None:
            weights //= self.local_count
        if resources.statistics_memory is None and own.device.type == "cpu":
            sums //= self.local_count
        return replace(own, max_memory=weights, statistics_memory=sums)

    def deal(self, samples: Samples) -> Samples:
        """This process's samples: every `count`-th, the longest first, perhaps none."""
        if self.count == 1:
            return samples
        ordered = sorted(samples.items, key=lambda item: -sum(v.numel() for v in item.values()))
        return replace(samples, items=tuple(ordered[self.rank :: self.count]))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every one of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Synchronise: after the block all processes go on, or all end with the first error."""
        if self.count == 1:
            yield
            return
        error = None
        try:
            yield
        except PaveError as failure:
            error = failure
        messages = [m for m in self.gather(error and error.message) if m]
        if messages and self.main:
            raise PaveError(messages[0]) from error
        if messages:
            # A launcher kills all processes when one exits. So this one waits until the main one
            # has printed the message; the barrier fails when that one exits.
            with suppress(RuntimeError):
                dist.barrier()
            raise Elsewhere(messages[0]) from error

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process, and return its result in every one."""
        if self.count == 1:
            return make()
        with self.together():
            values: list[Any] = [make() if self.main else None]
        with _together():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def once_per_machine(self, make: Callable[[], T]) -> T:
        """Call `make` in every process, first in one of each machine, which fills the caches."""
        with self.together():
            first = [make()] if self.local_rank == 0 else []
        with self.together():
            return first[0] if first else make()

    def total(self, moments: Mapping[str, SecondMoment]) -> None:
        """Add up the second moments of all processes in those of the main one.

        A site that some processes, or all of them, have not seen counts nothing there.
        """
        if self.count == 1:
            return
        with _together():
            counts = torch.tensor([m.count for m in moments.values()], device=self.device)
            dist.all_reduce(counts)
            for moment, count in zip(moments.values(), counts.tolist(), strict=True):
                if not count:
                    continue
                if moment.sum is None:
                    moment.sum = torch.zeros(moment.width, moment.width, device=self.device)
                moment.sum = moment.sum.to(self.device)
                dist.reduce(moment.sum, dst=0)
                moment.count = count


ALONE = Workers()


def _gone() -> PaveError:
    return PaveError(
        "Another process of this calibration has ended or does not answer; its own messages say "
        "why. The same command goes on after the last finished window."
    )


@contextmanager
def _together() -> Iterator[None]:
    """Say in one sentence that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _gone() from error


@contextmanager
def _speaking() -> Iterator[None]:
    """Raise the same error when the launcher ends this process because of another one."""

    def ended(number: int, frame: Any) -> None:
        raise _gone()

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    except BaseException:
        # This process ends anyhow; the launcher's signal must not cut off its message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def _warn_if_alone() -> None:
    # accelerate starts one process, whatever --num_processes says, unless it finds several
    # accelerators or is given --multi_gpu. It then sets a port that no other process uses.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        logger.warning(
            "accelerate launch has started one process only; on a machine without several "
            "accelerators give it --multi_gpu besides --num_processes."
        )


@contextmanager
def _silent() -> Iterator[None]:
    import datasets
    import huggingface_hub.utils
    import transformers

    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    yield
