"""What `datasets` complains about, in one sentence of ours that says how to mend it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import BUILDERS, local_path
from mergekit_pave.recipe.parameters import CalibrationSpec

LOCAL_FILE = "a local .jsonl, .json, .csv, .parquet or .txt file"

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
    (r"ModuleNotFoundError: No module named '(?P<list>\w+)",
     "{where} needs the Python package {list}; install it, or name " f"{LOCAL_FILE}."),
    (r"EmptyDatasetError|DataFilesNotFoundError",
     "{where} has no data files; put .jsonl, .json, .csv, .parquet, .txt or image files there."),
)

# Tried after looking for damage in the files, which can be the cause of these.
_VAGUE = (
    (r"corresponds to no data|StopIteration|SchemaInferenceError|EmptyDataError",
     "{where} has no rows in split {split!r}; name data that has some."),
    (r"CastError|Couldn't cast|Schema at index|Failed to parse string",
     "{where} has {unlike}."),
)


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
            path = local_path(spec.dataset)
            unlike = (
                "rows with different columns or types; give all rows equal ones"
                if path is not None and path.is_file() else
                "files with different columns or types; name one file, or give them equal columns"
            )
            return sentence.format(where=where, split=spec.split, config=spec.config,
                                   list=available, unlike=unlike)
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
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # "\\ud800", say, which Python reads and Arrow does not
                return f"line {number} holds half a character"
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8"
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg})"
    return None
