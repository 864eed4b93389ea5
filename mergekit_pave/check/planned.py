"""The merge as it would be planned against the files of its models, by their headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from zipfile import is_zipfile

from mergekit.architecture.base import ModelArchitecture
from mergekit.common import ModelReference

from mergekit_pave.check.finding import Finding, error
from mergekit_pave.check.models import Allowances
from mergekit_pave.errors import PaveError
from mergekit_pave.models.adapted import adapted_loader
from mergekit_pave.models.adapters import unfit
from mergekit_pave.models.checkpoint import Checkpoint, fetched, incomplete, read
from mergekit_pave.models.headers import folder_of
from mergekit_pave.models.planned import plan
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.recipe import Recipe


def check_planned(
    recipe: Recipe, options: LoaderOptions, allowed: Allowances
) -> Iterator[Finding]:
    """Whether every file can be read and every tensor of every model is merged or named.

    Models of the Hub that are not on this machine are left to the merge, which fetches them and
    asks again (`architecture`) before it calibrates.
    """
    found: dict[ModelReference, Checkpoint] = {}
    config, places = recipe.config, _places(recipe)
    for model, where in places.items():
        try:
            item = read(model, options)
            if model.lora and (misfit := unfit(model, options)):
                yield error(where, misfit)
            elif model.lora and item and folder_of(model.lora, options.cache_dir):
                adapted_loader(model, options)  # refuses what only peft can merge
        except PaveError as refusal:
            yield error(where, str(refusal))
            continue
        if item is None:
            continue
        fault, note = incomplete(item)
        if fault:
            yield error(where, fault)
            continue
        found[model] = item
        if note:
            yield Finding("warning", where, note)
    if len(found) < len(places):
        return
    made = plan(config, found, options, allowed.crimes)
    for note in made.notes:
        yield Finding("warning", "", note)
    if not config.slices:  # which number the layers anew
        yield from _without_effect(recipe, made.architecture, found)
    if not (config.slices or allowed.crimes):
        for fault in made.comparison.sizes:
            yield error("", fault)


def _without_effect(
    recipe: Recipe, planned: ModelArchitecture, found: Mapping[ModelReference, Checkpoint]
) -> Iterator[Finding]:
    """Filters that no tensor's name holds, as of a misspelled layer; mergekit skips them."""
    names = [weight.name for weight in planned.all_weights(found[recipe.base].config)]
    for entry in recipe.entries:
        for key in dict.fromkeys(key for scope in entry.scopes for key in scope):
            for need, _ in entry.settings(key):
                if need is not None and not any(need in name for name in names):
                    yield Finding(
                        "warning", entry.where, f"{key} has the filter {need!r}, which is in no "
                        f"tensor's name, such as {names[len(names) // 2]}: it has no effect."
                    )


def architecture(
    recipe: Recipe, options: LoaderOptions, allowed: Allowances, lazy_unpickle: bool = False
) -> ModelArchitecture:
    """The architecture to merge by, after all files of the models were downloaded.

    `lazy_unpickle` is mergekit's.

    Raises:
        PaveError: the first error of `check_planned`, or a file that mergekit does not read so.
    """
    found = {model: fetched(model, options) for model in _places(recipe)}
    for item in found.values():
        if fault := incomplete(item)[0] or (lazy_unpickle and _old_pickle(item)):
            raise PaveError(fault)
    return plan(recipe.config, found, options, allowed.crimes).architecture


def _old_pickle(item: Checkpoint) -> str | None:
    for name in sorted({header.file for header in item.headers.values()}):
        if name.endswith(".bin") and not is_zipfile(item.folder / name):
            return (f"{item.folder / name} is of a format that torch has not written since 2020, "
                    "which --lazy-unpickle does not read: leave that option out.")
    return None


def _places(recipe: Recipe) -> dict[ModelReference, str]:
    """Every model, and where the YAML names it; the fine-tunes in their order."""
    places = {entry.model: entry.where for entry in reversed(recipe.inputs)}
    config, places = recipe.config, dict(reversed(places.items()))
    if config.base_model:
        places[config.base_model] = "base_model"
    return places | {model: "" for model in config.referenced_models() if model not in places}
