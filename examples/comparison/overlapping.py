"""Fine-tunes of the same task: what merging at strength 1 does, and what `tune` makes of it.

    python examples/comparison/overlapping.py --out OUT

OUT is what `run.py` has made with `--seeds 0,1` of the encoder setting. Merged are two fine-tunes
of one task, and four of two tasks about one text: they learned nearly the same, so that their
changes add up. A line is printed, and kept, for each merge: what it keeps of the experts without
labels, on average and of the worst one; its accuracy in percent of the experts' under their own
heads, and that of the base with a linear probe; how far it moved from the base on other text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]

import encoder  # noqa: E402
from label_free import cut  # noqa: E402

from mergekit_pave.evaluation.merging import merge_to  # noqa: E402
from mergekit_pave.evaluation.run import evaluate  # noqa: E402
from mergekit_pave.evaluation.setup import RowOptions  # noqa: E402
from mergekit_pave.evaluation.tune import Budget  # noqa: E402
from mergekit_pave.evaluation.tuned import tune  # noqa: E402
from mergekit_pave.models.source import LoaderOptions  # noqa: E402
from mergekit_pave.plugin import register  # noqa: E402

SEEDS = (0, 1)
# Tasks of the fine-tunes, and the task whose rows are general text to them.
GROUPS = ((("nouns",), "bible"), (("bible", "story"), "nouns"), (("icd", "injuries"), "bible"))
METHODS = ("linear", "task_arithmetic", "tsv_m", "tsv_regmean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="what run.py has made")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows of each task")
    parser.add_argument("--test-rows", type=int, default=120, help="test rows of each task")
    parser.add_argument("--budget", type=int, default=6, help="merges of a search")
    args = parser.parse_args()
    register()
    cut(encoder, args.test_rows, False)
    for tasks, other in GROUPS:
        for method in METHODS:
            for tuned in (False, True)[: 1 + (method != "linear")]:
                line = _line(args, tasks, other, method, tuned)
                print("| " + " | ".join(line) + " |", flush=True)


def _line(args, tasks, other: str, method: str, tuned: bool) -> list[str]:
    folder = args.out / "overlapping"
    folder.mkdir(exist_ok=True)
    name = f"{'-'.join(tasks)}-{method}-{'tuned' if tuned else 'one'}"
    kept = folder / f"{name}-{args.rows}-{args.test_rows}-{args.budget}.json"
    if not kept.exists():
        start = time.process_time()
        found = _found(args, tasks, other, method, tuned, folder / name)
        kept.write_text(json.dumps([*found, f"{time.process_time() - start:.0f} s"]))
    return json.loads(kept.read_text())


def _found(args, tasks, other, method, tuned, folder: Path) -> list[str]:
    models = [(task, seed) for task in tasks for seed in SEEDS]
    rows = tuple(str(args.out / "calibration" / f"{task}.jsonl") for task, _ in models)
    wanted = RowOptions(rows=args.rows, held_out=rows)
    raw = {
        "merge_method": method, "dtype": "float32",
        "models": [{"model": str(_expert(args.out, *m)), "parameters": {"weight": 1.0}}
                   for m in models],
    }
    if method != "linear":
        raw |= {"base_model": str(args.out / "base"), "parameters": {"lambda": 1.0}}
    if method == "tsv_regmean":
        for model in raw["models"]:
            model["parameters"]["calibration_dataset"] = "none"
    strength = "average" if method == "linear" else "lambda 1"
    if tuned:
        best = tune(raw, folder.with_suffix(".yml"), Budget(merges=args.budget), rows=wanted).best
        raw, strength = best.raw, best.words
    merge_to(raw, folder, LoaderOptions(), "cpu")
    (folder / "mergekit_config.yml").write_text(yaml.safe_dump(raw))
    general = str(args.out / "calibration" / f"{other}.jsonl")
    (result,) = evaluate(
        [folder], quiet=True, rows=RowOptions(
            rows=args.rows, held_out=rows, general=general, base=str(args.out / "base")))
    shares = [task.kept.value for task in result.of_tasks]
    accuracies = [_accuracy(args.out, folder, *m) / _accuracy(args.out, _expert(args.out, *m), *m)
                  for m in models]
    bases = [_accuracy(args.out, args.out / "base", *m)
             / _accuracy(args.out, _expert(args.out, *m), *m) for m in models]
    return [
        f"{len(models)}: {', '.join(tasks)}", method, strength, f"{100 * np.mean(shares):.1f}",
        f"{100 * np.min(shares):.1f}", f"{100 * np.mean(accuracies):.1f}",
        f"{100 * np.mean(bases):.1f}", f"{100 * result.general.worse.value:.1f}"]


def _expert(out: Path, task: str, seed: int) -> Path:
    return out / "experts" / str(seed) / task


def _accuracy(out: Path, model: Path, task: str, seed: int) -> float:
    return float(np.mean(encoder.score(out, model, task, seed, "test", False)))


if __name__ == "__main__":
    main()
