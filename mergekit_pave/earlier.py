"""Merging into a folder that holds an earlier merge.

mergekit overwrites the files that both have, and leaves the others: shards of a merge that was
split otherwise, which loaders then find first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_pave import record, task_masks
from mergekit_pave.errors import PaveError

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?"
)
_ASIDE = ".earlier-merge"

Seen = dict[str, tuple[int, int, int]]


@contextmanager
def gives_way(out_path: Path | str) -> Iterator[None]:
    """What lay beside an earlier model goes when the merge inside begins to write weights.

    A merge that fails before it changes any leaves the earlier one as it was.
    """
    out = Path(out_path)
    before, aside = _weights(out), out / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    moved = [path.relative_to(out) for path in (*record.files(out), *task_masks.files(out))]
    for path in moved:
        _move(out / path, aside / path)
    _remove_if_empty(out / task_masks.FOLDER)
    try:
        yield
    except BaseException:
        if _weights(out) == before:
            for path in moved:
                _move(aside / path, out / path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, to)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def replaced(out_path: Path | str) -> Iterator[None]:
    """Weight files of an earlier merge are gone when the merge inside has ended well."""
    out = Path(out_path)
    before, merged = _weights(out), (out / record.CONFIGURATION).is_file()
    yield
    after = _weights(out)
    left = [out / name for name, seen in before.items() if after.get(name) == seen]
    if left and merged:
        for path in left:
            path.unlink()
    elif left:
        logger.warning(
            "%s holds weights that this merge has not written (%s): delete them, or they may be "
            "loaded instead.", out, ", ".join(path.name for path in left)
        )


def refuse_inputs(out_path: Path | str, models: Iterable[ModelReference]) -> None:
    """Raise `PaveError` where the merge would overwrite what it reads."""
    out = os.path.realpath(out_path)
    for model in models:
        for part in (model.model, model.lora):
            if part and os.path.isdir(part.path) and os.path.realpath(part.path) == out:
                raise PaveError(
                    f"{out_path} is the folder of {part.path}, which is to be merged; choose "
                    "another folder for the result."
                )


def _weights(folder: Path) -> Seen:
    """The weight files of a model folder, and what changes when one is written again."""
    if not folder.is_dir():
        return {}
    found = {f.name: f.stat() for f in folder.iterdir() if _WEIGHTS.fullmatch(f.name)}
    return {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in found.items()}
