"""Opening a calibration dataset with `datasets`; every failure becomes one sentence.

A source is a Hub id, one local file, a folder of data files, or a folder written by
`save_to_disk`. Nothing here knows models, and no other corpus is ever substituted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_pave.errors import PaveError

if TYPE_CHECKING:
    from mergekit_pave.calibration.rows import CalibrationSpec

logger = logging.getLogger(__name__)

BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
LOCAL_FILE = "a local .jsonl, .json, .csv, .parquet or .txt file"

# A Hub dataset above this many bytes, or of unknown size, is streamed: a few hundred rows
# of a web corpus must not cost a download of all of it.
STREAM_ABOVE = 10**9

# (pattern searched in the chain of exceptions, sentence). A group called `list` is what is
# available. The first that matches wins.
_SENTENCES = (
    (r"is a gated dataset",
     "{where} is gated on the Hub; accept its terms there and log in (`hf auth login`), "
     f"or name {LOCAL_FILE}."),
    (r"scripts are no longer supported|execute the dataset script|contains custom code",
     "{where} is a dataset script, which `datasets` no longer runs; convert it to Parquet "
     f"(many Hub datasets have a `refs/convert/parquet` branch), or name {LOCAL_FILE}."),
    (r"Config name is missing.*?available configs: (?P<list>\[.*?\])",
     "{where} has several configurations; set calibration_config to one of {list}."),
    (r"BuilderConfig '.*?' not found\. Available: (?P<list>\[.*?\])",
     "{where} has no configuration {config!r}; set calibration_config to one of {list}."),
    (r"Couldn't find cache for .*?(?:Available configs in the cache: (?P<list>\[.*?\])|$)",
     "{where} with configuration {config!r} is not in the offline cache (cached: {list}); "
     f"download it once while online, or name {LOCAL_FILE}."),
    (r"(?:Unknown|Bad) split:? .*?(?:one of|splits:) (?P<list>\[.*?\])",
     "{where} has no split {split!r}; set calibration_split to one of {list}."),
    (r"Unrecognized instruction format",
     "calibration_split {split!r} of {where} is not a split; write it as `train`, "
     "`train[:500]` or `train[:5%]`."),
    (r"OfflineModeIsEnabled|Couldn't reach|LocalEntryNotFound|ConnectionError|ConnectError"
     r"|Timeout|MaxRetryError",
     "{where} could not be reached on the Hub; check the connection and the "
     f"HF_HUB_OFFLINE variable, or name {LOCAL_FILE}."),
    (r"DatasetNotFoundError|HFValidationError|RepositoryNotFound",
     "{where} is neither a file or folder here nor a dataset you can read on the Hub; check "
     f"the spelling and your login, or name {LOCAL_FILE}."),
    (r"install 'Pillow'|ModuleNotFoundError: [^\n]*\bPIL\b",
     "{where} holds images, which need Pillow; run `pip install mergekit-pave[vision]`."),
    (r"EmptyDatasetError|DataFilesNotFoundError",
     "{where} has no data files; put .jsonl, .json, .csv, .parquet, .txt or image files there."),
)
# Tried after looking for damage, of which these can be a mere consequence.
_VAGUE = (
    (r"corresponds to no data|StopIteration|SchemaInferenceError|EmptyDataError",
     "{where} has no rows in split {split!r}; name data that has some."),
    (r"DatasetGenerationCastError|Schema at index",
     "{where} has files with different columns; name one file, or give them equal columns."),
)


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


def local_path(source: str) -> Path | None:
    """The path that `source` means, whether or not it exists; `None` for a Hub id or a URL."""
    path = Path(os.path.expanduser(source))
    looks_local = (
        source.startswith((".", "~", "/")) or path.is_absolute() or source.count("/") > 1
        or _builder(path) is not None or path.exists())
    return path if looks_local and "://" not in source else None


def _builder(path: Path) -> tuple[str, dict[str, str]] | None:
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return BUILDERS.get(path.suffix.lower())


def _open_local(path: Path, spec: CalibrationSpec) -> Any:
    import datasets

    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if spec.config is not None and (saved or path.is_file()):
        raise PaveError(
            f"calibration_config {spec.config!r} means nothing for the local data "
            f"{spec.dataset!r}, which has no configurations; remove the key.")
    if saved:
        return _open_saved(path, spec)
    if path.is_dir():
        return datasets.load_dataset(str(path), spec.config, split=spec.split)
    builder = _builder(path)
    if builder is None:
        raise PaveError(
            f"calibration_dataset {spec.dataset!r} is not a kind of file that can be read; "
            f"name {LOCAL_FILE}.")
    if path.stat().st_size == 0:
        raise PaveError(f"calibration_dataset {spec.dataset!r} is an empty file; name one "
                        "with at least one row.")
    name, options = builder
    return datasets.load_dataset(
        name, data_files=str(path), split=spec.split, cache_dir=_rows_cache(path), **options)


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
        name, options = _builder(Path(spec.dataset)) or (spec.dataset, {})
        return datasets.load_dataset(name, data_files=spec.dataset, split=spec.split, **options)
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
def explained(spec: CalibrationSpec) -> Iterator[None]:
    """Turn whatever `datasets` and its readers raise into a `PaveError` about `spec`."""
    try:
        yield
    except PaveError:
        raise
    except Exception as error:
        raise PaveError(_sentence(error, spec)) from error


def _sentence(error: BaseException, spec: CalibrationSpec) -> str:
    where = f"calibration_dataset {spec.dataset!r}"
    links = list(_chain(error))
    story = "\n".join(f"{type(link).__name__}: {link}" for link in links)
    known = _match(_SENTENCES, story, where, spec)
    if known is not None:
        return known
    fault = _first_fault(spec.dataset)
    if fault is not None:
        return f"{where} is damaged: {fault}; repair or remove it."
    root = str(links[-1]).strip().split("\n")[0] or type(links[-1]).__name__
    return _match(_VAGUE, story, where, spec) or (
        f"{where} (split {spec.split!r}) could not be read: {root.rstrip('.')}; repair it, "
        f"or name {LOCAL_FILE}.")


def _match(
    table: tuple[tuple[str, str], ...], story: str, where: str, spec: CalibrationSpec
) -> str | None:
    for pattern, sentence in table:
        found = re.search(pattern, story, re.DOTALL)
        if found:
            available = (found.groupdict().get("list") or "none").strip("[]")
            return sentence.format(
                where=where, split=spec.split, config=spec.config, list=available)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_fault(source: str) -> str | None:
    """Where local text stops being UTF-8 or JSON, which `datasets` does not say."""
    path = local_path(source)
    if path is None or not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix.lower() not in BUILDERS or file.suffix.lower() == ".parquet":
            continue
        fault = _fault_in(file)
        if fault is not None:
            return f"{file.name}, {fault}"
    return None


def _fault_in(file: Path) -> str | None:
    kind = file.suffix.lower()
    if kind == ".json":
        try:
            json.loads(file.read_bytes())
            return None
        except UnicodeDecodeError:
            pass
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # JSON Lines under the name .json
                return f"line {error.lineno} is not JSON ({error.msg})"
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig")
                if kind in (".json", ".jsonl") and text.strip():
                    row = json.loads(text)
                    if kind == ".jsonl" and not isinstance(row, dict):
                        return f"line {number} is not a JSON object"
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg})"
    return None


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
