"""From row scores to what a person reads: shares kept, a table, a sentence, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_pave.evaluation.bench import Bench
from mergekit_pave.evaluation.intervals import Interval, interval
from mergekit_pave.evaluation.scores import Kind, Scores, measures

NAMES = {
    "loss": "token loss", "kl": "KL from expert", "agreement": "agreement",
    "accuracy": "accuracy", "distance": "distance from expert",
}


@dataclass(frozen=True)
class OfTask:
    """One merge on one task.

    Attributes:
        label: the expert's public name.
        kind: of the expert.
        rows: how many were scored.
        origin: where they come from.
        expert, base, merge: row scores; `base` is `None` where the merge has no base.
    """

    label: str
    kind: Kind
    rows: int
    origin: str
    expert: Scores
    base: Scores | None
    merge: Scores

    @property
    def measure(self) -> str | None:
        """The score that `kept` is a share of; `None` without a base, or where it is no better
        than its expert by any.

        A language model's loss, where the expert's is measurably below the base's on these rows;
        else, as for all others, how far it is from the expert.
        """
        return None if self.base is None else measure(self.kind, self.expert, self.base)

    @property
    def kept(self) -> Interval | None:
        """Share of what the expert learned that the merge keeps: 1 as the expert, 0 as the base.

        `(base - merge) / (base - expert)` of the means of the score that `measure` names.
        """
        name = self.measure
        if name is None or self.base is None:
            return None
        return kept(name, self.expert, self.base, self.merge)

    @property
    def worse(self) -> Interval:
        """By what share the merge's primary score is above the base's; for rows of no task."""
        name = measures(self.kind)[0]
        if self.kind == "language" and self.base is not None:
            return interval(lambda m, b: m / b - 1, [self.merge[name], self.base[name]])
        # For encoders and classifiers the base itself is the expert on general rows, at distance 0.
        return interval(lambda m: m, [self.merge[name]])


def measure(kind: Kind, expert: Scores, base: Scores) -> str | None:
    """The first score of `measures(kind)` by which the expert is measurably better."""
    for name in measures(kind):
        if interval(lambda b, e: b - e, [base[name], expert[name]]).low > 0:
            return name
    return None


def doubt(label: str, kind: Kind, expert: Scores, base: Scores | None) -> str | None:
    """What to say where a language model's expert is no better than the base on its own rows."""
    if kind != "language" or base is None or measure(kind, expert, base) == "loss":
        return None
    return (
        f"on the rows of {label} the expert (token loss {expert['loss'].mean():.4g}) is not "
        f"measurably better than the base ({base['loss'].mean():.4g}): they are probably not its "
        "task, or not written as it was trained; what is kept then says only how much the merge "
        "answers as the expert does.")


def kept(name: str, expert: Scores, base: Scores, merge: Scores) -> Interval:
    """`(base - merge) / (base - expert)` of the means of one score, with its interval."""
    return interval(
        lambda b, m, e: (b - m) / (b - e), [base[name], merge[name], expert[name]])


def verdicts(bench: Bench, merge: Sequence[Scores]) -> list[OfTask]:
    """One for each task of the bench, the general rows last."""
    bases: Sequence[Scores | None] = bench.bases() or [None] * len(bench.asked)
    return [
        OfTask(task.label, task.kind, len(task.rows.items), task.rows.origin, expert, base, scores)
        for task, expert, base, scores in zip(
            bench.asked, bench.experts(), bases, merge, strict=True)
    ]


def sentence(of_tasks: Sequence[OfTask], general: OfTask | None) -> str:
    """What the merge keeps of every expert, and what it costs elsewhere."""
    parts = []
    for task in of_tasks:
        share = task.kept
        if share is None:
            parts.append(f"{task.label} shows nothing that it has learned on these rows")
        elif share.high < 0:
            parts.append(f"worse than the base on the rows of {task.label}")
        else:
            what = f"{share.value:.0%} of what {task.label} learned".replace("%", " %")
            parts.append(what if not parts else what.replace(" what", "").replace(" learned", ""))
    told = "Keeps " + ", ".join(parts)
    if not any(task.kept is not None and task.kept.high >= 0 for task in of_tasks):
        told = "; ".join(parts)
        told = told[:1].upper() + told[1:]
    if general is not None:
        told += "; " + _general(general)
    return told + "."


def _general(general: OfTask) -> str:
    change = general.worse
    if general.kind != "language":
        return f"moves {change.value:.1%} away from the base on general rows".replace("%", " %")
    if change.low <= 0 <= change.high:
        return "no measurable change on general text"
    verb = "loses" if change.value > 0 else "gains"
    return f"{verb} {abs(change.value):.1%} on general text".replace("%", " %")


def table(named: Mapping[str, Sequence[OfTask]]) -> list[list[str]]:
    """Head and rows: every task and score, with base, expert and all merges side by side."""
    lines = [["rows of", "score", "base", "expert", *named]]
    for group in zip(*named.values(), strict=True):
        first = group[0]
        for name in first.expert:
            values = [None if first.base is None else first.base[name], first.expert[name]]
            values += [task.merge[name] for task in group]
            if name == "accuracy" or name in first.merge:
                lines.append([first.label, NAMES[name], *map(_mean, values)])
        shares = [task.kept for task in group]
        if any(shares):
            name = f"kept ({NAMES[first.measure]})"
            lines.append([first.label, name, "0 %", "100 %", *map(_share, shares)])
    return lines


def _mean(values: np.ndarray | None) -> str:
    return "-" if values is None else f"{values.mean():.4g}"


def _share(share: Interval | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def printed(lines: Sequence[Sequence[str]]) -> str:
    """A table for the screen: columns aligned, a task's name once."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown, last = [], None
    for line in lines:
        first = "" if line[0] == last else line[0]
        last = line[0]
        cells = [first.ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def as_dict(of_tasks: Sequence[OfTask], general: OfTask | None) -> dict[str, Any]:
    """Sentence, scores and shares as plain values, for JSON."""
    return {
        "sentence": sentence(of_tasks, general),
        "tasks": [_task(task) for task in of_tasks],
        "general": None if general is None else {
            **_task(general), "worse": vars(general.worse)},
    }


def _task(task: OfTask) -> dict[str, Any]:
    def means(scores: Scores | None) -> dict[str, float] | None:
        if scores is None:
            return None
        return {name: float(values.mean()) for name, values in scores.items()}

    return {
        "model": task.label, "kind": task.kind, "rows": task.rows, "data": task.origin,
        "base": means(task.base), "expert": means(task.expert), "merge": means(task.merge),
        "kept": None if task.kept is None else vars(task.kept),
    }
