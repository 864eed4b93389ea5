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
that were estimated from the task vector); `data`, `statistics` and `ranks` are null where they
are not known. `purified` counts, for a method that needs covariances itself, the tensors that
were merged by them. Names are public ones: the file is published with the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_pave.errors import PaveError
from mergekit_pave.methods.layers import MergeState
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.models.source import paths_of, public_reference
from mergekit_pave.recipe.inputs import Input, calibration_spec
from mergekit_pave.recipe.parameters import DATA_FREE, GENERATED
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.files import write_text

NAME = "pave_report.json"
KIND = "mergekit-pave merge report"
FORMAT = 1
_NO_DATA = {"dataset": DATA_FREE, "local": False}
Ranks = Mapping[str, tuple[int, int]]


def of_merge(recipe: Recipe, kept: MergeState) -> dict[str, Any]:
    """The record of a merge that has just ended."""
    models = []
    for model in dict.fromkeys(entry.model for entry in recipe.inputs):
        models.append(_model(model, kept.used.get(model), kept.ranks.get(model)))
        if model in kept.data_free:
            models[-1]["data"] = dict(_NO_DATA)
    counts = {what: len(names) for what, names in kept.counts.items()}
    return _record(recipe.config, counts if any(counts.values()) else None, models)


def local_names(recipe: Recipe, record: Mapping[str, Any]) -> set[str]:
    """What the merge found to be files and folders; from elsewhere `a/b` may look like a Hub id."""
    entries, models = recipe.inputs, record["models"]
    hub = {name for about in (record["base"] or {"hub": []}, *models) for name in about["hub"]}
    references = [recipe.config.base_model, *(entry.model for entry in entries)]
    found = {path for model in references if model for path in paths_of(model)} - hub
    if any(about["data"] is None for about in models):
        return found
    # Beside a store the keys of the data are not read, and the record says nothing of them.
    named = {e.get("calibration_dataset") for e in entries if not e.get("covariance")}
    named -= {None, DATA_FREE, GENERATED}
    return found | (named - {m["data"]["dataset"] for m in models if not m["data"]["local"]})


def of_configuration(recipe: Recipe) -> dict[str, Any]:
    """Of a merge that left no record: its models, and the data that its configuration asks for."""
    models = []
    for entry in recipe.inputs:
        models.append(_model(entry.model, None, None))
        if not entry.get("covariance") and entry.get("calibration_dataset"):
            models[-1]["data"] = _intended(entry)
    return _record(recipe.config, None, models)


def write(folder: Path | str, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_text(Path(folder) / NAME, text)


def files(folder: Path | str) -> list[Path]:
    """What `write` has written to the folder."""
    path = Path(folder) / NAME
    try:
        ours = json.loads(path.read_text("utf-8"))["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path] if ours else []


def read(folder: Path | str) -> dict[str, Any] | None:
    """The record beside a merged model; `None` when there is none.

    Raises:
        PaveError: the file is damaged or of another version.
    """
    path = Path(folder) / NAME
    try:
        record = json.loads(path.read_text("utf-8"))
        good = record["kind"] == KIND and record["format"] == FORMAT
        named = [record["base"] or {"id": None, "hub": []}, *record["models"]]
        good = good and all({"id", "hub"} <= about.keys() for about in named)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise PaveError(
            f"{path} is damaged or from another version of mergekit-pave; delete it (the card "
            "will then say less) or merge again."
        )
    return record


def _record(
    config: MergeConfiguration, tensors: Mapping[str, int] | None, models: list[dict]
) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": FORMAT,
        "merge_method": config.merge_method,
        "version": version("mergekit-pave"),
        "tensors": tensors,
        "base": config.base_model and _names(config.base_model),
        "models": models,
    }


def _names(model: ModelReference) -> dict[str, Any]:
    paths = paths_of(model)
    return {
        "id": public_reference(model).id,
        "hub": [path for path in paths if not is_local(path)],
    }


def _model(
    model: ModelReference, store: CovarianceStore | None, ranks: Ranks | None
) -> dict[str, Any]:
    return {
        **_names(model),
        "data": _published(store.manifest["data"]) if store else None,
        "statistics": _statistics(store) if store else None,
        "ranks": {name: list(pair) for name, pair in sorted(ranks.items())} if ranks else None,
    }


def _published(data: Mapping[str, Any]) -> dict[str, Any]:
    # Hashes of private data would let anyone confirm a guess of it.
    return {key: value for key, value in data.items() if key not in ("rows", "digest")}


def _statistics(store: CovarianceStore) -> dict[str, Any]:
    return {
        "sites": len(store.sites),
        "rows_per_feature": round(fullness(store), 2),
        "skipped": dict(sorted(Counter(store.skipped.values()).items())),
    }


def fullness(store: CovarianceStore) -> float:
    """Tokens per feature of the worst covariance; below 1 it cannot have full rank."""
    return min((site.count / site.width for site in store.sites.values()), default=0.0)


def _intended(entry: Input) -> dict[str, Any]:
    """The calibration data that the configuration asks for, as a manifest would put it."""
    if entry.get("calibration_dataset") == DATA_FREE:
        return dict(_NO_DATA)
    spec = calibration_spec(entry)
    if spec.generated:
        return {"dataset": GENERATED, "generated": True, "local": False, "seed": spec.seed,
                "requested": spec.num_samples}
    return {
        "dataset": name_of(spec.dataset),
        "local": is_local(spec.dataset),
        "config": spec.config,
        "split": spec.split,
        "seed": spec.seed,
        "requested": spec.num_samples,
    }
