"""One model's calibration rows: which dataset, which columns, and in which order.

Needs no model, so that `mergekit-pave check` can refuse bad data before any download of
weights.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_pave.calibration.sources import explained, local_path, open_source
from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import DATA_FREE, GENERATED, PARAMETERS

logger = logging.getLogger(__name__)

CHAT_COLUMNS = ("messages", "conversations")
TOKENS, MASK = "input_ids", "attention_mask"
# Rows held while a stream is shuffled.
SHUFFLE_BUFFER = 10_000

_KEYS = {
    "dataset": "calibration_dataset",
    "config": "calibration_config",
    "split": "calibration_split",
    "text_column": "text_column",
    "num_samples": "num_calibration_samples",
    "max_seq_length": "max_seq_length",
    "batch_size": "calibration_batch_size",
    "seed": "calibration_seed",
}


def _default(field: str) -> Any:
    return PARAMETERS[_KEYS[field]].default


class SkipRow(Exception):
    """The row holds nothing usable; the message is the reason that is counted."""


@dataclass(frozen=True)
class CalibrationSpec:
    """One model's calibration data, straight from the YAML keys."""

    dataset: str
    config: str | None = _default("config")
    split: str = _default("split")
    text_column: str = _default("text_column")
    num_samples: int = _default("num_samples")
    max_seq_length: int = _default("max_seq_length")
    batch_size: int = _default("batch_size")
    seed: int = _default("seed")

    @property
    def generated(self) -> bool:
        """Whether the model writes the data itself; there are no rows to open then."""
        return self.dataset == GENERATED

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any]) -> CalibrationSpec:
        """Read `calibration_dataset`, `text_column`, ... ; absent or null means the default."""
        found = {
            field.name: PARAMETERS[_KEYS[field.name]].validate(values.get(_KEYS[field.name]))
            for field in fields(cls)}
        if found["dataset"] is None:
            raise PaveError(
                "calibration_dataset is missing; name the model's own task data (a Hub id or a "
                "local file) under its `parameters`.")
        if found["dataset"] == DATA_FREE:
            raise PaveError(
                "calibration_dataset: none means no data, so nothing can be computed here; name "
                "a dataset (a folder called none as ./none).")
        return cls(**{name: value for name, value in found.items() if value is not None})


@dataclass(frozen=True)
class Rows:
    """An open split, cut down to the columns that are read.

    `image` says that the (single) column is a `datasets.Image`. `data` never decodes images
    or casts to tensors. `folder` is where relative image paths start.
    """

    spec: CalibrationSpec
    data: Any
    columns: tuple[str, ...]
    image: bool
    folder: Path | None

    @property
    def streamed(self) -> bool:
        return not hasattr(self.data, "__len__")

    @property
    def count(self) -> int | None:
        """Rows in the split; `None` for a stream."""
        return None if self.streamed else len(self.data)

    def draw(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Yield `(index, row)` in the seeded random order; a stream has no indices."""
        with explained(self.spec):
            if self.streamed:
                shuffled = self.data.shuffle(seed=self.spec.seed, buffer_size=SHUFFLE_BUFFER)
                for row in shuffled:
                    yield None, row
            else:
                for index in permutation(len(self.data), self.spec.seed):
                    yield index, self.data[index]


def permutation(n: int, seed: int) -> Iterator[int]:
    """Yield `0..n-1` shuffled, in memory proportional to how much of it is used.

    Python's own generator: its stream is the same on every platform and version, and
    drawing from an instance leaves the global state alone.
    """
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    for i in range(n):
        j = generator.randrange(i, n)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)


def open_rows(spec: CalibrationSpec) -> Rows:
    """Open the dataset and settle its columns, or raise `PaveError`. Needs no model."""
    if spec.generated:
        raise PaveError(
            f"calibration_dataset: {GENERATED} is text that a model generates, and here rows of "
            f"a dataset are needed; name one (a folder called {GENERATED} as ./{GENERATED}).")
    _warn_of_test_rows(spec.split, spec.dataset)
    data = open_source(spec)
    with explained(spec):
        names, features = _header(data, spec)
        columns = _columns(names, features, spec)
        keep = list(columns)
        if columns[0] == TOKENS and MASK in names:
            keep.append(MASK)
        data = _bare(data.select_columns(keep), features, columns)
    path = local_path(spec.dataset)
    folder = None if path is None else path if path.is_dir() else path.parent
    image = len(columns) == 1 and _is_image(features.get(columns[0]))
    return Rows(spec, data, columns, image, folder)


@cache
def _warn_of_test_rows(split: str, dataset: str) -> None:
    """Once per process: a check, a calibration and a held-out pass open the same rows."""
    if re.search(r"(?:^|[^a-z])test(?:$|[^a-z])", split.lower()):
        logger.warning(
            "calibration_split %r of %s looks like a test split: results measured on it will "
            "have seen its rows.", split, dataset)


def _header(data: Any, spec: CalibrationSpec) -> tuple[list[str], dict[str, Any]]:
    """Column names and features; a stream may know neither before its first row."""
    first: dict[str, Any] | None = None
    if hasattr(data, "__len__"):
        empty = len(data) == 0
    else:
        first = next(iter(data), None)
        empty = first is None
    if empty:
        raise PaveError(f"calibration_dataset {spec.dataset!r} has no rows in split "
                        f"{spec.split!r}; name data that has some.")
    return list(data.column_names or first or ()), dict(data.features or {})


def _columns(names: list[str], features: dict[str, Any], spec: CalibrationSpec) -> tuple[str, ...]:
    wanted = spec.text_column
    if wanted in names:
        return (wanted,)
    several = tuple(part.strip() for part in wanted.split(",") if part.strip())
    missing = [name for name in several if name not in names]
    if several and not missing:
        return several
    if wanted == PARAMETERS["text_column"].default:
        images = [name for name in names if _is_image(features.get(name))]
        chats = [name for name in CHAT_COLUMNS if name in names]
        for stand_in in chats or (images if len(images) == 1 else []):
            logger.info("%s has no column 'text'; using %r.", spec.dataset, stand_in)
            return (stand_in,)
    raise PaveError(
        f"calibration_dataset {spec.dataset!r} has no column "
        f"{', '.join(map(repr, missing or [wanted]))}; set text_column to one or more of "
        f"{', '.join(map(repr, names))}.")


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _bare(data: Any, features: dict[str, Any], columns: tuple[str, ...]) -> Any:
    """`data` giving plain Python values: a saved dataset may carry a tensor format, and one
    broken image would otherwise end the run instead of being skipped."""
    import datasets

    data = data.with_format(None)
    for name in columns:
        if _is_image(features.get(name)):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data
