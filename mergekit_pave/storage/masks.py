"""The task masks of an EMR merge on disk: the folder `emr` beside the merged model.

    manifest.json              base, tasks, and for every tensor its place and the rescaler's sums
    masks-NNNNN.safetensors    per tensor uint8 `(tasks, ceil(numel / 8))`: each row the mask of
                               one task over the flattened tensor, 8 entries to a byte, the first
                               in the lowest bit

Where a merge rearranges the vocabulary, the base's own rows are no longer those of its
checkpoint and are kept as they were merged, under the tensor's name + `::base`. All else needs
the base's checkpoint again, which is recognised by its values. Files appear by rename when they
are complete, the manifest last: without it nothing here counts. Names are public ones, for the
folder is published with the model.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_pave.algebra.emr import Trace
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.covariances import MANIFEST
from mergekit_pave.storage.files import write_atomically
from mergekit_pave.storage.identity import checksum

FOLDER = "emr"
KIND = "mergekit-pave task masks"
FORMAT = 2
_FILE = "masks-{:05d}.safetensors"
_BASE = "::base"
# Packed masks held in memory before they are written.
WINDOW = 64 * 2**20


@dataclass(frozen=True)
class Masked:
    """One tensor of the manifest.

    Attributes:
        file: where its masks lie.
        shape: of the tensor.
        dtype: in which it was merged.
        base: `identity` of the base's values in that dtype.
        keeps_base: those values lie beside the masks.
        tasks: the tasks merged here; rows of the masks and items of the lists below.
        crc32: of each row.
        own: `sum |d_t|`.
        unified: `sum |M_t u|`.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    base: str
    keeps_base: bool
    tasks: tuple[int, ...]
    crc32: tuple[int, ...]
    own: tuple[float, ...]
    unified: tuple[float, ...]

    def __post_init__(self):
        """Raise `ValueError` for what no merge has written."""
        fits = (
            # Nothing outside the folder is read.
            Path(self.file).name == self.file
            and isinstance(getattr(torch, self.dtype, None), torch.dtype)
            and len(self.tasks) == len(self.crc32) == len(self.own) == len(self.unified)
        )
        if not fits:
            raise ValueError(f"{self.dtype}, {self.file} and {self.tasks} do not fit together")

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)


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
    """The masks beside a model, the manifest first."""
    folder = Path(out_path) / FOLDER
    patterns = (MANIFEST, "masks-*.safetensors", ".*.tmp") if _is_ours(folder) else ()
    return [file for pattern in patterns for file in folder.glob(pattern)]


def _is_ours(folder: Path) -> bool:
    """Only by its manifest: a folder of that name may be the user's own."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


class Recorder:
    """Takes the masks of a merge, tensor by tensor and from any thread."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[Hashable, str],
        base: Hashable,
        public_base: Mapping[str, str | None],
        dtype: str | None,
        rearranges: bool,
    ):
        """
        Args:
            folder: where they go.
            models: the id of each fine-tuned model in the merge, and its public name.
            base: the id of the base.
            public_base: `id`, for people, and `hub`, the reference that can be loaded from there.
            dtype: of the merge.
            rearranges: the vocabulary's rows are no longer those of the base's checkpoint.
        """
        self.folder = folder
        self.tasks = {model: i for i, model in enumerate(models)}
        self.tensors: dict[str, Masked] = {}
        self._names = list(models.values())
        self._base, self._public_base = base, dict(public_base)
        self._dtype, self._rearranges = dtype, rearranges
        self._rescaler: str | None = None
        self._files = 0
        self._held: dict[str, Tensor] = {}
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
        keeps_base = self._rearranges and vocabulary
        seen = identity(base)
        with self._lock:
            self._held[name] = torch.stack(packed)
            if keeps_base:
                self._held[name + _BASE] = base.cpu().contiguous()
            self.tensors[name] = Masked(
                _FILE.format(self._files),
                tuple(base.shape),
                str(base.dtype).removeprefix("torch."),
                seen,
                keeps_base,
                tuple(self.tasks[model] for model in models),
                tuple(map(_crc32, packed)),
                tuple(own),
                tuple(unified),
            )
            if sum(t.nbytes for t in self._held.values()) >= WINDOW:
                self._flush()

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

    def _flush(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PaveError(
                f"Cannot create the folder {self.folder} for the task masks: {error.strerror}; "
                "merge into a folder that can be written."
            ) from error
        held, self._held = self._held, {}
        file = self.folder / _FILE.format(self._files)
        self._files += 1
        write_atomically(file, lambda path: save_file(held, path))

    def finish(self) -> None:
        """Write what is left and the manifest, which makes the masks usable."""
        if not self.tensors:
            return
        self._flush()
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "version": version("mergekit-pave"),
            "rescaler": self._rescaler,
            "base": self._public_base,
            "dtype": self._dtype,
            "tasks": self._names,
            "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
        }
        text = json.dumps(manifest, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))


def _crc32(packed: Tensor) -> int:
    return zlib.crc32(packed.contiguous().numpy())


class TaskMasks:
    """The masks beside a merged model, read one tensor and task at a time.

    Raises:
        PaveError: there are none, or they are damaged.
    """

    def __init__(self, model: Path):
        from mergekit.common import dtype_from_name

        self.folder = Path(model) / FOLDER
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise PaveError(
                f"{model} has no task masks (no {FOLDER}/{MANIFEST}); only a finished merge with "
                "`merge_method: emr` or `pave_emr` leaves them."
            ) from None
        except (OSError, ValueError) as error:
            raise self._damaged(f"{MANIFEST}: {error}") from error
        try:
            if manifest["kind"] != KIND or manifest["format"] != FORMAT:
                raise PaveError(
                    f"{path} is not from this version of mergekit-pave; merge again."
                )
            self.tasks: list[str] = list(manifest["tasks"])
            self.base: dict[str, str | None] = {k: manifest["base"][k] for k in ("id", "hub")}
            self.dtype: str | None = manifest["dtype"]
            self.rescaler: str = manifest["rescaler"]
            self.tensors = {
                name: Masked(**{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()})
                for name, t in manifest["tensors"].items()
            }
            for name in {self.dtype, *(tensor.dtype for tensor in self.tensors.values())}:
                dtype_from_name(name)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise self._damaged(f"{MANIFEST}: {error!r}") from error

    def _damaged(self, what: str) -> PaveError:
        return PaveError(f"The task masks in {self.folder} are damaged ({what}); merge again.")

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
        row = tensor.tasks.index(task)
        packed = self._read(tensor.file, name, row)
        if len(packed) != (tensor.count + 7) // 8 or _crc32(packed) != tensor.crc32[row]:
            raise self._damaged(f"{tensor.file}: wrong checksum of {name}")
        return unpack(packed, tensor.shape)

    def kept_base(self, name: str) -> Tensor:
        """The base's values, of a tensor that `keeps_base`."""
        tensor = self.tensors[name]
        kept = self._read(tensor.file, name + _BASE)
        if identity(kept) != tensor.base:
            raise self._damaged(f"{tensor.file}: wrong values of {name + _BASE}")
        return kept

    def _read(self, file: str, key: str, row: int | None = None) -> Tensor:
        try:
            with safe_open(self.folder / file, "pt") as opened:
                return opened.get_tensor(key) if row is None else opened.get_slice(key)[row]
        except (SafetensorError, OSError, IndexError) as error:
            raise self._damaged(f"{file}: {error}") from error
