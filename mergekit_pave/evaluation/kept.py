"""A cache of results, named by the content of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.scores import Scores
from mergekit_pave.storage.files import cache_folder, write_atomically

FORMAT = 1


def evaluation_cache() -> Path:
    """Where results are kept."""
    return cache_folder() / "evaluation"


def address(about: Any) -> str:
    """The name of a result, a hash of the plain values that it depends on."""
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def read_kept(name: str) -> dict[str, Any] | None:
    """The result of that name; `None` where there is none that can be read."""
    try:
        kept = json.loads((evaluation_cache() / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


def write_kept(name: str, result: dict[str, Any]) -> None:
    """Keep a result; a cache that cannot be written costs time, never a result."""
    text = json.dumps(result)
    try:
        evaluation_cache().mkdir(parents=True, exist_ok=True)
        write_atomically(
            evaluation_cache() / f"{name}.json", lambda path: path.write_text(text, "utf-8"))
    except (OSError, PaveError):
        pass


def plain(scores: Sequence[Scores]) -> list[dict[str, list[float]]]:
    """Row scores as plain values."""
    return [{name: values.tolist() for name, values in of_task.items()} for of_task in scores]


def arrays(kept: Sequence[dict[str, list[float]]]) -> list[Scores]:
    """Row scores as they were before `plain`."""
    return [{name: np.array(values, dtype=float) for name, values in of_task.items()}
            for of_task in kept]
