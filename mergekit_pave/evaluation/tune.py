"""`mergekit-pave tune`: the strength of a merge and the parameters that matter, without labels.

Every candidate is merged the stock way and scored on rows that calibration does not draw. What is
scored is kept by content, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.intervals import Interval
from mergekit_pave.evaluation.kept import FORMAT, address, arrays, plain, read_kept, write_kept
from mergekit_pave.evaluation.merging import SEED, merge_to, writing
from mergekit_pave.evaluation.objective import Objective
from mergekit_pave.evaluation.scores import Scores
from mergekit_pave.evaluation.search import line
from mergekit_pave.evaluation.space import Raw, Space, Values
from mergekit_pave.evaluation.strengths import at_strength
from mergekit_pave.models.source import LoaderOptions, ModelSource


@dataclass
class Budget:
    """What a search may spend: merges, or seconds.

    Attributes:
        merges: how many, `None` for no limit.
        seconds: of this run, `None` for no limit.
    """

    merges: int | None = None
    seconds: float | None = None
    spent: int = 0
    begun: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        limits = [f"{self.merges} merges"] if self.merges is not None else []
        limits += [f"{self.seconds / 60:g} minutes"] if self.seconds is not None else []
        return " and ".join(limits)

    def allows(self, merges: int) -> bool:
        """Whether so many further merges may be made; minutes always allow the first ones."""
        if self.seconds is not None and self.spent and time.monotonic() - self.begun > self.seconds:
            return False
        return self.merges is None or self.spent + merges <= self.merges

    def share(self, parts: int) -> Budget:
        """One of several equal parts of what is left, beginning now."""
        left = None if self.seconds is None else self.seconds - (time.monotonic() - self.begun)
        merges = None if self.merges is None else (self.merges - self.spent) // parts
        return Budget(merges, None if left is None else max(left, 0) / parts)


@dataclass(frozen=True)
class Trial:
    """A candidate that was scored.

    Attributes:
        space: of its method.
        values: what it sets.
        scores: of every task, on all rows or, where it was stopped early, on the first ones.
        value: share kept on average; of one that was stopped, the best one's value plus the
            difference to it on the rows that both have.
        stopped: whether it was stopped early.
    """

    space: Space
    values: Values
    scores: list[Scores]
    value: float
    stopped: bool

    @property
    def raw(self) -> Raw:
        """Its merge configuration."""
        return self.space.with_values(self.values)

    @property
    def words(self) -> str:
        """Its method and values, for a person."""
        return _words(self.space, self.values)


@dataclass
class Tuner:
    """A search over one or several methods.

    Attributes:
        bench: what candidates are scored on.
        objective: what they are compared by.
        folder: where merges lie while they are looked at.
        options: how models are loaded.
        say: called with one line for each candidate.
        trials: all candidates so far.
        needed: addresses of the merges that they are made of, those known before among them.
    """

    bench: Bench
    objective: Objective
    folder: Path
    options: LoaderOptions
    say: Callable[[str], None] = lambda text: None
    trials: list[Trial] = field(default_factory=list)
    needed: set[str] = field(default_factory=set)
    merged: int = 0
    _made: dict[str, Path] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The best candidate so far that was scored on all rows."""
        return max((t for t in self.trials if not t.stopped), key=lambda t: t.value)

    def search(self, space: Space, budget: Budget) -> Trial | None:
        """Try one method: its strength, then each second parameter at the best strength.

        Returns:
            The best candidate of the method; `None` where the budget allows none.
        """
        own, key_of_strength = len(self.trials), space.strength

        def look(values: Values, strength: float | None) -> float | None:
            if key_of_strength is not None and strength is not None:
                values = {**values, key_of_strength: strength}
            trial = self._trial(space, values, budget)
            return None if trial is None else trial.value

        first = {k: v for k, v in space.present.items() if v is not None}
        if space.centre is None:
            look(first, None)
        else:
            # One merge serves a whole line of strengths, or every point of it costs one.
            points = 4 if space.affine else 3
            line(partial(look, first), space.centre, space.start, points)
        for key, grid in space.second.items():
            for candidate in grid[1:]:
                if (best := _best(self.trials[own:])) is None:
                    return None
                values = {**best.values, key: candidate}
                at = values.pop(key_of_strength, None) if key_of_strength else None
                if space.affine and at is not None:
                    line(partial(look, values), at, None, 1)
                else:
                    look(values, at)
        if space.affine and (best := _best(self.trials[own:])) and best.value < 0:
            # All are worse than the base, which the merge at strength 0 is; it is there already.
            self._trial(space, {**first, "lambda": 0.0}, Budget())
        self._forget()
        return _best(self.trials[own:])

    def _trial(self, space: Space, values: Values, budget: Budget) -> Trial | None:
        needed = self._needed(space, values)
        if not budget.allows(len(needed - self.needed)):
            return None
        budget.spent += len(needed - self.needed)
        self.needed |= needed
        name = address([FORMAT, SEED, space.with_values(values), self._about()])
        kept = read_kept(name)
        if kept is None:
            self.say(f"{_words(space, values)}: ...")
            scores, stopped = self._scored(space, values)
            write_kept(name, {"scores": plain(scores), "stopped": stopped})
        else:
            scores, stopped = arrays(kept["scores"]), kept["stopped"]
        trial = Trial(space, dict(values), scores, self._value(scores, stopped), stopped)
        self.trials.append(trial)
        self._tell(trial, kept is not None)
        return trial

    def _about(self) -> list[Any]:
        bench = self.bench
        tasks: list[Any] = [[bench.identity(t.source), t.rows.digest] for t in bench.tasks]
        return tasks + [bench.identity(bench.base)] if bench.base else tasks

    def _value(self, scores: Sequence[Scores], stopped: bool) -> float:
        if not stopped or not self.trials:
            return self.objective.value(scores)
        return self.best.value + self.objective.difference(scores, self.best.scores).value

    def _tell(self, trial: Trial, known: bool) -> None:
        what = f"keeps {trial.value:.1%}".replace("%", " %")
        what += ", stopped early" if trial.stopped else ""
        self.say(f"{trial.words}: {what}" + (" (known)" if known else ""))

    def _needed(self, space: Space, values: Values) -> set[str]:
        return {address(raw) for raw in self._merges(space, values)}

    def _merges(self, space: Space, values: Values) -> list[Raw]:
        """The configurations that have to be merged for a candidate."""
        if not space.affine:
            return [space.with_values(values)]
        # At strength 0 no second parameter has anything to act on.
        zero = space.with_values({**space.present, "lambda": 0.0})
        one = [space.with_values({**values, "lambda": 1.0})] if values["lambda"] else []
        return [zero, *one]

    def _scored(self, space: Space, values: Values) -> tuple[list[Scores], bool]:
        """Row scores of a candidate, and whether it was stopped after the first third."""
        merges = [self._merge(raw) for raw in self._merges(space, values)]
        if len(merges) == 1 or values["lambda"] == 1:
            folder = merges[-1]
        else:
            folder = self.folder / "strength"
            shutil.rmtree(folder, ignore_errors=True)
            with writing(folder):
                at_strength(merges[0], merges[1], values["lambda"], folder)
        trust = self.bench.tasks[0].source.trust_remote_code
        source = ModelSource(str(folder), "candidate", str(folder), trust_remote_code=trust)
        try:
            return self._looked_at(source)
        finally:
            if not space.affine:
                self._drop(folder)

    def _looked_at(self, source: ModelSource) -> tuple[list[Scores], bool]:
        which = range(len(self.bench.tasks))
        rows = max(len(task.rows.items) for task in self.bench.tasks)
        third = rows // 3
        if not self.trials or third < 5:
            return self.bench.fresh(source, which), False
        first = self.bench.fresh(source, which, slice(0, third))
        if self.objective.difference(first, self.best.scores).high < 0:
            return first, True
        rest = self.bench.fresh(source, which, slice(third, None))
        return [{n: _joined(a[n], b.get(n)) for n in a}
                for a, b in zip(first, rest, strict=True)], False

    def _merge(self, raw: Raw) -> Path:
        """The folder of a merge, made unless it is there."""
        name = address(raw)
        if name not in self._made:
            if len(self._made) > 1:  # the merge at strength 0 is the first one, and stays
                self._drop(list(self._made.values())[-1])
            folder = self.folder / name[:16]
            merge_to(raw, folder, self.options, str(self.bench.resources.device))
            self._made[name] = folder
            self.merged += 1
        return self._made[name]

    def _drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._made = {name: path for name, path in self._made.items() if path != folder}

    def _forget(self) -> None:
        for folder in list(self._made.values()):
            self._drop(folder)


def _words(space: Space, values: Values) -> str:
    shown = (f"{k} {'default' if v is None else f'{v:g}'}" for k, v in values.items())
    return " ".join([space.method, *shown])


def _joined(first: np.ndarray, rest: np.ndarray | None) -> np.ndarray:
    return first if rest is None else np.concatenate([first, rest])


def _best(trials: Sequence[Trial]) -> Trial | None:
    """The best of some candidates; one that was stopped early only where all were."""
    whole = [t for t in trials if not t.stopped] or list(trials)
    return max(whole, key=lambda t: t.value, default=None)


def gain(tuner: Tuner, best: Trial, start: Trial) -> Interval:
    """By how much the best candidate keeps more than the configuration as it was given."""
    return tuner.objective.difference(best.scores, start.scores)
