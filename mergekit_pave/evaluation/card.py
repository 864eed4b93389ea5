"""The evaluation in a model card: a section for people, `model-index` metadata for the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from mergekit_pave.errors import PaveError
from mergekit_pave.evaluation.verdict import OfTask, sentence, table
from mergekit_pave.storage.files import write_atomically

CARD = "README.md"
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
    data = card.data.to_dict()
    data["model-index"] = _index(folder, everything)
    block = f"{BEGIN}\n{_section(of_tasks, general)}\n{END}"
    old = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    body = card.text
    body = old.sub(lambda _: block, body, count=1) if old.search(body) else (
        f"{body.rstrip()}\n\n{block}\n")
    card.text = body
    card.data = type(card.data)(**data, ignore_metadata_errors=True) if data else card.data
    text = str(card)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _index(folder: Path, of_tasks: Sequence[OfTask]) -> list[dict]:
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation" if task.kind == "language" else "feature-extraction"
            if task.kind == "encoder" else "text-classification",
            dataset_type="held-out", dataset_name=f"held-out rows: {task.origin}",
            metric_type=name, metric_name=f"{name}, {task.label}",
            metric_value=round(float(values.mean()), 6))
        for task in of_tasks for name, values in _reported(task)
    ]
    return eval_results_to_model_index(folder.resolve().name, results)


def _reported(task: OfTask):
    yield from task.merge.items()


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
