"""The names, shapes and dtypes in the weight files of a folder, read from their headers alone."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from mergekit.common import ModelPath
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import WEIGHTS, refuse_pointers

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = ".index.json"
_AGAIN = "download or save that checkpoint again"
_MERGE = "download it or merge again into an empty folder"


@dataclass(frozen=True)
class Header:
    """One tensor of a checkpoint: the file that holds it, its shape, its dtype as stored."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def folder_of(path: ModelPath, cache_dir: str | None) -> Path | None:
    """The model's folder, or its snapshot in the Hub's cache; `None` while it is not there."""
    folder = Path(path.path)
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(
            path.path, revision=path.revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):
        return None


def is_downloaded(snapshot: Path) -> bool:
    """Whether a snapshot of the Hub's cache holds all of a model's weights, not its config alone.

    An index that cannot be read counts as one: reading the headers then says what is wrong.
    """
    for name in WEIGHTS:
        if (snapshot / (name + _INDEX)).exists():
            try:
                return all((snapshot / file).exists() for file in
                           _listed(snapshot / (name + _INDEX), _AGAIN).values())
            except PaveError:
                return True
        if (snapshot / name).exists():
            return True
    return False


def headers(folder: Path, again: str = _AGAIN) -> dict[str, Header]:
    """Every tensor that mergekit would find in `folder`, by its name.

    Args:
        folder: of a model.
        again: what a person should do about a damaged folder, as the end of a sentence.

    Raises:
        PaveError: no weights, a missing, damaged or cut file, or an index that does not fit the
            files. The message names the file.
    """
    refuse_pointers(folder)
    name = next((n for n in WEIGHTS if any(
        (folder / (n + end)).exists() for end in ("", _INDEX))), None)
    if name is None:
        raise PaveError(_no_weights(folder, again))
    index = folder / (name + _INDEX)
    if not index.exists():
        return _read(folder / name, again)
    listed = _listed(index, again)
    if (folder / name).exists() and name not in listed.values():
        raise PaveError(
            f"{folder} holds the weights of two models: mergekit reads {index.name}, transformers "
            f"{name}; delete one of them."
        )
    found: dict[str, Header] = {}
    for shard in sorted(set(listed.values())):
        if not os.path.isfile(folder / shard):  # nor is a name that is too long one
            raise PaveError(
                f"{folder / shard} is missing, which {index.name} names; {again}.")
        found |= _read(folder / shard, again)
    _compare(index, listed, found, again)
    return found


def check_finished(folder: Path) -> list[str]:
    """Names of the files that hold a merge's weights, an index first.

    Raises:
        PaveError: no config, weights of two merges, or an error of `headers`.
    """
    if not (folder / "config.json").is_file():
        raise PaveError(f"{folder} holds no finished merge: it has no config.json; {_MERGE}.")
    there = [name for name in (*WEIGHTS, *(name + _INDEX for name in WEIGHTS))
             if (folder / name).is_file()]
    if len(there) > 1:
        raise PaveError(
            f"{folder} holds the weights of two merges ({there[0]} and {there[1]}): {_MERGE}.")
    files = {header.file for header in headers(folder, _MERGE).values()}
    return [*(name for name in there if name.endswith(_INDEX)), *sorted(files)]


def adapter_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of an adapter; errors as `headers`."""
    refuse_pointers(folder)
    return _read(next(folder / name for name in ADAPTERS if (folder / name).exists()), _AGAIN)


def _listed(index: Path, again: str) -> dict[str, str]:
    try:
        if not index.is_file():  # to open a pipe is to wait for ever
            raise ValueError("no file")
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
        inside = all(isinstance(file, str) and Path(file).name == file and file not in ("", "..")
                     for file in listed.values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as fault:
        raise PaveError(f"{index} is no index of weights; {again}.") from fault
    if not inside:
        raise PaveError(f"{index} names files outside its folder; {again}.")
    return listed


def _compare(
    index: Path, listed: dict[str, str], found: dict[str, Header], again: str
) -> None:
    absent = [name for name, file in listed.items()
              if name not in found or found[name].file != file]
    if absent:
        raise PaveError(
            f"{index.parent / listed[absent[0]]} lacks {absent[0]}, which {index.name} says is in "
            f"it{_and_more(absent)}; {again}."
        )
    extra = [name for name in found if name not in listed]
    if extra:
        raise PaveError(
            f"{index} does not list {extra[0]} of {found[extra[0]].file}{_and_more(extra)}; "
            f"{again}."
        )


def _and_more(names: Iterable[str]) -> str:
    more = len(list(names)) - 1
    return f" (and {more} more)" if more else ""


def _read(path: Path, again: str) -> dict[str, Header]:
    if not path.is_file():
        raise PaveError(f"{path} is no file; {again}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, again)
    return _read_pickle(path, again)


def _read_safetensors(path: Path, again: str) -> dict[str, Header]:
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Header(path.name, tuple(part.get_shape()), part.get_dtype())
                    for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as fault:
        raise PaveError(f"{path} is cut short or damaged ({fault}); {again}.") from fault


def _read_pickle(path: Path, again: str) -> dict[str, Header]:
    """Shapes of a pickled checkpoint; its values stay on disk, and nothing but tensors is read."""
    try:
        state: Any = torch.load(
            path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as fault:
        reason = str(fault).strip().splitlines()[0].rstrip(".") if str(fault).strip() else "cut"
        if reason.startswith("Weights only load failed"):  # and then how to run its code
            reason = "Python objects of other classes"
        raise PaveError(
            f"{path} is cut short, damaged, or holds more than tensors ({reason}); {again}, as "
            "safetensors."
        ) from fault
    # mergekit lists the tensors below `state_dict`, and then does not find them.
    if not isinstance(state, dict) or isinstance(state.get("state_dict"), dict):
        raise PaveError(f"{path} holds no plain state of a model; {again}, as safetensors.")
    return {name: Header(path.name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in state.items() if isinstance(value, Tensor)}


def _no_weights(folder: Path, again: str) -> str:
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    wanted = f"{WEIGHTS[0]} or {WEIGHTS[0]}{_INDEX}"
    for name in WEIGHTS:
        stem, end = name.rsplit(".", 1)
        if shard := next((f for f in there if f.startswith(stem + "-") and f.endswith(end)), None):
            return (f"{folder} holds shards of weights such as {shard} without their index "
                    f"{name}{_INDEX}; {again}.")
    other = next((f for f in there if f.endswith((
        ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"))), None)
    if other:
        return (f"{folder} has no weights that mergekit reads ({wanted}), only {other}: load the "
                "model with transformers and save it again with save_pretrained.")
    return f"{folder} has no weights ({wanted} is missing); {again}."
