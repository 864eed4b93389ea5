"""The task masks of an EMR merge on disk: the folder `emr` beside the merged model.

    manifest.json              base, tasks, and for every tensor the rescaler's sums
    masks-NNNNN.safetensors    FILE::of-I, uint8: what lies beside the tensors of task I, such as
                               its config, where the merged model's differs
                               NAME::mask-I, uint8 `(ceil(numel / 8),)`: the mask of task I over the
                               flattened tensor, 8 entries to a byte, the first in the lowest bit

Where a merge rearranges the vocabulary, the base's own rows are no longer those of its
checkpoint and are kept as they were merged, under the tensor's name + `::base`. All else needs
the base's checkpoint again, which is recognised by its values. The folder is an `archive`. Names
are public ones, for it is published with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mergekit_pave.algebra.emr import Trace
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.archive import (
    MANIFEST,
    Archive,
    Count,
    Dtype,
    Filling,
    Kind,
    Reference,
    dtype_of,
    owned,
)
from mergekit_pave.storage.identity import checksum

FOLDER = "emr"
KIND = Kind(
    "mergekit-pave task masks", 3, "The task masks in {} are", "merge again"
)
_BASE = "::base"
# A plain file name, which cannot lead out of the model's folder.
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Packed masks held in memory before they are written.
WINDOW = 64 * 2**20


@dataclass(frozen=True)
class Masked:
    """One tensor of the manifest.

    Attributes:
        shape: of the tensor.
        dtype: in which it was merged.
        base: `identity` of the base's values in that dtype.
        keeps_base: those values are stored with the masks.
        tasks: the tasks merged here; the lists below have an item for each.
        own: `sum |d_t|`.
        unified: `sum |M_t u|`.
    """

    shape: tuple[Count, ...]
    dtype: Dtype
    base: str
    keeps_base: bool
    tasks: tuple[Count, ...]
    own: tuple[Sum, ...]
    unified: tuple[Sum, ...]

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class _About:
    """What the manifest says beside its entries."""

    base: Reference
    dtype: Dtype | None
    rescaler: str
    tasks: tuple[str, ...]
    tensors: dict[str, Masked]
    companions: tuple[tuple[FileName, ...], ...]


def _beside(name: str, task: int) -> str:
    return f"{name}::of-{task}"


def _key(name: str, task: int) -> str:
    return f"{name}::mask-{task}"


def identity(tensor: Tensor) -> str:
    """sha256 of a tensor's shape and its values in float32; the same in any wider dtype."""
    return checksum(tensor.to(torch.float32))


def pack(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 `(ceil(numel / 8),)`."""
    flat = mask.reshape(-1).cpu().numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    bits = np.unpackbits(packed.numpy(), count=prod(shape), bitorder="little")
    return torch.from_numpy(bits.view(bool)).reshape(shape)


def files(out_path: Path | str) -> list[Path]:
    """The masks beside a model that a merge of ours has written, the manifest first.

    Nothing else in a folder of that name, which may be the user's own.

    Raises:
        PaveError: a link stands there in place of the folder, and leads to masks of a merge.
    """
    folder = Path(out_path) / FOLDER
    if folder.is_symlink() and owned(folder, KIND):
        raise PaveError(
            f"{folder} is a link to the task masks of another merge, which this one would delete: "
            "remove the link, or merge into another folder."
        )
    return [folder / name for name in owned(folder, KIND)]


def refuse_others(out_path: Path | str) -> None:
    """Raise `PaveError` where masks beside that model would replace files that are not ours."""
    folder = Path(out_path) / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PaveError(
            f"The task masks go to {folder}, which is no folder: move it, or merge into another "
            "folder."
        )
    called = (*folder.glob(MANIFEST), *folder.glob("masks-*.safetensors"))
    theirs = sorted({file.name for file in called} - {*owned(folder, KIND)})
    if theirs:
        raise PaveError(
            f"The task masks go to {folder}, which holds {theirs[0]}, and no merge has written "
            "that: move it, or merge into another folder."
        )


class Recorder:
    """Takes the masks of a merge, tensor by tensor and from any thread."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[Hashable, str],
        base: Hashable,
        public_base: Reference,
        dtype: str | None,
        rearranges: bool,
    ):
        """
        Args:
            folder: where they go.
            models: the id of each fine-tuned model in the merge, and its public name.
            base: the id of the base.
            public_base: the base's public names.
            dtype: of the merge.
            rearranges: the vocabulary's rows are no longer those of the base's checkpoint.
        """
        self.tasks = {model: i for i, model in enumerate(models)}
        self.tensors: dict[str, Masked] = {}
        self._names = list(models.values())
        self._base, self._public_base = base, public_base
        self._dtype, self.rearranges = dtype, rearranges
        self._rescaler: str | None = None
        self._companions: list[tuple[str, ...]] = [() for _ in models]
        self._files = Filling(folder, KIND, "masks", WINDOW)
        self._lock = threading.Lock()

    def add(
        self,
        name: str | None,
        base_id: Hashable,
        base: Tensor,
        traces: Iterable[tuple[Hashable, Trace]],
        rescaler: str,
        vocabulary: bool,
    ) -> None:
        """Take one tensor's masks, by model; they are packed one by one.

        Args:
            name: of the tensor in the output.
            base_id: the base's id in the merge.
            base: its tensor.
            traces: of each model that takes part.
            rescaler: the method's parameter.
            vocabulary: the tensor has a row for each token.
        """
        if name is None or not base.numel():
            return
        self._begin(base_id, rescaler)
        models, packed, own, unified = [], [], [], []
        for model, found in traces:
            models.append(model)
            packed.append(pack(found.mask))
            own.append(found.own)
            unified.append(found.unified)
        keeps_base = self.rearranges and vocabulary
        seen = identity(base)
        tasks = tuple(self.tasks[model] for model in models)
        held = {_key(name, t): mask for t, mask in zip(tasks, packed, strict=True)}
        if keeps_base:
            held[name + _BASE] = base.cpu().contiguous()
        with self._lock:
            self.tensors[name] = Masked(
                tuple(base.shape), dtype_of(base), seen, keeps_base, tasks, tuple(own),
                tuple(unified),
            )
            self._files.hold(held)

    def keep(self, model: Hashable, files: Mapping[str, bytes | None]) -> None:
        """Take one model's other files: content by name, `None` for that of the merged model."""
        task = self.tasks[model]
        with self._lock:
            self._companions[task] = tuple(files)
            for name, content in files.items():
                if content is not None:
                    values = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
                    self._files.hold({_beside(name, task): values[: len(content)].clone()})

    def _begin(self, base: Hashable, rescaler: str) -> None:
        with self._lock:
            self._rescaler = self._rescaler or rescaler
        if base != self._base:
            raise PaveError(
                f"emr needs one base for the whole model, and a slice has {base}: remove the "
                "base_model of the slice."
            )
        if rescaler != self._rescaler:
            raise PaveError("rescaler must be one value for the whole model; remove its filters.")

    def finish(self) -> None:
        """Write what is left and the manifest, which makes the masks usable."""
        if self.tensors:
            self._files.finish(
                version=version("mergekit-pave"), rescaler=self._rescaler,
                base=asdict(self._public_base), dtype=self._dtype, tasks=self._names,
                tensors={name: asdict(tensor) for name, tensor in self.tensors.items()},
                companions=self._companions,
            )


class TaskMasks:
    """The masks beside a merged model, read one tensor and task at a time.

    Raises:
        PaveError: there are none, or they are damaged.
    """

    def __init__(self, model: Path):
        self.folder = Path(model) / FOLDER
        self._archive, about = Archive.opened(
            self.folder, KIND, _About,
            f"{model} has no task masks (no {FOLDER}/{MANIFEST}); only a finished merge with "
            "`merge_method: emr` or `pave_emr` leaves them.")
        with self._archive.guard(f"{MANIFEST}: "):
            self._check(about)
        self._archive.check()
        self.tasks, self.tensors, self.base = list(about.tasks), about.tensors, about.base
        self.dtype, self.rescaler = about.dtype, about.rescaler
        self._companions = about.companions

    def _check(self, about: _About) -> None:
        """Raise `ValueError` unless every tensor's parts are there."""
        if len(about.companions) != len(about.tasks):
            raise ValueError("the tasks and what lies beside them differ in number")
        for task, names in enumerate(about.companions):
            for entry in filter(None, (self._archive.entries.get(_beside(n, task)) for n in names)):
                if entry.dtype != "uint8" or len(entry.shape) != 1:
                    raise ValueError("what lies beside a task is no file's content")
        for name, tensor in about.tensors.items():
            if not len(tensor.tasks) == len(tensor.own) == len(tensor.unified):
                raise ValueError(f"the lists of {name} differ in length")
            if tensor.tasks and max(tensor.tasks) >= len(about.tasks):
                raise ValueError(f"{name} has a task that is not listed")
            for task in tensor.tasks:
                self._archive.expect(_key(name, task), ((tensor.count + 7) // 8,), "uint8")
            if tensor.keeps_base:
                self._archive.expect(name + _BASE, tensor.shape, tensor.dtype)

    def task(self, name: str | int) -> int:
        """Index of a task: its public name, that name's last part, or the index itself, which
        as a string comes after the names."""
        if isinstance(name, int) and 0 <= name < len(self.tasks):
            return name
        text = str(name)
        found = [i for i, task in enumerate(self.tasks) if task == text]
        found = found or [i for i, task in enumerate(self.tasks) if task.split("/")[-1] == text]
        if not found and text.isdecimal() and int(text) < len(self.tasks):
            found = [int(text)]
        if len(found) == 1:
            return found[0]
        what = "Several tasks are" if found else "There is no task"
        there = ", ".join(f"{i} ({task})" for i, task in enumerate(self.tasks))
        raise PaveError(f"{what} called {text!r} in {self.folder.parent}; give one of {there}.")

    def mask(self, name: str, task: int) -> Tensor | None:
        """Bool in the tensor's shape; `None` where that task took no part."""
        tensor = self.tensors.get(name)
        if tensor is None or task not in tensor.tasks:
            return None
        return unpack(self._archive.tensor(_key(name, task)), tensor.shape)

    def kept_base(self, name: str) -> Tensor:
        """The base's values, of a tensor that `keeps_base`."""
        return self._archive.tensor(name + _BASE)

    def companions(self, task: int) -> dict[str, bytes | None]:
        """The other files of one task: content by name, `None` for the merged model's file."""
        found: dict[str, bytes | None] = {}
        for name in self._companions[task]:
            key = _beside(name, task)
            known = key in self._archive.entries
            found[name] = self._archive.tensor(key).numpy().tobytes() if known else None
        return found

    @property
    def files(self) -> list[str]:
        """Names of the files in the folder, the manifest first."""
        return [MANIFEST, *self._archive.files]
