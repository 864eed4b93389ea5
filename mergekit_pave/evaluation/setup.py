"""From a merge configuration to the bench that its models are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_pave.calibration.load import Resources
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.bench import Bench, Task
from mergekit_pave.evaluation.held_out import HeldOut, given, held_out
from mergekit_pave.evaluation.scores import Kind, kind_of
from mergekit_pave.models.names import last_part, name_of
from mergekit_pave.models.source import (
    LoaderOptions,
    ModelSource,
    model_source,
    paths_of,
    read_config,
)
from mergekit_pave.recipe.inputs import Input, calibration_spec
from mergekit_pave.recipe.parameters import DATA_FREE, CalibrationSpec
from mergekit_pave.recipe.reading import model_reference
from mergekit_pave.recipe.recipe import Recipe, read_raw


@dataclass(frozen=True)
class RowOptions:
    """Which rows are wanted.

    Attributes:
        rows: for each model, at most.
        max_tokens: of a row, at most.
        held_out: files or data sets to take rows from, one for each model, instead of what
            calibration leaves.
        split: split of each model's own data to take rows from.
        general: a file or data set of rows of no task.
        base: the base model, where the configuration names none.
        drawn: whether calibration draws rows; by default whether the merge looks at data.
    """

    rows: int = 64
    max_tokens: int = 256
    held_out: tuple[str, ...] = ()
    split: str | None = None
    general: str | None = None
    base: str | None = None
    drawn: bool | None = None


def read_recipe(path: Path) -> Recipe:
    """The recipe of a merge, from its YAML or from its output; errors as `read_raw`."""
    raw = read_raw(path)
    if not isinstance(raw, dict):
        raise PaveError(f"{path} holds no merge configuration.")
    return Recipe.of(raw)


def same_merge(recipe: Recipe, other: Recipe, where: Path) -> None:
    """Raise `PaveError` unless both merge the same models, whatever method and strength.

    Folders are compared by their own names: a published configuration has lost the paths.
    """
    one, two = (sorted(_models(found.config)) for found in (recipe, other))
    if one != two:
        raise PaveError(
            f"{where} is a merge of {', '.join(two)}, not of {', '.join(one)}; evaluate it with "
            "its own configuration.")


def _models(config: MergeConfiguration) -> list[str]:
    return ["+".join(map(last_part, paths_of(model))) for model in config.referenced_models()]


def bench_of(
    recipe: Recipe, wanted: RowOptions, options: LoaderOptions, resources: Resources,
    quiet: bool = False,
) -> Bench:
    """The bench of a merge: its experts with their rows, its base, the general rows.

    Raises:
        PaveError: a model that cannot be read, rows that cannot be opened, or no base to compare
            general rows with.
    """
    entries = _one_for_each(recipe.inputs)
    if not entries:
        raise PaveError("The configuration merges no model with its base; there is nothing to ask.")
    if wanted.held_out and len(wanted.held_out) != len(entries):
        raise PaveError(
            f"--held-out is given {len(wanted.held_out)} times for {len(entries)} models "
            f"({', '.join(name_of(e.model.model.path) for e in entries)}); give it once for each, "
            "in their order.")
    reference = model_reference(wanted.base) if wanted.base else _base(recipe.config, entries)
    base = None if reference is None else _source(reference, options)
    tasks: list[Task] = []
    for i, entry in enumerate(entries):
        source = _source(entry.model, options)
        rows = _rows(entry, source, wanted, wanted.held_out[i] if wanted.held_out else None)
        tasks.append(Task(_label(source, tasks), source, kind_of(source.config()), rows))
    general = None
    if wanted.general:
        if base is None:
            raise PaveError("--general needs a base model to compare with; name one with --base.")
        spec = CalibrationSpec(wanted.general, text_column=_column(entries[0]))
        rows = given(base, spec, None, wanted.rows, wanted.max_tokens)
        kind: Kind = "language" if tasks[0].kind == "language" else "encoder"
        general = Task("general rows", base, kind, rows)
    return Bench(tasks, base, general, resources, quiet)


def _one_for_each(entries: Sequence[Input]) -> list[Input]:
    return list({entry.model: entry for entry in reversed(entries)}.values())[::-1]


def _base(config: MergeConfiguration, entries: Sequence[Input]) -> ModelReference | None:
    return config.base_model or next((e.base for e in entries if e.base), None)


def _label(source: ModelSource, tasks: Sequence[Task]) -> str:
    """The model's public name, numbered where another one has it."""
    same = sum(task.source.label == source.label for task in tasks)
    return source.label if not same else f"{source.label} ({same + 1})"


def _source(model: ModelReference, options: LoaderOptions) -> ModelSource:
    read_config(model, options)
    return model_source(model, options)


def _column(entry: Input) -> str:
    return entry.get("text_column")


def _rows(
    entry: Input, source: ModelSource, wanted: RowOptions, own: str | None
) -> HeldOut:
    has_data = entry.get("calibration_dataset") not in (None, DATA_FREE)
    calibrated = calibration_spec(entry) if has_data else None
    draws = entry.calibrated if wanted.drawn is None else wanted.drawn
    drawing = calibrated if calibrated and draws and not calibrated.generated else None
    if own is not None:
        spec = CalibrationSpec(own, split=wanted.split or "train", text_column=_column(entry))
        try:
            return given(source, spec, drawing, wanted.rows, wanted.max_tokens)
        except PaveError as error:
            raise PaveError(
                f"--held-out {own}: {str(error).rstrip('.')} (text_column is read from the "
                f"parameters of {source.label}; --config names another configuration).") from error
    if calibrated is None:
        raise PaveError(
            f"{source.label} has no calibration_dataset to hold rows out of; name rows of its "
            "task with --held-out.")
    if wanted.split:
        spec = replace(calibrated, split=wanted.split)
        return given(source, spec, drawing, wanted.rows, wanted.max_tokens)
    return held_out(source, calibrated, wanted.rows, wanted.max_tokens, draws)
