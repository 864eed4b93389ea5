"""Models with an adapter merged into them, kept by what they are made of.

mergekit keeps such copies by the paths of model and adapter, and takes any folder of that name for
a finished one: an adapter that was trained further gives the copy of the earlier one, and a copy
that failed half way is an empty model for good.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mergekit.common import ModelPath, ModelReference

from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import BUILDING
from mergekit_pave.storage.files import locked, scratch

# What the Hub's client raises of a file that is not there, or cannot be reached.
NOT_THERE = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)


def merged_copy(
    model: ModelReference,
    cache: Path | str,
    dtype: str | None,
    make: Callable[[str], ModelReference],
) -> ModelReference:
    """The merged copy of `MODEL+ADAPTER` in `cache`, made first if it is not there.

    It belongs to the content of the adapter, to the files of the model, and to the dtype. It gets
    its name when it is complete; of a failure nothing stays.

    Args:
        model: with an adapter.
        cache: folder of merged copies.
        dtype: the name of the dtype that they are merged in.
        make: mergekit's own way, given a folder to write the copy into.

    Raises:
        PaveError: the model holds an adapter of its own.
    """
    refuse_two(model)
    cache = Path(cache)
    name = f"{_name(model.model)}_{_name(model.lora)}-{_key(model, dtype)}"
    target = cache / name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".{name}.lock"):
            if not target.exists():
                with scratch(cache) as temporary, BUILDING:
                    os.replace(make(str(temporary)).model.path, target)
    return ModelReference(model=ModelPath(path=str(target)))


def refuse_two(model: ModelReference) -> None:
    """Raise `PaveError` where transformers would apply an adapter in the model's own folder too."""
    part, name = model.model, "adapter_config.json"
    if os.path.isdir(part.path):
        there = os.path.exists(os.path.join(part.path, name))
    else:
        there = _downloaded(part, name) is not None
    if there:
        raise PaveError(
            f"{part.path} holds an adapter beside its weights ({name}), which transformers would "
            f"apply to them before {model.lora.path}: move it away, or leave --lora-merge-cache "
            "out."
        )


def _name(part: ModelPath) -> str:
    """The readable part of a copy's name, without `+` and `@`, which mergekit would interpret."""
    return os.path.basename(os.path.normpath(part.path)).replace("+", "_").replace("@", "_")


def _key(model: ModelReference, dtype: str | None) -> str:
    about = hashlib.sha256(f"{dtype}|{model.override_architecture}\n".encode())
    for line in (*_about_model(model.model), *_about_adapter(model.lora)):
        about.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return about.hexdigest()[:16]


def _about_model(part: ModelPath) -> Iterator[str]:
    """What changes with the files of a model, which are too large to be read for this."""
    if not os.path.isdir(part.path):
        yield f"{part}|{_commit(part, 'config.json')}"
        return
    for file in _files(part.path):
        seen = file.stat()
        # ctime is new for a copy; mtime may have been copied along.
        yield f"{file.name}|{seen.st_size}|{seen.st_mtime_ns}|{seen.st_ctime_ns}|{seen.st_ino}"


def _about_adapter(part: ModelPath) -> Iterator[str]:
    """The content of an adapter's files."""
    if not os.path.isdir(part.path):
        yield f"{part}|{_commit(part, 'adapter_config.json')}"
        return
    for file in _files(part.path):
        if file.name.startswith("adapter_"):
            yield f"{file.name}|{_sha256(file)}"


def _sha256(file: Path) -> str:
    about = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(2**20):
            about.update(part)
    return about.hexdigest()


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if path.is_file())


def _commit(part: ModelPath, name: str) -> str:
    """The revision of a repository that is used now; its name where the Hub does not say."""
    path = _downloaded(part, name)
    return path.parent.name if path else str(part.revision)


def _downloaded(part: ModelPath, name: str) -> Path | None:
    try:
        return Path(hf_hub_download(part.path, name, revision=part.revision))
    except NOT_THERE:
        return None
