"""A merge's models on their held-out rows: base, experts and whatever merge is asked about.

One model is in memory at a time. Row scores are cached by content: weights, rows and expert.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    _experts: dict[int, tuple[Reference, dict[str, Tensor] | None]] = field(default_factory=dict)

    @property
    def asked(self) -> list[Task]:
        """All tasks, the general rows last."""
        return [*self.tasks, *([self.general] if self.general else [])]

    def experts(self) -> list[Scores]:
        """What every expert scores on its own rows."""
        return [self.of(task.source, [i])[0] for i, task in enumerate(self.asked)]

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
            write_kept(keys[i], plain([scores])[0])
            found[i] = scores
        return [found[i] for i in keys]

    def fresh(
        self, source: ModelSource, which: Sequence[int], part: slice = slice(None)
    ) -> list[Scores]:
        """Score a model on some tasks, or on a part of their rows, without the cache."""
        new = [i for i in which if i not in self._experts]
        for i in self._bar(new, "Running experts") if new else ():
            self._expert(i)
        shared = [i for i in which if self.asked[i].kind != "classifier"]
        found: dict[int, Scores] = {}
        if shared:
            with opened(source, self.resources) as model:
                for i in self._bar(shared, f"Scoring {source.label}"):
                    found[i] = self._score(model, i, part)
        headed = [i for i in which if i not in found]
        for i in self._bar(headed, f"Scoring {source.label}") if headed else ():
            # Every expert has a head of its own, perhaps with other classes.
            task, head = self.asked[i], self._expert(i)[1]
            with opened(source, self.resources, task.source.config(), head) as model:
                found[i] = self._score(model, i, part)
        return [found[i] for i in which]

    def _score(self, model: PreTrainedModel, i: int, part: slice) -> Scores:
        task, (said, _) = self.asked[i], self._expert(i)
        labels = task.rows.labels
        try:
            return score(model, task.kind, task.rows.items[part], said[part],
                         None if labels is None else labels[part])
        except PaveError as error:
            raise PaveError(f"{task.label}: {error}") from error

    def _bar(self, which: Sequence[int], what: str) -> tqdm:
        return tqdm(which, desc=what, unit="task", disable=self.quiet)

    def _expert(self, i: int) -> tuple[Reference, dict[str, Tensor] | None]:
        """What an expert says about its rows, and its head; run once, then kept."""
        if i not in self._experts:
            task = self.asked[i]
            with opened(task.source, self.resources) as model:
                head = head_of(model) if task.kind == "classifier" else None
                self._experts[i] = (reference(model, task.kind, task.rows.items), head)
        return self._experts[i]

    def identity(self, source: ModelSource) -> str:
        """sha256 of a model's weights and settings, computed once."""
        if source.path not in self._identities:
            self._identities[source.path] = source.identity()
        return self._identities[source.path]

    def _key(self, source: ModelSource, i: int) -> str:
        task = self.asked[i]
        return address([FORMAT, self.identity(source), self.identity(task.source), task.kind,
                        task.rows.digest, str(self.resources.device.type)])
