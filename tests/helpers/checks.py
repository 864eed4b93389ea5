"""Configurations with one thing changed, for the tests of `check`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import transformers


def change(raw: dict, path: str, value) -> dict:
    """`raw` with one key set (or, for `...`, removed): `models.0.parameters.weight`."""
    raw = copy.deepcopy(raw)
    *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = raw
    for part in parts:
        place = place[part] if isinstance(place, list) else place.setdefault(part, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


MODEL = "models.0.parameters"
SHARED = "parameters"


def sliced(good: dict, *ranges: tuple) -> dict:
    sources = [{"model": good["base_model"]}, *good.pop("models")]
    good["slices"] = [
        {"sources": [{**source, "layer_range": list(r)}
                     for source, r in zip(sources, part, strict=True)]}
        for part in ranges
    ]
    return good


def doctored(good: dict, tmp_path: Path, **changes) -> dict:
    """The recipe with its first model replaced by a folder with that config and no weights."""
    folder, own = tmp_path / "doctored", Path(good["models"][0]["model"])
    folder.mkdir()
    for file in own.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = json.loads((own / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return change(good, "models.0.model", str(folder))


def with_weights(folder: Path) -> None:
    """Random weights of the class that the folder's config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    model.save_pretrained(folder, save_original_format=False)


def own(good: dict, method: str, *data: str, **shared) -> dict:
    """A merge by a method of ours that is no twin."""
    models = [{"model": model["model"]} for model in good["models"]]
    for model, dataset in zip(models, data, strict=False):
        model["parameters"] = {"calibration_dataset": dataset}
    return {"merge_method": method, "base_model": good["base_model"], "models": models,
            "parameters": shared}
