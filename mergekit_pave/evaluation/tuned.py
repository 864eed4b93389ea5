"""From a configuration and a budget to a tuned configuration."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergekit_pave.calibration.load import Resources
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.intervals import Interval
from mergekit_pave.evaluation.objective import objective
from mergekit_pave.evaluation.setup import RowOptions, bench_of, read_recipe
from mergekit_pave.evaluation.space import Raw, Space, space_of
from mergekit_pave.evaluation.tune import Budget, Trial, Tuner, gain
from mergekit_pave.evaluation.verdict import doubt
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.files import make_folder, scratch, write_text

DEFAULT_BUDGET = "10"


@dataclass(frozen=True)
class Tuned:
    """What a search found: the best candidate of all, of each method, and all of them."""

    best: Trial
    of_methods: dict[str, Trial]
    tuner: Tuner
    text: str


def parse_budget(text: str) -> Budget:
    """`12` merges, or `30m` or `30 minutes`.

    Raises:
        PaveError: neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|minutes?)?", text.strip().lower())
    if not found or not float(found[1]) or (not found[2] and "." in found[1]):
        raise PaveError(
            f"--budget must be a number of merges, or of minutes such as 30m; got {text!r}.")
    return Budget(seconds=60 * float(found[1])) if found[2] else Budget(merges=int(found[1]))


def tune(
    config: Path | str | Raw, out: Path | str, budget: Budget | str = DEFAULT_BUDGET,
    methods: Sequence[str] = (), *,
    rows: RowOptions = RowOptions(), options: LoaderOptions = LoaderOptions(),
    resources: Resources = Resources(),
    say: Callable[[str], None] = lambda text: None, quiet: bool = False,
) -> Tuned:
    """Search a configuration's strength and second parameters, and write the best one to `out`.

    Args:
        config: its file, or what its YAML reads as.
        out: file of the tuned one; candidates are merged into a folder beside it.
        budget: merges or minutes, shared equally by the methods, as `--budget` takes it.
        methods: to compare; by default the configuration's own.
        rows: which rows candidates are scored on.
        options: how models are loaded.
        resources: device and memory.
        say: called with one line for each step.
        quiet: no progress bars.

    Raises:
        PaveError: nothing that could be tuned, no rows, a budget too small, a full disk.
    """
    recipe = read_recipe(Path(config)) if isinstance(config, (str, Path)) else None
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    out = Path(out)
    raw: Any = recipe.raw if recipe else config
    spaces = [space_of(raw, name) for name in methods] or [space_of(raw)]
    _refuse_small(budget, spaces)
    draws = any(e.calibrated for space in spaces for e in Recipe.of(space.raw).inputs)
    # Rows come from the data that the given configuration names, for all methods.
    bench = bench_of(recipe or Recipe.of(raw), replace(rows, drawn=draws, general=None), options,
                     resources, quiet)
    _say_cost(bench, spaces, budget, out, say)
    aim = objective(bench)
    for task, expert, known in zip(bench.tasks, aim.experts, aim.bases, strict=True):
        if warning := doubt(task.label, task.kind, expert, known):
            say(f"Warning: {warning}")
    # The budget is for merges: base and experts have to be scored whatever it is.
    budget.begun = time.monotonic()
    make_folder(out.absolute().parent)
    with scratch(out.absolute().parent) as folder:
        tuner, found = Tuner(bench, aim, folder, options, say), {}
        for i, space in enumerate(spaces):
            share = budget.share(len(spaces) - i)
            if (best := tuner.search(space, share)) is not None:
                found[space.method] = best
            budget.spent += share.spent
    best = tuner.best
    text = _header(tuner, best, found) + yaml.safe_dump(best.raw, sort_keys=False)
    write_text(out, text)
    return Tuned(best, found, tuner, text)


def _refuse_small(budget: Budget, spaces: Sequence[Space]) -> None:
    if budget.merges is None:
        return
    least = max(2 if space.affine else 1 for space in spaces) + 1
    if budget.merges // len(spaces) < least:
        raise PaveError(
            f"A budget of {budget.merges} merges is too small: {len(spaces)} "
            f"{'method needs' if len(spaces) == 1 else 'methods need'} at least "
            f"{least * len(spaces)}.")


def _say_cost(
    bench: Bench, spaces: Sequence[Space], budget: Budget, out: Path, say: Callable[[str], None]
) -> None:
    """What it will cost; refuses a disk that is too full before anything is merged."""
    rows = sum(len(task.rows.items) for task in bench.tasks)
    tokens = sum(task.rows.tokens for task in bench.tasks)
    size = sum(f.stat().st_size for f in Path(bench.tasks[0].source.path).glob("*.safetensors"))
    size = size or sum(
        f.stat().st_size for f in Path(bench.tasks[0].source.path).glob("*.bin"))
    copies = 3 if any(space.affine for space in spaces) else 1
    say(f"Tuning {', '.join(space.method for space in spaces)} within {budget}; a candidate is "
        f"scored on {rows} held-out rows ({tokens:,} tokens) of {len(bench.tasks)} models; "
        f"{copies * size / 1e9:.1f} GB of disk are used beside {out.name} meanwhile. "
        "Base and experts are scored first.")
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < copies * size:
        raise PaveError(
            f"{parent} has {free / 1e9:.1f} GB free, and the merges that are looked at need "
            f"{copies * size / 1e9:.1f} GB; name an output on another disk.")


def _header(tuner: Tuner, best: Trial, found: dict[str, Trial]) -> str:
    """How the values were found, as comments."""
    rows = [len(task.rows.items) for task in tuner.bench.tasks]
    interval = tuner.objective.interval(best.scores)
    lines = [
        f"Tuned by mergekit-pave {version('mergekit-pave')}, without labels, on {sum(rows)} "
        "held-out rows:",
        f"{best.words}: keeps {_percent(interval.value)} ({_percent(interval.low)} to "
        f"{_percent(interval.high)}) of what the experts learned.{_warning(best, interval)}",
        f"The best of {len(tuner.trials)} candidates in "
        f"{len(tuner.needed)} merges.",
    ]
    start = tuner.trials[0]
    if start is not best:
        more = gain(tuner, best, start)
        lines.append(
            f"As it was given ({start.words}): {_percent(start.value)}, "
            f"{_points(more.value)} ({_points(more.low)} to {_points(more.high)}) less.")
    lines += [f"Best of {name}: {trial.words}: {_percent(trial.value)}."
              for name, trial in found.items() if len(found) > 1]
    return "".join(f"# {line}\n" for line in lines)


def _warning(best: Trial, found: Interval) -> str:
    """What to say of a merge that is not measurably better than the base."""
    if found.high < 0:
        return " It is worse than the base on these rows; use the base itself."
    if best.values.get("lambda") == 0:
        return " No strength is better than the base, which lambda 0 gives."
    return "" if found.low > 0 else " That is not measurably better than the base."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
