"""The evaluation in a model card: a section for people, `model-index` metadata for the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.verdict import NAMES, OfTask, sentence
from mergekit_pave.evaluation.verdict import table as rows_of
from mergekit_pave.publish.markdown import CARD, parsed_card, rendered, table, with_block
from mergekit_pave.storage.files import write_text

# Tells our entries of `model-index` from the user's own.
DATASET = "held-out"
BLOCK = "mergekit-pave evaluation"


def write_evaluation(
    folder: Path, of_tasks: Sequence[OfTask], general: OfTask | None
) -> None:
    """Put the evaluation into the card of a merged model; a second time replaces the first.

    Raises:
        PaveError: the folder has no card, or a broken one.
    """
    path = folder / CARD
    if not path.is_file():
        raise PaveError(f"{folder} has no {CARD}: it was merged with --no-write-model-card.")
    card = parsed_card(path, path.read_text("utf-8"))
    everything = [*of_tasks, *([general] if general else [])]
    data: Any = card.data  # its attributes are the keys of the card
    others = [r for r in data.eval_results or [] if r.dataset_type != DATASET]
    data.eval_results = others + [r for task in everything for r in _results(task)]
    data.model_name = data.model_name or folder.resolve().name
    card.text = with_block(card.text, BLOCK, rendered(
        "evaluation.md", sentence=sentence(of_tasks, general), tasks=of_tasks,
        scores=table(rows_of({"merge": everything}), 2)))
    write_text(path, str(card))


_TASK_TYPES = {
    "language": "text-generation", "classifier": "text-classification",
    "encoder": "feature-extraction",
}


def _results(task: OfTask) -> list[EvalResult]:
    """One entry of `model-index` for each score of the merge."""
    return [
        EvalResult(
            task_type=_TASK_TYPES[task.kind], dataset_type=DATASET,
            dataset_name=f"{DATASET} rows: {task.origin}", metric_type=name,
            metric_name=f"{NAMES[name]}, {task.label}",
            metric_value=round(float(values.mean()), 6))
        for name, values in task.merge.items()
    ]
