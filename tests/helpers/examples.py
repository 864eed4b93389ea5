"""The folders of examples, two of which have a `run.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_of(example: str) -> ModuleType:
    """An example's `run.py`, under the example's name: as `run` it would be another's."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / example / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
