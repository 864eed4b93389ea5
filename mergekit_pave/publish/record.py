"""What a merge did, kept beside the merged model: `pave_report.json`.

    {"kind": "mergekit-pave merge report", "format": 1,
     "merge_method": "pave_ties", "version": "0.1.0",
     "tensors": {"purified": 168, "plain": 123} or null,
     "base": {"id": "meta-llama/Llama-2-7b-hf", "hub": [...]} or null,
     "models": [{
        "id": "WizardLMTeam/WizardMath-7B-V1.0",   a Hub id, or a local folder's own name
        "hub": ["WizardLMTeam/WizardMath-7B-V1.0"],   the Hub ids it consists of; [] when local
        "data": {"dataset": "openai/gsm8k", "local": false, "used": 128, "tokens": 24170, ...},
        "statistics": {"sites": 128, "rows_per_feature": 2.2, "skipped": {"task head": 1}},
        "ranks": {"model.layers.0.mlp.up_proj.weight": [4096, 82], ...}   full rank, dropped
     }]}

`data` is that of the covariance store's manifest without its hashes, with `"generated": true`
where the model wrote it itself (`"dataset": "self"` is no name then, nor is `"none"`: covariances
that were estimated from the task vector); `data`, `statistics` and `ranks` are null where a model
needed none. `purified` counts, for a method that needs covariances itself, the tensors that were
merged by them. Names are public ones: the file is published with the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from mergekit.common import ModelReference
from pydantic import Field
from typing_extensions import Required, TypedDict

from mergekit_pave.errors import PaveError
from mergekit_pave.methods.layers import MergeState
from mergekit_pave.models.names import is_local
from mergekit_pave.models.source import paths_of, public_reference
from mergekit_pave.recipe.parameters import DATA_FREE, GENERATED
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.archive import Count, parsed
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.files import write_text

NAME = "pave_report.json"
KIND = "mergekit-pave merge report"
FORMAT = 1
Ranks = dict[str, tuple[Annotated[int, Field(gt=0)], Count]]
_FAULTS = (OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Counts:
    """Tensors of a merge."""

    purified: int
    plain: int


@dataclass(frozen=True)
class Parent:
    """A model by its public name, and the Hub ids that it consists of."""

    id: str
    hub: tuple[str, ...]


@dataclass(frozen=True)
class Statistics:
    """A covariance store in numbers: `skipped` counts layers by the reason."""

    sites: int
    rows_per_feature: float
    skipped: dict[str, int]


class Data(TypedDict, total=False):
    """What of a model's data the card tells; `write` keeps more of it."""

    dataset: Required[str]
    local: Required[bool]
    generated: bool
    config: str | None
    split: str | None
    columns: list[str] | None
    used: Count | None
    tokens: Count | None


_NO_DATA: Data = {"dataset": DATA_FREE, "local": False}


@dataclass(frozen=True)
class OfModel(Parent):
    """What the merge knew of one fine-tune; `ranks` are (full, dropped) by tensor."""

    data: Data | None
    statistics: Statistics | None
    ranks: Ranks | None


@dataclass(frozen=True)
class Record:
    """What a merge did."""

    merge_method: str
    version: str
    tensors: Counts | None
    base: Parent | None
    models: tuple[OfModel, ...]


def of_merge(recipe: Recipe, state: MergeState) -> Record:
    """The record of a merge that has just ended."""
    models = dict.fromkeys(entry.model for entry in recipe.inputs)
    counts = {what: len(names) for what, names in state.counts.items()}
    base = recipe.config.base_model
    return Record(
        recipe.config.merge_method, version("mergekit-pave"),
        Counts(**counts) if any(counts.values()) else None,
        Parent(*_names(base)) if base else None,
        tuple(_model(model, state) for model in models))


def local_names(recipe: Recipe, record: Record) -> set[str]:
    """What the merge found to be files and folders; from elsewhere `a/b` may look like a Hub id."""
    parents = (*record.models, *([record.base] if record.base else []))
    hub = {name for parent in parents for name in parent.hub}
    references = [recipe.config.base_model, *(entry.model for entry in recipe.inputs)]
    found = {path for model in references if model for path in paths_of(model)} - hub
    data = [model.data for model in record.models]
    if None in data:
        return found
    # Where a store is named, nobody read the keys of the data, so the record does not tell.
    named = {name for e in recipe.inputs if not e.get("covariance")
             if isinstance(name := e.get("calibration_dataset"), str)}
    named -= {DATA_FREE, GENERATED}
    return found | (named - {about["dataset"] for about in data if about and not about["local"]})


def write(folder: Path | str, record: Record) -> None:
    values = {"kind": KIND, "format": FORMAT, **asdict(record)}
    write_text(Path(folder) / NAME, json.dumps(values, indent=1) + "\n")


def files(folder: Path | str) -> list[Path]:
    """What `write` has written to the folder."""
    path = Path(folder) / NAME
    try:
        ours = path.is_file() and json.loads(path.read_text("utf-8"))["kind"] == KIND
    except _FAULTS:
        return []
    return [path] if ours else []


def read(folder: Path | str) -> Record | None:
    """The record beside a merged model; `None` when there is none.

    Raises:
        PaveError: the file is damaged or of another version.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("no file")
        values = json.loads(path.read_text("utf-8"))
        if (values["kind"], values["format"]) != (KIND, FORMAT):
            raise ValueError("another kind or format")
        return parsed(Record, values)
    except _FAULTS as error:
        raise PaveError(
            f"{path} is damaged or from another version of mergekit-pave; merge again."
        ) from error


def _names(model: ModelReference) -> tuple[str, tuple[str, ...]]:
    hub = tuple(path for path in paths_of(model) if not is_local(path))
    return public_reference(model).id, hub


def _model(model: ModelReference, state: MergeState) -> OfModel:
    store, ranks = state.used.get(model), state.ranks.get(model)
    data: Any = _published(store.manifest["data"]) if store else None
    return OfModel(
        *_names(model), _NO_DATA if model in state.data_free else data,
        _statistics(store) if store else None, dict(sorted(ranks.items())) if ranks else None)


def _published(data: Mapping[str, Any]) -> dict[str, Any]:
    # Hashes of private data would let anyone confirm a guess of it.
    return {key: value for key, value in data.items() if key not in ("rows", "digest")}


def _statistics(store: CovarianceStore) -> Statistics:
    skipped = dict(sorted(Counter(store.skipped.values()).items()))
    return Statistics(len(store.sites), round(fullness(store), 2), skipped)


def fullness(store: CovarianceStore) -> float:
    """Tokens per feature of the worst covariance; below 1 it cannot have full rank."""
    return min((site.count / site.width for site in store.sites.values()), default=0.0)
