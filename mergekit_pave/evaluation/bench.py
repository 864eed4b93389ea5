"""A merge's models on their held-out rows: base, experts and whatever merge is asked about.

One model is in memory at a time. Row scores are cached by content: weights, rows and expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_pave.calibration.load import Resources
from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.held_out import HeldOut
from mergekit_pave.evaluation.kept import FORMAT, address, arrays, plain, read_kept, write_kept
from mergekit_pave.evaluation.models import opened
from mergekit_pave.evaluation.scores import Kind, Reference, Scores, head_of, reference, score
from mergekit_pave.models.source import ModelSource


@dataclass(frozen=True)
class Task:
    """What one expert is asked: its held-out rows.

    Attributes:
        label: the expert's public name.
        source: its weights; those of the base for rows of no task.
        kind: what kind of model it is.
        rows: what it is evaluated on.
    """

    label: str
    source: ModelSource
    kind: Kind
    rows: HeldOut


@dataclass(frozen=True)
class Expert:
    """What an expert says about its rows, what it scores on them, and a classifier's head."""

    said: Reference
    own: Scores
    head: dict[str, Tensor] | None


@dataclass
class Bench:
    """Scores of models on all tasks.

    Attributes:
        tasks: one for each expert, in the order of the configuration.
        base: the model that they were fine-tuned from, where the merge has one.
        general: rows of no task, which the base itself answers as the expert.
        resources: device and memory of forward passes.
        quiet: no progress bars.
    """

    tasks: Sequence[Task]
    base: ModelSource | None
    general: Task | None = None
    resources: Resources = field(default_factory=Resources)
    quiet: bool = False
    _identities: dict[str, str] = field(default_factory=dict)
    # Of their files at that time: scores of others are not to be kept under those names.
    _stamps: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    _experts: dict[int, Expert] = field(default_factory=dict)

    @property
    def asked(self) -> list[Task]:
        """All tasks, the general rows last."""
        return [*self.tasks, *([self.general] if self.general else [])]

    def experts(self) -> list[Scores]:
        """What every expert scores on its own rows."""
        found: list[Scores] = []
        for i, task in enumerate(self.asked):
            key = self._key(task.source, i)
            if (kept := read_kept(key)) is None:
                self._run_experts([i])
                task.source.refuse_changed(self._stamps[task.source.path])
                kept = plain([self._experts[i].own])[0]
                write_kept(key, kept)
            found += arrays([kept])
        return found

    def bases(self) -> list[Scores] | None:
        """What the base scores on every task's rows; `None` without a base."""
        return None if self.base is None else self.of(self.base)

    def of(self, source: ModelSource, which: Sequence[int] | None = None) -> list[Scores]:
        """What a model scores on the rows of some tasks, or of all; kept by content."""
        asked = range(len(self.asked)) if which is None else which
        keys = {i: self._key(source, i) for i in asked}
        found = {i: arrays([kept])[0] for i, key in keys.items()
                 if (kept := read_kept(key)) is not None}
        missing = [i for i in keys if i not in found]
        for i, scores in zip(missing, self.fresh(source, missing), strict=True):
            for read in (source, self.asked[i].source):
                read.refuse_changed(self._stamps[read.path])
            write_kept(keys[i], plain([scores])[0])
            found[i] = scores
        return [found[i] for i in keys]

    def fresh(
        self, source: ModelSource, which: Sequence[int], part: slice = slice(None)
    ) -> list[Scores]:
        """Score a model on some tasks, or on a part of their rows, without the cache."""
        self._run_experts(which)
        shared = [i for i in which if self.asked[i].kind != "classifier"]
        found: dict[int, Scores] = {}
        if shared:
            with opened(source, self.resources) as model, self._bar(source, shared, part) as bar:
                for i in shared:
                    found[i] = self._score(model, i, part, bar)
        headed = [i for i in which if i not in found]
        if headed:
            with self._bar(source, headed, part) as bar:
                for i in headed:
                    # Every expert has a head of its own, perhaps with other classes.
                    task, head = self.asked[i], self._experts[i].head
                    with opened(source, self.resources, task.source.config(), head) as model:
                        found[i] = self._score(model, i, part, bar)
        return [found[i] for i in which]

    def _score(self, model: PreTrainedModel, i: int, part: slice, bar: tqdm) -> Scores:
        task, said = self.asked[i], self._experts[i].said
        labels = task.rows.labels
        with _naming(task):
            return score(model, task.kind, task.rows.items[part], said[part],
                         None if labels is None else labels[part], bar.update)

    def _run_experts(self, which: Sequence[int]) -> None:
        """Have experts say what they say about their rows; each is run once."""
        for i in which:
            if i in self._experts:
                continue
            task = self.asked[i]
            with opened(task.source, self.resources) as model, _naming(task), \
                    self._bar(task.source, [i]) as bar:
                head = head_of(model) if task.kind == "classifier" else None
                said, own = reference(
                    model, task.kind, task.rows.items, task.rows.labels, bar.update)
            self._experts[i] = Expert(said, own, head)

    def _bar(
        self, source: ModelSource, which: Sequence[int], part: slice = slice(None)
    ) -> tqdm:
        rows = sum(len(self.asked[i].rows.items[part]) for i in which)
        return tqdm(total=rows, desc=f"Scoring {source.label}", unit="row", leave=False,
                    disable=self.quiet)

    def identity(self, source: ModelSource) -> str:
        """sha256 of a model's weights and settings, computed once."""
        if source.path not in self._identities:
            self._stamps[source.path] = source.stamp()
            self._identities[source.path] = source.identity()
        return self._identities[source.path]

    def _key(self, source: ModelSource, i: int) -> str:
        task = self.asked[i]
        return address([FORMAT, self.identity(source), self.identity(task.source), task.kind,
                        task.rows.digest, str(self.resources.device.type)])


@contextmanager
def _naming(task: Task) -> Iterator[None]:
    try:
        yield
    except PaveError as error:
        raise PaveError(f"{task.label}: {error}") from error
