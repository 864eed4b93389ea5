"""The one format of every folder that we write: covariances, masks, compressed models, caches.

    manifest.json          kind, format, what the kind adds, and `entries`: tensor -> `Entry`
    NAME-NNNNN.safetensors    tensors; the file's own header says the kind as well

Files appear by rename when they are complete, and the manifest comes last: a folder with a
manifest is whole. A folder may come from a stranger. So a name in it cannot lead out of it, the
header of each file has to have the shapes and dtypes of the manifest before a tensor is read, and
every tensor is compared with its checksum when it is. Whatever is wrong, `PaveError` says so.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.storage.files import make_folder, write_atomically, write_text
from mergekit_pave.storage.identity import checksum

T = TypeVar("T")
MANIFEST = "manifest.json"
# torch's name of a dtype -> that in the header of a safetensors file.
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}
_HEADER = "mergekit-pave"  # the key of a file's metadata
# What damaged JSON, another file in the place of ours, or a failing disk may raise.
_FAULTS = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, SafetensorError,
           TypeError, ValueError)


@dataclass(frozen=True)
class Kind:
    """What an archive holds.

    Attributes:
        name: of the kind, in manifests.
        format: the number of this version.
        subject: the words for one, up to the verb, with `{}` for the folder.
        mend: what to do where one is damaged.
    """

    name: str
    format: int
    subject: str
    mend: str

    def damaged(self, where: Path, what: object) -> PaveError:
        return PaveError(f"{self.subject.format(where)} damaged ({what}); {self.mend}.")

    @contextmanager
    def guard(self, where: Path, what: str = "") -> Iterator[None]:
        """Turn what damaged or foreign data raise into the sentence about the folder `where`."""
        try:
            yield
        except PaveError:
            raise
        except _FAULTS as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise self.damaged(where, what + text) from error


def _file_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]*\.safetensors", name, re.ASCII):
        raise ValueError(f"{name!r} names no file of it")
    return name


def dtype_name(name: str) -> str:
    """The name itself; raises `ValueError` unless it is one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"{name!r} is no dtype that it can hold")
    return name


Dtype = Annotated[str, AfterValidator(dtype_name)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Entry:
    """One tensor: the file it lies in, its shape and dtype, and `identity.checksum` of it."""

    file: Annotated[str, AfterValidator(_file_name)]
    shape: tuple[Count, ...]
    dtype: Dtype
    sha256: str


@functools.cache
def _adapter(of: Any) -> TypeAdapter:
    return TypeAdapter(of)


@dataclass(frozen=True)
class Reference:
    """A model: `id`, for people, and `hub`, the reference that can be loaded from there."""

    id: str
    hub: str | None


def parsed(of: type[T], values: Any) -> T:
    """JSON values as `of`, a type with its constraints; raises `ValueError` for anything else."""
    kind: Any = of  # to mypy, a type is not hashable
    return _adapter(kind).validate_python(values)


def dtype_of(tensor: Tensor) -> str:
    """A tensor's dtype by name; raises `ValueError` for one that no archive can hold."""
    return dtype_name(str(tensor.dtype).removeprefix("torch."))


def inside(folder: Path, name: str) -> Path:
    """The path of a file of `folder`; raises `ValueError` where it leads out of it, or to
    something that is no file.

    A link may lead to the blobs of the Hub's cache, if the folder is a snapshot in there.
    """
    path = folder / name
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [root, *(p.parent.parent / "blobs" for p in (root, *root.parents)
                       if p.parent.name == "snapshots")]
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"{name} leads out of the folder")
    if path.exists() and not path.is_file():  # to open a pipe is to wait for ever
        raise ValueError(f"{name} is no file")
    return path


def write_tensors(
    path: Path, kind: Kind, tensors: Mapping[str, Tensor], **about: Any
) -> dict[str, Entry]:
    """Write one file in one step; returns its entries.

    `about` is JSON for the file's header, which then has the entries, too: such a file can be
    read without a manifest.

    Raises:
        PaveError: what went wrong with the disk.
    """
    entries = {
        name: Entry(path.name, tuple(t.shape), dtype_of(t), checksum(t))
        for name, t in tensors.items()
    }
    header = {"kind": kind.name, "format": kind.format, **about}
    if about:
        header["entries"] = {name: asdict(entry) for name, entry in entries.items()}
    # One key: safetensors writes several in any order, and equal content is to be equal files.
    metadata = {_HEADER: json.dumps(header)}
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=metadata))
    return entries


def read_header(path: Path, kind: Kind) -> dict[str, Any] | None:
    """What `write_tensors` has written about a file; `None` where it is damaged or not of us."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[_HEADER])
        return header if header["kind"] == kind.name else None
    except _FAULTS:
        return None


def write_manifest(
    folder: Path, kind: Kind, entries: Mapping[str, Entry], **about: Any
) -> None:
    """Write the manifest, which makes the folder whole; errors as `write_tensors`."""
    manifest = {"kind": kind.name, "format": kind.format, **about,
                "entries": {name: asdict(entry) for name, entry in entries.items()}}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path, kind: Kind, also: Container[int] = ()) -> dict[str, Any] | None:
    """The manifest of a folder; `None` where it has none.

    Raises:
        PaveError: it is damaged, of something else, or of a format that is neither `kind.format`
            nor in `also`.
    """
    path = folder / MANIFEST
    with kind.guard(folder, f"{MANIFEST}: "):
        if not os.path.lexists(path):
            return None
        manifest = json.loads(inside(folder, MANIFEST).read_text("utf-8"))
    if not isinstance(manifest, dict) or manifest.get("kind") != kind.name:
        raise PaveError(f"The file {path} is not the manifest of a {kind.name}; {kind.mend}.")
    found = manifest.get("format")
    if not isinstance(found, int) or (found != kind.format and found not in also):
        raise PaveError(
            f"The folder {folder} has format {found!r}, and this version of mergekit-pave reads "
            f"format {kind.format}; {kind.mend}."
        )
    return manifest


def owned(folder: Path, kind: Kind) -> list[str]:
    """Names of the files there that we have written as this kind, the manifest first.

    A manifest names its files. Where a process was killed before it wrote one, the files' own
    headers say whose they are. A name alone says nothing.
    """
    ours = {file.name for file in folder.glob("*.safetensors") if read_header(file, kind)}
    with suppress(*_FAULTS):
        manifest = json.loads(inside(folder, MANIFEST).read_text("utf-8"))
        if manifest["kind"] == kind.name:
            # Earlier formats named a tensor's file there.
            entries = manifest.get("entries", manifest.get("tensors"))
            named = {_file_name(entry["file"]) for entry in entries.values()}
            return [MANIFEST, *sorted(ours | {n for n in named if (folder / n).is_file()})]
    return sorted(ours)


class Filling:
    """Fills a folder, file by file; what is held in memory stays below `window` bytes.

    Args:
        folder: made with the first file.
        kind: of the folder.
        prefix: of the files' names.
        window: bytes that are held before they are written.
    """

    def __init__(self, folder: Path, kind: Kind, prefix: str, window: int):
        self.folder, self._kind, self._prefix, self._window = folder, kind, prefix, window
        self.bytes = 0
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, Tensor] = {}
        self._files = 0

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by name, and write what is held where that is enough for a file."""
        self._held |= tensors
        if sum(tensor.nbytes for tensor in self._held.values()) >= self._window:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._held:
            return
        make_folder(self.folder)
        held, self._held = self._held, {}
        path = self.folder / f"{self._prefix}-{self._files:05d}.safetensors"
        self._files += 1
        self._entries |= write_tensors(path, self._kind, held)
        self.bytes += path.stat().st_size

    def finish(self, **about: Any) -> None:
        """Write what is left and the manifest, with the JSON `about` in it."""
        self.flush()
        write_manifest(self.folder, self._kind, self._entries, **about)


class Archive:
    """The tensors of a folder, read one at a time.

    Args:
        folder: where they lie.
        kind: of the folder.
        entries: of its manifest, as JSON or as `Entry`.

    Raises:
        PaveError: names that lead out of the folder, or anything else that was never written.
    """

    def __init__(self, folder: Path, kind: Kind, entries: Any):
        self.folder, self.kind = Path(folder), kind
        with self.guard(f"{MANIFEST}: "):
            self.entries = parsed(dict[str, Entry], entries)
            for name in self.files:
                inside(self.folder, name)

    @classmethod
    def opened(cls, folder: Path, kind: Kind, of: type[T], absent: str) -> tuple[Archive, T]:
        """A folder's archive, and what its manifest says beside the entries, as `of`.

        Raises:
            PaveError: `absent` where there is no manifest; else what is wrong with it.
        """
        manifest = read_manifest(folder, kind)
        if manifest is None:
            raise PaveError(absent)
        archive = cls(folder, kind, manifest.get("entries"))
        with archive.guard(f"{MANIFEST}: "):
            return archive, parsed(of, manifest)

    @property
    def files(self) -> list[str]:
        """The files that the entries name."""
        return sorted({entry.file for entry in self.entries.values()})

    def guard(self, what: str = "") -> AbstractContextManager[None]:
        """Turn what damaged data raise into the sentence about this folder."""
        return self.kind.guard(self.folder, what)

    def expect(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise `ValueError` unless that tensor is one of the entries."""
        entry = self.entries.get(name)
        if entry is None or (entry.shape, entry.dtype) != (shape, dtype):
            raise ValueError(f"no {dtype} {list(shape)} of the name {name}")

    def check(self, files: Iterable[str] | None = None) -> None:
        """Raise `PaveError` unless these files, or all, have what the entries say."""
        wanted = set(self.files if files is None else files)
        for name in sorted(wanted):
            with self.guard(f"{name}: "), safe_open(inside(self.folder, name), "pt") as file:
                for key, entry in self.entries.items():
                    if entry.file == name:
                        self._compare(file, key, entry)

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own memory, if all of it is as it was written; else `PaveError`."""
        entry = self.entries[name]
        with self.guard(f"{entry.file}: "):
            with safe_open(inside(self.folder, entry.file), "pt") as file:
                self._compare(file, name, entry)
                tensor = file.get_tensor(name)
                if checksum(tensor) != entry.sha256:
                    raise ValueError(f"wrong checksum of {name}")
        return tensor

    def _compare(self, file: Any, name: str, entry: Entry) -> None:
        header = file.get_slice(name)
        if tuple(header.get_shape()) != entry.shape or header.get_dtype() != DTYPES[entry.dtype]:
            raise ValueError(
                f"{name} is {header.get_dtype()} {header.get_shape()} there, and "
                f"{entry.dtype} {list(entry.shape)} in the {MANIFEST}")
