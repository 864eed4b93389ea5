"""Whether base, fine-tunes, parameters and slices make a merge, from the configuration alone."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterable, Iterator, Sequence

from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod

from mergekit_pave.check.finding import Finding, error
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.inputs import Group, Input, purifies
from mergekit_pave.recipe.parameters import DATA_FREE
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.recipe.spelling import suggestion


def check_inputs(recipe: Recipe, options: LoaderOptions) -> Iterator[Finding]:
    """Everything about the inputs that the configuration alone tells."""
    config = recipe.config
    if config.base_model and config.base_model.lora and not options.lora_merge_cache:
        yield error(
            "base_model", f"{config.base_model} names an adapter: add --lora-merge-cache DIR to "
            "the command, for the merged copy."
        )
    for group in recipe.groups:
        yield from _check_group(group, recipe.method)
        yield from _check_weights(group.where, group.fine_tunes(recipe.method))
    yield from _check_scales(recipe.inputs)
    said = set()
    for entry in recipe.entries:
        for finding in _check_entry(entry, options):
            # Slices repeat the models, and their faults.
            if (entry.model, finding.what) not in said:
                said.add((entry.model, finding.what))
                yield finding
    if getattr(recipe.inner, "masks", False):
        yield from _check_emr(recipe)
    yield from _check_slices(config)


def _check_entry(entry: Input, options: LoaderOptions) -> Iterator[Finding]:
    yield from _check_damping(entry)
    if purifies(entry.method):
        yield from _check_purify(entry)
    for spec in entry.method.spec.parameters:
        if spec.required and not any(spec.name in scope for scope in entry.scopes):
            yield error(
                entry.where, f"{entry.method.spec.name} needs a value for {spec.name}: add "
                f"`{spec.name}: VALUE` to `parameters`."
            )
    if entry.model.lora and entry.calibrated and not options.lora_merge_cache:
        yield error(
            entry.where, f"{entry.model} names an adapter, and data go through the merged copy: "
            "add --lora-merge-cache DIR to the command (a path with a `+` is read as model plus "
            "adapter)."
        )
    if entry.looked_at and not (entry.get("covariance") or entry.get("calibration_dataset")):
        yield error(
            entry.where, f"{entry.model} has no calibration data: add "
            "`calibration_dataset: NAME_OR_FILE` (its own task data), `covariance: STORE` or, "
            "without data, `calibration_dataset: none` or `self` to its parameters."
        )


def _check_group(group: Group, method: MergeMethod) -> Iterator[Finding]:
    where, base, models = group.where, group.base, [model for _, model, _ in group.members]
    if base is None:
        yield error(
            "base_model", "is missing: task vectors are differences from it; add "
            "`base_model: NAME`."
        )
        return
    twice = [model for i, model in enumerate(models) if model in models[:i]]
    if twice:
        yield error(where, f"{twice[0]} is listed twice; remove one and raise the other's weight.")
        return
    others = [model for model in models if model != base]
    if not others:
        yield error(where, "holds no fine-tuned model beside the base; add one.")
        return
    folders: dict[tuple[str, ...], ModelReference] = {}
    for model in dict.fromkeys([base, *models]):
        first = folders.setdefault(_place(model), model)
        if first != model:
            yield error(where, f"{model} and {first} are the same; write both alike or remove one.")
            return
    # mergekit adds a base that `models` leaves out, but not to the sources of a slice.
    ids = models if where.endswith("]") else [base, *others]
    if base not in ids:
        yield error(where, f"its sources lack the base {base}; add it with the same layer_range.")
        return
    try:
        method.spec.contract.validate_ids(ids, base)
    except ValueError as fault:
        yield error(where, f"{method.spec.name}: {fault} (the base included).")


def _place(model: ModelReference) -> tuple[str, ...]:
    """The identity of a model: the real path of its folder, or its name."""
    parts = [part for part in (model.model, model.lora) if part]
    return tuple(
        os.path.realpath(part.path) if os.path.isdir(part.path) else str(part) for part in parts)


def _check_weights(where: str, entries: Sequence[Input]) -> Iterator[Finding]:
    """A merge in which every weight or lambda is 0 changes nothing."""
    if entries and all(entry.is_zero("weight") for entry in entries):
        yield error(where, "every weight is 0, which leaves nothing to merge; raise one.")
    elif entries and all(entry.is_zero("lambda") for entry in entries):
        yield Finding(
            "warning", where, "lambda is 0, which leaves the base's matrices as they are: raise "
            "it, or remove the key."
        )


def _check_emr(recipe: Recipe) -> Iterator[Finding]:
    """All masks belong to one base and one rescaler, whatever the slices."""
    config = recipe.config
    for group in recipe.groups:
        base = group.base
        if base not in (None, config.base_model):
            top = f" and add `base_model: {base}` at the top level"
            mend = "" if config.base_model else top
            yield error(
                group.where, f"{config.merge_method} needs one base for the whole model: remove "
                f"the base_model of the slice{mend}."
            )
    values = {value for entry in recipe.entries for value in entry.can_be("rescaler")}
    if len(values) > 1:
        yield error(
            "parameters", "rescaler must be one value for the whole model: give it once, without "
            "a filter."
        )


def _check_damping(entry: Input) -> Iterator[Finding]:
    fractions, absolutes = ({need for need, _ in entry.settings(name)}
                            for name in ("dampening_frac", "regularization"))
    if not fractions or not absolutes:
        return
    # With different filters they may concern different tensors.
    if None in fractions | absolutes or fractions & absolutes:
        yield error(
            "parameters", "dampening_frac and regularization exclude each other: keep one of them."
        )


def _check_scales(entries: Iterable[Input]) -> Iterator[Finding]:
    """Covariances that are added up have to be of one kind: of inputs, or of task vectors."""
    compared = [
        entry for entry in entries
        if entry.looked_at and (entry.solved or "separate" in entry.can_be("purify"))
    ]
    for entry in compared:
        if not entry.calibrated and any(other.calibrated for other in compared):
            yield error(
                entry.where, f"calibration_dataset: {DATA_FREE} for {entry.model} and data for "
                "another model: their covariances have no common scale, and are compared here; "
                f"use {DATA_FREE} for all models or for none."
            )
            return


def _check_purify(entry: Input) -> Iterator[Finding]:
    """Refuse or warn of keys that have no effect, or a bad one, with this `purify`."""
    if entry.estimated and entry.ranked and "weight" in entry.can_be("purify"):
        yield Finding(
            "warning", entry.where, "calibration_dataset: none with purify: weight cuts the base "
            "where the task vector alone looked weak, and can ruin the merge: set purify: delta or "
            "separate, or give data."
        )
    if entry.can_be("purify") != {"separate"}:
        if entry.settings("separation") and "separate" not in entry.can_be("purify"):
            yield error("parameters", "separation has an effect only with `purify: separate`.")
        return
    if entry.can_be("rank_ratio") - {None, 1}:
        yield error(
            "parameters", "rank_ratio has no effect with `purify: separate`, which truncates "
            "nothing (1.0 switches it off): remove it, or choose `purify: delta`."
        )
    if entry.can_be("subspace") != {"covariance"}:
        yield error(
            "parameters", "subspace must be covariance with `purify: separate`: there is nothing "
            "to separate without covariances."
        )


def _check_slices(config: MergeConfiguration) -> Iterator[Finding]:
    groups = [("slices", config.slices or [])]
    groups += [(f"modules.{n}.slices", m.slices or []) for n, m in (config.modules or {}).items()]
    for where, pieces in groups:
        for i, piece in enumerate(pieces):
            if len({tuple(source.layer_range) for source in piece.sources}) > 1:
                yield error(
                    f"{where}[{i}]", "its sources have different layer_range: a task vector "
                    "needs the same layer of model and base; make the ranges equal."
                )
            for first, end in sorted({tuple(source.layer_range) for source in piece.sources}):
                if not 0 <= first < end:
                    yield error(
                        f"{where}[{i}]", f"layer_range {[first, end]} holds no layers: give the "
                        "first, from 0, and the one after the last."
                    )


DTYPES = ("bfloat16", "float16", "float32", "float64")
# mergekit takes anything with a brace in it for a template, but nothing shorter than this.
_SHORTEST = 20


def check_output(config: MergeConfiguration) -> Iterator[Finding]:
    """Dtypes and the chat template."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name and name.removeprefix("torch.") not in DTYPES:
            yield error(key, f"{name} is no dtype to merge in; {suggestion(name, DTYPES)}")
    template = config.chat_template
    if template and template != "auto" and not _is_template(template):
        names = [f.name.removesuffix(".jinja") for f in
                 importlib.resources.files(chat_templates).iterdir() if f.name.endswith(".jinja")]
        yield error(
            "chat_template", f"{template!r} is neither a template nor the name of one; "
            f"{suggestion(template, ['auto', *names])}"
        )


def _is_template(text: str) -> bool:
    if "{" in text:
        return len(text) >= _SHORTEST
    name = importlib.resources.files(chat_templates).joinpath(f"{text}.jinja")
    return "\n" not in text and name.is_file()
