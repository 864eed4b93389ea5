"""What mergekit plans to merge, compared with what the checkpoints hold, both ways.

mergekit plans by a list of names: its own definition of an architecture, or the names of the
base's class. It skips, without a word, what a checkpoint holds beside them, and ends in a traceback
where a checkpoint lacks one of them, after hours of calibration. Only headers are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit.architecture import arch_info_for_config, infer_architecture_info
from mergekit.architecture.base import ModelArchitecture, WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_pave.errors import PaveError
from mergekit_pave.models.architecture import by_names
from mergekit_pave.models.checkpoint import Checkpoint, checkpoint, fetched
from mergekit_pave.models.layers import BUILDING, class_name
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.storage.identity import same_layer


@dataclass
class Comparison:
    """How a plan fits the checkpoints.

    Attributes:
        absent: (model, tensor) that mergekit would ask for, and the checkpoint lacks.
        lost: (model, tensor) that would be missing from the merge.
        left: (model, tensor) of fine-tunes that the base has no place for: heads of another task,
            and what their own class does not know.
        sizes: sentences about tensors of different shapes.
    """

    absent: list[tuple[Checkpoint, str]] = field(default_factory=list)
    lost: list[tuple[Checkpoint, str]] = field(default_factory=list)
    left: list[tuple[Checkpoint, str]] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.absent and not self.lost


@dataclass(frozen=True)
class Plan:
    """An architecture for mergekit, and what to say of it."""

    architecture: ModelArchitecture
    comparison: Comparison
    notes: tuple[str, ...] = ()


def plan(
    config: MergeConfiguration, checkpoints: Mapping[ModelReference, Checkpoint],
    options: LoaderOptions, crimes: bool = False,
) -> Plan:
    """The first plan that loses nothing: mergekit's definition, the base's names, or the class's.

    Args:
        config: the merge, not yet rewritten by mergekit's planner.
        checkpoints: of every model it refers to.
        options: mergekit's loading options.
        crimes: mergekit's `--allow-crimes`, models of several architectures.

    Raises:
        PaveError: no plan loses nothing; the message names tensors, model and mend.
    """
    base = checkpoints[config.base_model or config.referenced_models()[0]]
    defined = [arch_info_for_config(item.config) for item in checkpoints.values()]
    definition = defined[0] if None not in defined else None
    if definition and not _lists(definition, checkpoints.values()):
        definition = None
    if definition and not crimes and any(other != definition for other in defined):
        definition = None
    tried: list[tuple[ModelArchitecture, Comparison]] = []
    for make in _plans(config, checkpoints, base, definition, options):
        architecture = make()
        _refuse_parts(config, architecture)
        tried.append((architecture, compare(architecture, base, checkpoints.values())))
        if tried[-1][1].fits or (crimes and not tried[-1][1].absent):
            return Plan(*tried[-1], notes=_notes(definition, base, tried))
    raise PaveError(_refusal(base, tried[-1][1], checkpoints.values()))


def _lists(definition: ModelArchitecture, checkpoints: Iterable[Checkpoint]) -> bool:
    """Whether mergekit's definition finds the settings that it asks of every config."""
    try:
        for item in checkpoints:
            definition.all_weights(item.config)
    except (RuntimeError, AttributeError):  # as of a Qwen2-VL, whose layers stand in text_config
        return False
    return True


def _plans(
    config: MergeConfiguration, checkpoints: Mapping[ModelReference, Checkpoint], base: Checkpoint,
    definition: ModelArchitecture | None, options: LoaderOptions,
) -> Iterator[Callable[[], ModelArchitecture]]:
    if definition:
        yield lambda: definition
    # `modules:` names those of the definition.
    if not (definition and config.modules):
        others = [item.headers for item in checkpoints.values() if item is not base]
        yield lambda: by_names(base.headers, others, base.own, base.config, definition)
    if definition is None:
        yield lambda: _inferred(checkpoints, base, options)


def _inferred(
    checkpoints: Mapping[ModelReference, Checkpoint], base: Checkpoint, options: LoaderOptions
) -> ModelArchitecture:
    """mergekit's inference, which converts between versions; it takes no adapters."""
    # It remembers models by name, and files may have changed since.
    infer_architecture_info.cache_clear()
    local = {key: ModelReference(model=ModelPath(path=str(item.folder)))
             for key, item in checkpoints.items()}
    own = next(local[key] for key, item in checkpoints.items() if item is base)
    with BUILDING:
        return infer_architecture_info(
            tuple(dict.fromkeys(local.values())), own, MergeOptions(
                trust_remote_code=options.trust_remote_code,
                transformers_cache=options.cache_dir))


def compare(
    architecture: ModelArchitecture, base: Checkpoint, checkpoints: Iterable[Checkpoint]
) -> Comparison:
    """Names and shapes of a plan against those of each checkpoint, both ways."""
    checkpoints = list(checkpoints)
    found = Comparison()
    at_base: dict[str, tuple[int, ...]] = {}
    for item in sorted(checkpoints, key=lambda item: item is not base):
        used: set[str] = set()
        for weight in architecture.all_weights(item.config):
            names = (weight.name, *(weight.aliases or ()))
            if weight.optional and not any(n in c.headers for n in names for c in checkpoints):
                continue
            name = _resolved(weight, item)
            if name is not None:
                used.add(name)
                shape = item.headers[name].shape
                there = at_base.setdefault(weight.name, shape)
                if shape != there and not _same_but(shape, there, weight.vocabulary_axis):
                    found.sizes.append(
                        f"{name} of {item.label} is {shape}, and {there} in the base "
                        f"{base.label}: merge fine-tunes of this base only.")
            elif parts := _converted(weight, item):
                used.update(parts)
            elif not weight.optional or item is base:  # which mergekit asks for all it merges
                found.absent.append((item, weight.name))
        for name in item.headers:
            if name not in used and not item.is_harmless(name):
                foreign = item is not base and _no_place(name, item, base)
                (found.left if foreign else found.lost).append((item, name))
    return found


def _resolved(weight: WeightInfo, item: Checkpoint) -> str | None:
    """The tensor of the checkpoint that mergekit loads for it as it is."""
    names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
    return next((name for name in names if name in item.headers), None)


def _converted(weight: WeightInfo, item: Checkpoint) -> list[str]:
    """The tensors of the checkpoint that mergekit turns into it by transformers' tables."""
    if item.own is None:
        return []
    wanted = {weight.name, *(weight.aliases or ())}
    parts = [name for name in item.headers if wanted & set(item.own.of(name))]
    kind = getattr(item.config, "model_type", None)
    if parts and any(can_convert_checkpoint_keys(kind, set(parts), target) for target in wanted):
        return parts
    return []


def _same_but(one: Sequence[int], other: Sequence[int], axis: int | None) -> bool:
    """Whether two shapes differ in the number of tokens at most, which `check` looks at."""
    return axis is not None and len(one) == len(other) and all(
        a == b for i, (a, b) in enumerate(zip(one, other, strict=True)) if i != axis)


def _no_place(name: str, item: Checkpoint, base: Checkpoint) -> bool:
    """Whether a fine-tune's tensor is the head of a task that the base has not, or of no class."""
    if item.own is None or name in base.headers:
        return False
    targets = item.own.of(name)
    if base.own and any(base.own.shape(target) for target in targets):
        return False
    return not any(item.own.in_body(target) for target in targets)


def _refuse_parts(config: MergeConfiguration, architecture: ModelArchitecture) -> None:
    there = set(architecture.modules)
    if config.slices and len(there) > 1:
        raise PaveError(
            f"slices: the model has several stacks of layers ({', '.join(sorted(there))}); list "
            "whole `models` instead."
        )
    if config.modules and (wrong := sorted(there ^ set(config.modules))):
        what = "the model has no such module" if wrong[0] in config.modules else (
            "that module would be missing from the merge")
        raise PaveError(f"modules.{wrong[0]}: {what}; name all of {', '.join(sorted(there))}.")


def _notes(
    definition: ModelArchitecture | None, base: Checkpoint,
    tried: Sequence[tuple[ModelArchitecture, Comparison]],
) -> tuple[str, ...]:
    notes = []
    if definition is not None and len(tried) > 1:
        first = tried[0][1]
        unfit = {name for _, name in first.lost} or {name for _, name in first.absent}
        notes.append(
            f"mergekit's definition of {class_name(base.config)} does not fit "
            f"{len(unfit)} tensors of these checkpoints (such as {min(unfit)}); the merge is "
            "planned by the checkpoints' own names."
        )
    by_model: dict[str, list[str]] = {}
    for item, name in tried[-1][1].left:
        by_model.setdefault(item.label, []).append(name)
    notes += [
        f"{len(names)} tensors of {label} have no place in the base and are left out of the merge "
        f"({', '.join(names[:3])}{', ...' if names[3:] else ''})."
        for label, names in by_model.items()
    ]
    if tried[-1][1].lost:  # --allow-crimes
        lost = [f"{name} of {item.label}" for item, name in tried[-1][1].lost]
        notes.append(f"{len(lost)} tensors are left out of the merge, such as {lost[0]}.")
    return tuple(notes)


def _refusal(base: Checkpoint, found: Comparison, checkpoints: Iterable[Checkpoint]) -> str:
    faults = found.lost + found.absent
    item = next((c for c, _ in faults if c is not base), faults[0][0])
    names = [name for c, name in faults if c is item]
    other = base if item is not base else next((c for c in checkpoints if c is not base), base)
    kinds = [class_name(c.config) for c in (item, base)]
    there = next(((n, o) for n in names for o in other.headers
                  if o not in item.headers and o != n and same_layer(n, o)), None)
    text = f"mergekit would leave {len(names)} weights of {item.label} out of the merge"
    if found.lost and there:
        text += f": what it calls {there[0]}, {other.label}"
        text += f", a {kinds[1]}," if kinds[0] != kinds[1] and other is base else ""
        text += f" calls {there[1]}"
    else:
        text += f" (such as {names[0]}): " + (
            "the base has no tensors of those names" if found.lost else
            "mergekit plans them, and the checkpoint lacks them")
    cls = kinds[0]
    return text + (
        f"; load every model of the merge with {cls}.from_pretrained and save it again with "
        "save_pretrained(DIR, save_original_format=False)."
    )


def completed(
    out: Path | str, config: MergeConfiguration, options: LoaderOptions
) -> Checkpoint:
    """A finished merge, its names compared with its class and, one by one, with the base's.

    Args:
        out: the merge's folder, with its config.
        config: what was merged.
        options: mergekit's loading options.

    Raises:
        PaveError: a file is damaged, or the merge lacks what the base has.
    """
    out = Path(out)
    base_model = config.base_model or config.referenced_models()[0]
    base = fetched(base_model, options)
    written = ModelReference(model=ModelPath(path=str(out))).config(options.trust_remote_code)
    merged = checkpoint(out, str(out), written, options)
    known = {_anywhere(name) for name in base.random}
    lacking = [name for name in merged.random if _anywhere(name) not in known]
    there = {*merged.headers, *(t for n in merged.headers for t in _targets(merged, n))}
    if merged.own and base.own and merged.own.tensors == base.own.tensors:
        lacking += [name for name in base.headers if name not in there
                    and not base.is_harmless(name) and not there.intersection(_targets(base, name))]
    else:  # slices made a model of another depth
        kinds = {_anywhere(name) for name in there}
        lacking += [name for name in base.headers
                    if _anywhere(name) not in kinds and not base.is_harmless(name)
                    and not any(_anywhere(t) in kinds for t in _targets(base, name))]
    if lacking:
        raise PaveError(
            f"The merge in {out} lacks {len(lacking)} tensors that the base has, such as "
            f"{lacking[0]}: do not use it; merge again, and report the configuration if it recurs."
        )
    return merged


def _targets(item: Checkpoint, name: str) -> tuple[str, ...]:
    return item.own.of(name) if item.own else ()


def _anywhere(name: str) -> str:
    """A name without its layers' numbers: slices make models of other depths."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
