"""Folders and files that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended well."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def write_rows(file: Path, texts: list[str]) -> None:
    """Calibration rows, `{"text": ...}` per line. A file that is right is left alone: another
    run may be reading it."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if file.exists() and file.read_text() == lines:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(lines)
    part.rename(file)
