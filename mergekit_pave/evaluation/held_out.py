"""Rows of a model's own data that its calibration did not draw.

Calibration takes the first usable rows of a seeded order (`calibration.rows`); what comes after
them in that order is held out. So nothing has to be set aside beforehand, and the same rows are
found again in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from mergekit_pave.calibration.rows import Rows, SkipRow, open_rows, open_source
from mergekit_pave.calibration.samples import digest_of, encoder_of
from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import name_of
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec

Item = dict[str, Tensor]
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class HeldOut:
    """Encoded rows, each of its own length, in a fixed order.

    Attributes:
        items: tensors of one forward pass each, without a batch dimension, as in `Samples.items`.
        labels: the class of every row, where the data have them.
        digest: sha256 over tensors and labels.
        origin: where the rows come from, in words, without local folders.
    """

    items: tuple[Item, ...]
    labels: tuple[int, ...] | None
    digest: str
    origin: str

    @property
    def tokens(self) -> int:
        """Tokens in all; an image counts as one."""
        sizes = (item.get("input_ids") for item in self.items)
        return sum(1 if ids is None else ids.numel() for ids in sizes)


def held_out(
    source: ModelSource, spec: CalibrationSpec, count: int, max_tokens: int, drawn: bool = True
) -> HeldOut:
    """Up to `count` usable rows of `spec` behind those that calibration draws.

    Args:
        source: the model whose tokenizer or processor encodes the rows.
        spec: its calibration data.
        count: rows wanted; fewer are taken where the data end.
        max_tokens: tokens of a row at most.
        drawn: False where no calibration looks at the data, so that every row is free.

    Raises:
        PaveError: no row is left, or the model cannot encode the data.
    """
    opened = _opened(source, spec, max_tokens)
    rows = _encoded(opened, source)
    calibrated = {name for name, *_ in islice(rows, spec.num_samples if drawn else 0)}
    found = _distinct(rows, count, calibrated)
    if not found:
        raise PaveError(
            f"No row of {name_of(spec.dataset)} is left to evaluate {source.label} on: "
            f"calibration draws {spec.num_samples}; lower num_calibration_samples, or name other "
            "rows with --held-out.")
    return _made(opened.spec, found, source, f"{name_of(spec.dataset)} ({spec.split})")


def given(
    source: ModelSource,
    spec: CalibrationSpec,
    calibrated: CalibrationSpec | None,
    count: int,
    max_tokens: int,
) -> HeldOut:
    """Up to `count` rows of data that the user names, none of which calibration draws.

    Args:
        source: the model whose tokenizer or processor encodes the rows.
        spec: the named rows.
        calibrated: the calibration data, where there are any.
        count: rows wanted; fewer are taken where the data end.
        max_tokens: tokens of a row at most.

    Raises:
        PaveError: the rows overlap with what calibration draws, or cannot be encoded.
    """
    drawn: set[str] = set()
    if calibrated is not None:
        rows = _encoded(_opened(source, calibrated, max_tokens), source)
        drawn = {name for name, *_ in islice(rows, calibrated.num_samples)}
    opened = _opened(source, spec, max_tokens)
    found = _distinct(_encoded(opened, source), count, set())
    overlap = len(found.keys() & drawn)
    where = f"{name_of(spec.dataset)} ({spec.split})"
    if overlap:
        raise PaveError(
            f"{overlap} of {len(found)} rows of {where} are rows that the calibration of "
            f"{source.label} draws; name rows that it does not.")
    if not found:
        raise PaveError(f"{where} has no row that {source.label} can read; name other rows.")
    return _made(opened.spec, found, source, where)


def _opened(source: ModelSource, spec: CalibrationSpec, max_tokens: int) -> Rows:
    if spec.generated:
        raise PaveError(
            f"{source.label} writes its calibration data itself, so that no rows are held out; "
            "name rows of its task with --held-out.")
    return open_rows(replace(spec, max_seq_length=min(spec.max_seq_length, max_tokens)))


def _encoded(rows: Rows, source: ModelSource) -> Iterator[tuple[str, int | None, Item]]:
    """Digest, index and tensors of every usable row, in the order of the draw."""
    encoder = encoder_of(rows, source.tokenizer, source.config(), source.loading)
    for index, row in rows.draw():
        try:
            item = encoder(row)
        except SkipRow:
            continue
        yield digest_of(item), index, item


def _distinct(
    rows: Iterable[tuple[str, int | None, Item]], count: int, others: Set[str]
) -> dict[str, tuple[int | None, Item]]:
    """The first rows that are not among `others`, each once: a repeated row says nothing twice."""
    found: dict[str, tuple[int | None, Item]] = {}
    for name, index, item in rows:
        if name not in others:
            found.setdefault(name, (index, item))
        if len(found) == count:
            break
    return found


def _made(
    spec: CalibrationSpec, found: Mapping[str, tuple[int | None, Item]], source: ModelSource,
    origin: str,
) -> HeldOut:
    labels = _labels(spec, [index for index, _ in found.values()], source)
    digest = hashlib.sha256(("".join(found) + repr(labels)).encode()).hexdigest()
    return HeldOut(tuple(item for _, item in found.values()), labels, digest, origin)


def _labels(
    spec: CalibrationSpec, indices: list[int | None], source: ModelSource
) -> tuple[int, ...] | None:
    """Classes as the model numbers them; `None` where the data have none that it knows."""
    if None in indices:
        return None  # a stream
    data = open_source(spec)
    column = next((name for name in LABEL_COLUMNS if name in data.column_names), None)
    if column is None:
        return None
    config = source.config()
    numbers, classes = config.label2id or {}, range(config.num_labels or 0)
    values = [_class(data[index][column], numbers) for index in indices]
    known = tuple(value for value in values if value is not None and value in classes)
    return known if len(known) == len(values) else None


def _class(value: Any, numbers: Mapping[str, Any]) -> int | None:
    if isinstance(value, str):
        return numbers.get(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
