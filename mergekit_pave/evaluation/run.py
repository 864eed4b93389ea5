"""`mergekit-pave evaluate`: finished merges, or configurations merged for it, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_pave.calibration.load import Resources
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.kept import (
    FORMAT,
    address,
    arrays,
    evaluation_cache,
    plain,
    read_kept,
    write_kept,
)
from mergekit_pave.evaluation.merging import merge_to
from mergekit_pave.evaluation.scores import Scores
from mergekit_pave.evaluation.setup import RowOptions, bench_of, read_recipe, same_merge
from mergekit_pave.evaluation.verdict import OfTask, as_dict, sentence, verdicts
from mergekit_pave.evaluation.writing import written
from mergekit_pave.models.headers import check_finished
from mergekit_pave.models.source import LoaderOptions, ModelSource
from mergekit_pave.recipe.recipe import CONFIGURATION, Recipe
from mergekit_pave.storage.files import make_folder, scratch
from mergekit_pave.storage.masks import FOLDER


@dataclass(frozen=True)
class Target:
    """A merge to look at: its name, its recipe, and its folder where it is there already."""

    name: str
    recipe: Recipe
    folder: Path | None


@dataclass(frozen=True)
class Result:
    """What was found about one merge; `general` is `None` without rows of no task."""

    target: Target
    of_tasks: list[OfTask]
    general: OfTask | None
    written: list[tuple[str, str, str]]

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def everything(self) -> list[OfTask]:
        """All tasks, the general rows last."""
        return [*self.of_tasks, *([self.general] if self.general else [])]

    @property
    def sentence(self) -> str:
        return sentence(self.of_tasks, self.general)

    @property
    def language(self) -> bool:
        """Whether a benchmark of language models would take it."""
        return all(task.kind == "language" for task in self.of_tasks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        texts = [{"model": m, "prompt": p, "written": w} for m, p, w in self.written]
        return {**as_dict(self.of_tasks, self.general), "written": texts}


def evaluate(
    merges: Sequence[Path | str], config: Path | str | None = None, *,
    rows: RowOptions = RowOptions(), options: LoaderOptions = LoaderOptions(),
    resources: Resources = Resources(),
    length: int = 0, quiet: bool = False,
) -> list[Result]:
    """Score several merges of the same models on held-out rows of each model's task.

    Args:
        merges: output folders, or configurations, which are merged and thrown away.
        config: a configuration to take models and data from, instead of the first one's.
        rows: which rows are scored.
        options: how models are loaded.
        resources: device and memory.
        length: tokens that language models write.
        quiet: no progress bars.

    Returns:
        One for each merge, in their order; `sentence` says it in words, `as_dict()` in numbers.

    Raises:
        PaveError: no merge, an unfinished one, or merges of different models.
    """
    paths = [Path(path) for path in merges]
    named = read_recipe(Path(config)) if config else None
    targets = [_target(path, named) for path in paths]
    targets = [replace(target, name=_name(i, targets)) for i, target in enumerate(targets)]
    first = named or targets[0].recipe
    for path, target in zip(paths, targets, strict=True):
        same_merge(first, target.recipe, path)
    try:
        bench = bench_of(first, rows, options, resources, quiet)
    except PaveError as error:
        lost = [name for name in map(str, first.config.referenced_models())
                if "/" not in name and not Path(name).exists()]
        if named or not lost:
            raise
        raise PaveError(
            f"{error} Where {lost[0]} was a local folder, whose path `card` takes out of a merge, "
            "name the merge's own configuration with --config.") from error
    return [_result(bench, target, options, length) for target in targets]


def _target(path: Path, named: Recipe | None) -> Target:
    bare = path.is_dir() and not (path / CONFIGURATION).is_file()
    recipe = named if named and bare else read_recipe(path)
    if not path.is_dir():
        return Target(path.stem, recipe, None)
    check_finished(path)
    if (path / FOLDER).is_dir():
        raise PaveError(
            f"{path} holds weights that all tasks share, with masks for each: write a task's "
            "model with `mergekit-pave materialize`, and evaluate that.")
    return Target(path.resolve().name, recipe, path)


def _name(i: int, targets: Sequence[Target]) -> str:
    """A folder's own name; with its parent's where another one is called the same."""
    names = [target.name for target in targets]
    if names.count(names[i]) == 1:
        return names[i]
    folder = targets[i].folder
    return str(folder) if folder else f"{names[i]} ({names[: i + 1].count(names[i])})"


def _result(bench: Bench, target: Target, options: LoaderOptions, length: int) -> Result:
    if target.folder is not None:
        source = _source(bench, target.folder, target.name)
        kind, kinds = source.config().model_type, [t.source.config().model_type
                                                   for t in bench.tasks]
        if kind not in kinds:
            raise PaveError(
                f"{target.folder} is a model of type {kind} and {bench.tasks[0].label} of type "
                f"{kinds[0]}; evaluate it with its own configuration.")
        return _made(bench, target, bench.of(source), list(written(bench, source, length)))
    about = [length, FORMAT, target.recipe.raw, [task.rows.digest for task in bench.asked],
             [bench.identity(task.source) for task in bench.asked]]
    if (kept := read_kept(address(about))) is None:
        make_folder(evaluation_cache())
        with scratch(evaluation_cache()) as folder:
            merge_to(target.recipe.raw, folder / "merge", options, str(bench.resources.device))
            source = _source(bench, folder / "merge", target.name)
            scores = bench.fresh(source, range(len(bench.asked)))
            kept = {"scores": plain(scores), "written": list(written(bench, source, length))}
        write_kept(address(about), kept)
    return _made(bench, target, arrays(kept["scores"]), [tuple(w) for w in kept["written"]])


def _source(bench: Bench, folder: Path, name: str) -> ModelSource:
    trust = bench.tasks[0].source.trust_remote_code
    return ModelSource(str(folder), name, str(folder), trust_remote_code=trust)


def _made(
    bench: Bench, target: Target, scores: list[Scores], texts: list[tuple[str, str, str]]
) -> Result:
    found, count = verdicts(bench, scores), len(bench.tasks)
    return Result(target, found[:count], found[count] if len(found) > count else None, texts)
