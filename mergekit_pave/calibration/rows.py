"""One model's calibration rows: which dataset, which columns, and in which order.

Needs no model, so that `mergekit-pave check` can refuse bad data before any download of
weights.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mergekit_pave.calibration.faults import LOCAL_FILE, explained
from mergekit_pave.calibration.literal import literal, literal_url
from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import is_pointer
from mergekit_pave.models.names import builder_of, local_path
from mergekit_pave.recipe.parameters import GENERATED, PARAMETERS, CalibrationSpec

logger = logging.getLogger(__name__)
CHAT_COLUMNS = ("messages", "conversations")
TOKENS, MASK = "input_ids", "attention_mask"
# Rows held while a stream is shuffled.
SHUFFLE_BUFFER = 10_000


class SkipRow(Exception):
    """The row holds nothing usable.

    The message is the reason that is counted and published with the statistics, so it never has
    words of the row. `detail` may have: it goes to the terminal only.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


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
    """Warn once per process, since check, calibration and evaluation open the same rows."""
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


# A Hub dataset above this many bytes, or of unknown size, is streamed: a few hundred rows
# of a web corpus must not cost a download of all of it.
STREAM_ABOVE = 10**9


def open_source(spec: CalibrationSpec) -> Any:
    """The split as a `Dataset`, or as an `IterableDataset` when it is streamed."""
    with explained(spec), _no_progress_bars():
        path = local_path(spec.dataset)
        if path is None:
            return _open_hub(spec)
        if not path.exists():
            raise PaveError(
                f"calibration_dataset {spec.dataset!r} does not exist (looked for "
                f"{path.absolute()}); correct the path, which is relative to the working "
                "directory.")
        return _open_local(path, spec)


def _open_local(path: Path, spec: CalibrationSpec) -> Any:
    import datasets

    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if spec.config is not None and (saved or path.is_file()):
        raise PaveError(
            f"calibration_config {spec.config!r} means nothing for the local data "
            f"{spec.dataset!r}, which has no configurations; remove the key.")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if pointer := next(filter(is_pointer, files), None):
        raise PaveError(
            f"calibration_dataset {spec.dataset!r}: {pointer.name} is a Git LFS pointer in place "
            "of the file; run `git lfs pull` in its folder, or download the dataset with "
            "`hf download --repo-type dataset`.")
    links = Path(datasets.config.HF_DATASETS_CACHE) / "mergekit-pave" / "links"
    if saved:
        return _open_saved(literal(path, links), spec)
    if path.is_dir():
        _warn_of_kinds(path)
        return datasets.load_dataset(str(literal(path, links)), spec.config, split=spec.split)
    builder = builder_of(path)
    if builder is None:
        raise PaveError(
            f"calibration_dataset {spec.dataset!r} is not a kind of file that can be read; "
            f"name {LOCAL_FILE}.")
    if path.stat().st_size == 0:
        raise PaveError(f"calibration_dataset {spec.dataset!r} is an empty file; name one "
                        "with at least one row.")
    name, options = builder
    return datasets.load_dataset(
        name, data_files=str(literal(path, links)), split=spec.split,
        cache_dir=_rows_cache(path), **options)


@cache
def _warn_of_kinds(folder: Path) -> None:
    """Warn of files of several kinds in a folder: `datasets` reads one kind and skips the rest."""
    kinds = sorted({builder[0] for file in folder.rglob("*") if (builder := builder_of(file))})
    if len(kinds) > 1 and not (folder / "README.md").exists():
        logger.warning(
            "%s holds files of several kinds (%s), and only those of one kind are read as rows; "
            "name the file that is meant.", folder, ", ".join(kinds))


def _rows_cache(path: Path) -> str:
    """Where `datasets` keeps the rows of a file: it would tell one that was copied over another
    only by its time of modification, which may have been copied along."""
    import datasets

    about = path.stat()
    name = hashlib.sha256(f"{about.st_ino}|{about.st_ctime_ns}|{about.st_size}".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "mergekit-pave" / name.hexdigest()[:16])


def _open_saved(path: Path, spec: CalibrationSpec) -> Any:
    """A folder written by `save_to_disk`; split names and slices mean what they do elsewhere."""
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        splits = dict(data)
    else:
        # One saved split is what was meant, whatever it was called when it was made.
        splits = {"train": data, re.split(r"[\[+]", str(data.split or "train"))[0]: data}
    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(spec.split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _open_hub(spec: CalibrationSpec) -> Any:
    import datasets

    if "://" in spec.dataset:
        url = literal_url(spec.dataset)
        name, options = builder_of(Path(urlsplit(url).path)) or (url, {})
        return datasets.load_dataset(name, data_files=url, split=spec.split, **options)
    builder = datasets.load_dataset_builder(spec.dataset, spec.config)
    size = builder.info.download_size
    small = size is not None and size <= STREAM_ABOVE
    if small or datasets.config.HF_HUB_OFFLINE:
        return datasets.load_dataset(spec.dataset, spec.config, split=spec.split)
    if re.search(r"[\[+]", spec.split):
        # A stream cannot be sliced, so an explicit slice is paid for with the download.
        logger.warning(
            "calibration_split %r downloads all of %s (%s); a plain split name is streamed.",
            spec.split, spec.dataset, "unknown size" if size is None else f"{size / 1e9:.1f} GB")
        return datasets.load_dataset(spec.dataset, spec.config, split=spec.split)
    logger.info("Streaming %s.", spec.dataset)
    return datasets.load_dataset(spec.dataset, spec.config, split=spec.split, streaming=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars of sub-second local reads, and leave the user's setting as it was."""
    from datasets.utils import are_progress_bars_disabled
    from datasets.utils import disable_progress_bars as disable
    from datasets.utils import enable_progress_bars as enable

    if are_progress_bars_disabled():
        yield
        return
    disable()
    try:
        yield
    finally:
        enable()
