"""Reads what `mergekit-pave evaluate --json` has written, for the report's figure of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mergekit_pave.errors import PaveError
from mergekit_pave.report.facts import Kept


def read_evaluation(path: Path) -> list[Kept]:
    """What every merge of the file keeps of every model that shows something on its rows.

    Raises:
        PaveError: the file is not one of `evaluate --json`, or holds no such share.
    """
    try:
        found = [
            Kept(str(merge), str(task["model"]),
                 *(float(task["kept"][end]) for end in ("value", "low", "high")))
            for merge, result in json.loads(path.read_text("utf-8")).items()
            for task in result["tasks"] if task["kept"] is not None]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PaveError(
            f"{path} is no evaluation; name a file that `mergekit-pave evaluate --json` has "
            "written.") from error
    if not found or not all(math.isfinite(x) for k in found for x in (k.value, k.low, k.high)):
        raise PaveError(
            f"{path} does not say what a merge keeps of any model; evaluate with other rows.")
    return found
