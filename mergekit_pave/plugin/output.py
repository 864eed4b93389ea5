"""The folder that a merge is written to: an earlier merge stays whole until the new one is.

A merge writes into a hidden folder inside the output folder. When it has ended well, the files of
an earlier merge go, and the new ones take their place. `config.json` goes first and comes last: a
folder that is cut off in between has none, and every loader refuses it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit.common import ModelReference
from safetensors import SafetensorError

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import sentence_files, written
from mergekit_pave.models.source import paths_of
from mergekit_pave.publish import record
from mergekit_pave.recipe.reading import CONFIGURATION
from mergekit_pave.storage import masks
from mergekit_pave.storage.files import alone_in, make_folder, scratch, to_disk

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
# What libraries say of a disk that takes no more; safetensors and torch have errors of their own.
_FULL = re.compile(
    r"os error (28|122|27)|No space left|quota exceeded|File too large|inline_container", re.I)
_CARD, _CONFIG = "README.md", "config.json"


@contextmanager
def taking_the_place(out_path: Path | str) -> Iterator[Path]:
    """A folder to merge into; what is in it moves to `out_path` when the block has ended well.

    Raises:
        PaveError: the output folder cannot be written.
    """
    out = Path(out_path)
    existed = out.exists()
    masks.files(out)  # refuses what is not to be followed
    make_folder(out)
    try:
        with scratch(out) as staging:
            # mergekit titles the model card by the folder's own name.
            inner = staging / (out.resolve().name or "merge")
            yield inner
            if inner.is_dir():
                with alone_in(out):
                    _replace(out, inner)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _FULL.search(str(error)):
            raise
        raise PaveError(
            f"There is no room for the merge in {out} ({' '.join(str(error).split())}): make room "
            "and merge again."
        ) from error
    finally:
        if not existed:
            with suppress(OSError):
                out.rmdir()  # nothing was written


def _replace(out: Path, inner: Path) -> None:
    new = {path.relative_to(inner) for path in inner.rglob("*") if path.is_file()}
    for path in new:
        to_disk(inner / path)
        _refuse_taken(out, path)
    old = _earlier(out)
    for path in sorted(old, key=lambda path: path.name != _CONFIG):
        path.unlink(missing_ok=True)
    for path in {path.parent for path in old} - {out}:
        with suppress(OSError):
            path.rmdir()
    left = sorted(p.name for p in _weights(out) if Path(p.name) not in new)
    if left:
        logger.warning(
            "%s holds weights that this merge has not written (%s): delete them, or they may be "
            "loaded instead.", out, ", ".join(left)
        )
    for path in sorted(new, key=lambda path: path.name == _CONFIG):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(inner / path, out / path)
    to_disk(out)


def _refuse_taken(out: Path, path: Path) -> None:
    """Raise `PaveError`, before anything is removed, where a file cannot get its place."""
    folders = [out / parent for parent in path.parents if parent.name]
    taken = [out / path] if (out / path).is_dir() and not (out / path).is_symlink() else []
    taken += [f for f in folders if f.is_symlink() or (f.exists() and not f.is_dir())]
    if taken:
        raise PaveError(
            f"{taken[0]} is in the way of the merge's {path}: move it, or merge into another "
            "folder."
        )


def _earlier(out: Path) -> list[Path]:
    """The files of an earlier merge; in a folder without one, only files known to be ours."""
    found = [*record.files(out), *masks.files(out)]
    if (out / CONFIGURATION).is_file() or found:
        known = [out / name for name in (_CARD, CONFIGURATION)]
        found += [*_weights(out), *written(out).values(),
                  *sentence_files(out).values(), *filter(Path.is_file, known)]
    return found


def _weights(out: Path) -> list[Path]:
    return [p for p in out.iterdir() if p.is_file() and _WEIGHTS.fullmatch(p.name)]


def refuse_inputs(out_path: Path | str, models: Iterable[ModelReference]) -> None:
    """Raise `PaveError` where the merge would overwrite what it reads."""
    out = os.path.realpath(out_path)
    for path in (path for model in models for path in paths_of(model)):
        if os.path.isdir(path) and os.path.realpath(path) == out:
            raise PaveError(
                f"{out_path} is the folder of {path}, which is to be merged; choose another "
                "folder for the result."
            )


def is_replaced_whole(out_path: Path | str) -> bool:
    """Whether the folder holds masks or a record of ours, which would be wrong beside another."""
    return bool(record.files(out_path) or masks.files(out_path))
