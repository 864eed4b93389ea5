"""The evaluation in a model card: a section for people, `model-index` metadata for the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.verdict import NAMES, OfTask, sentence, table
from mergekit_pave.storage.files import write_atomically

CARD = "README.md"
# Tells our entries of `model-index` from the user's own.
DATASET = "held-out"
BEGIN = "<!-- mergekit-pave evaluation: begin -->"
END = "<!-- mergekit-pave evaluation: end -->"


def write_evaluation(
    folder: Path, of_tasks: Sequence[OfTask], general: OfTask | None
) -> None:
    """Put the evaluation into the card of a merged model; a second time replaces the first.

    Raises:
        PaveError: the folder has no card, or a broken one.
    """
    path = folder / CARD
    try:
        card = ModelCard(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PaveError(f"{folder} has no {CARD}: it was merged with --no-write-model-card.") \
            from None
    except Exception as error:  # whatever a YAML parser has to say of a card's head
        raise PaveError(f"The metadata of {path} is broken ({error}); repair it.") from error
    everything = [*of_tasks, *([general] if general else [])]
    data: Any = card.data  # its attributes are the keys of the card
    others = [r for r in data.eval_results or [] if r.dataset_type != DATASET]
    data.eval_results = others + [r for task in everything for r in _results(task)]
    data.model_name = data.model_name or folder.resolve().name
    block = f"{BEGIN}\n{_section(of_tasks, general)}\n{END}"
    old = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if old.search(card.text):
        card.text = old.sub(lambda _: block, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{block}\n"
    text = str(card)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


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


def _section(of_tasks: Sequence[OfTask], general: OfTask | None) -> str:
    lines = table({"merge": [*of_tasks, *([general] if general else [])]})
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 2)]
    shown = "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
        for line in [lines[0], rule, *lines[1:]])
    rows = ", ".join(f"{task.rows} of {task.label}" for task in of_tasks)
    return (
        f"## Evaluation\n\n{sentence(of_tasks, general)}\n\n{shown}\n\n"
        f"Measured without labels on held-out rows ({rows}) by `mergekit-pave evaluate`; 95 % "
        "intervals by bootstrap over rows.")
