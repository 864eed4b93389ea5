"""Does the label-free score of `mergekit-pave tune` choose what labels would have chosen?

    python examples/comparison/label_free.py --setting encoder --out OUT

OUT is what `run.py` has made (base, experts, calibration rows). Every method of the list is merged
at all strengths of its grid, and at its other second parameters in the middle of the grid. Each
merge is scored three times: without labels, on rows that calibration does not draw; on validation
rows with labels; on test rows. What is scored is kept, so that a stopped run goes on. The tables go
to `results/SETTING/label_free.{csv,md}`, of another seed than 0 to `label_free_SEED.{csv,md}`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]

from bench import Bench as Comparison  # noqa: E402
from methods import METHODS, Method, configuration  # noqa: E402

from mergekit_pave.calibration.load import Resources  # noqa: E402
from mergekit_pave.evaluation.bench import Bench  # noqa: E402
from mergekit_pave.evaluation.merging import merge_to  # noqa: E402
from mergekit_pave.evaluation.objective import Objective, objective  # noqa: E402
from mergekit_pave.evaluation.setup import RowOptions, bench_of  # noqa: E402
from mergekit_pave.evaluation.strengths import at_strength  # noqa: E402
from mergekit_pave.models.source import LoaderOptions, ModelSource  # noqa: E402
from mergekit_pave.plugin import register  # noqa: E402
from mergekit_pave.recipe.recipe import Recipe  # noqa: E402

LIST = ("task_arithmetic", "ties", "tsv_m", "tsv_regmean", "regmean",
        "pave_task_arithmetic (separate)")
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Point:
    """One merge: a method's strength and second parameter, `None` for the default."""

    method: Method
    strength: float
    ratio: float | None

    @property
    def default(self) -> bool:
        """Whether it is what the method does when nothing is said."""
        return self.strength == 1.0 and self.ratio in (None, *self.method.ratios[:1])


def points(method: Method, few: bool = False) -> list[Point]:
    """All merges of a method; with `few` at every other strength alone."""
    first = method.ratios[0] if method.ratios else None
    if few:
        return [Point(method, s, first) for s in sorted({*method.strengths[::2], 1.0})]
    middle = method.strengths[len(method.strengths) // 2]
    line = [Point(method, s, first) for s in sorted({*method.strengths, 1.0})]
    return line + [Point(method, middle, ratio) for ratio in method.ratios[1:]]


class Lab:
    """One setting and seed: its merges, and what each is worth by three measures."""

    def __init__(self, setting: str, out: Path, seed: int, rows: int, test_rows: int | None,
                 few: bool = False):
        self.comparison = Comparison(importlib.import_module(setting), out, quick=False)
        if test_rows:
            cut(self.comparison.setting, test_rows, few)
        self.few = few
        self.out, self.seed, self.rows, self.test_rows = out, seed, rows, test_rows
        self.place = self.comparison.place(seed)
        self.folder = out / "label_free"

    def bench(self) -> tuple[Bench, Objective]:
        """Held-out rows are the same for all methods: those behind what calibration draws."""
        method = next(m for m in METHODS if m.name == "tsv_regmean")
        recipe = Recipe.of(configuration(method, self.place))
        bench = bench_of(
            recipe, RowOptions(rows=self.rows), LoaderOptions(), Resources(), quiet=True)
        return bench, objective(bench)

    def run(self, names: tuple[str, ...], finished: bool = False) -> Iterator[dict]:
        """Every merge of the methods with its scores, from disk where they are there.

        With `finished` only those.
        """
        register()
        bench = None
        for name in names:
            (method,) = (m for m in METHODS if m.name == name)
            for ratio, group in _by_ratio(points(method, self.few)):
                missing = [p for p in group if not self._file(p).exists()]
                if missing and not finished:
                    bench = bench or self.bench()
                    self._merge_and_score(method, ratio, missing, *bench)
                for point in filter(lambda p: self._file(p).exists(), group):
                    yield {"point": point, **json.loads(self._file(point).read_text())}

    def _merge_and_score(self, method, ratio, missing, bench, aim) -> None:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        ends = []
        for strength in (0.0, 1.0):
            raw = configuration(method, self.place, strength, ratio)
            merge_to(raw, work / str(strength), LoaderOptions(), "cpu")
            ends.append(work / str(strength))
        for point in missing:
            # A folder of its own: settings remember the model they opened last.
            folder = work / f"at-{point.strength}"
            at_strength(*ends, point.strength, folder)
            start = time.perf_counter()
            scores = bench.fresh(ModelSource(str(folder), "merge", str(folder)),
                                 range(len(bench.tasks)))
            found = {"label_free": aim.value(scores), "seconds": time.perf_counter() - start}
            for split in SPLITS:
                found[split] = self.labelled(folder, split)
            self._file(point).write_text(json.dumps(found))
            print(f"{method.name} {point.strength:g} {ratio}: {found}", flush=True)
            shutil.rmtree(folder)
        shutil.rmtree(work)

    def labelled(self, model: Path, split: str) -> float:
        """The setting's own score of a model: a fraction of the experts', on average."""
        setting, values = self.comparison.setting, []
        references = self._references(split)
        for task, (base, expert) in references.items():
            mean = np.mean(self._score(model, task, split))
            values.append(float(setting.strength(mean, base, expert)))
        return float(np.mean(values))

    def _references(self, split: str) -> dict[str, tuple[float, float]]:
        few = "-few" * self.few
        file = self.folder / f"references-{self.seed}-{split}-{self.test_rows}{few}.json"
        if not file.exists():
            found = {}
            for task in self.comparison.tasks:
                models = (self.out / "base", self.place.expert(task))
                found[task] = [float(np.mean(self._score(m, task, split))) for m in models]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())

    def _score(self, model: Path, task: str, split: str) -> list[float]:
        # bfloat16 products, several times as fast where the CPU has them; for all models alike.
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            return self.comparison.setting.score(self.out, model, task, self.seed, split, False)

    def _file(self, point: Point) -> Path:
        about = [point.method.name, point.strength, point.ratio, self.seed, self.rows,
                 self.test_rows, *[True] * self.few]
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.json"


def cut(setting, count: int, validation: bool) -> None:
    """Let a setting score the first `count` test rows of each task only; of `validation`, too."""
    name = "held_out" if setting.KIND == "encoder" else "_encoded"
    whole = getattr(setting, name)

    def part(*args):
        found = whole(*args)
        if "test" not in args and not (validation and "validation" in args):
            return found
        return tuple(x[:count] for x in found) if setting.KIND == "encoder" else found[:count]

    setattr(setting, name, part)


def _by_ratio(found: list[Point]) -> Iterator[tuple[float | None, list[Point]]]:
    for ratio in dict.fromkeys(p.ratio for p in found):
        yield ratio, [p for p in found if p.ratio == ratio]


def rank_correlation(one, two) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, two)]
    return float(np.corrcoef(*ranks)[0, 1])


def table(lines: list[dict]) -> list[list[str]]:
    """Per method, the test score at the label-free choice, at that of labels, at the default."""
    shown = [["method", "merges", "default", "label-free", "by validation labels",
              "label-free - labels", "rank correlation"]]
    for name in dict.fromkeys(line["point"].method.name for line in lines):
        of = [line for line in lines if line["point"].method.name == name]
        if not of:
            continue
        free, labels = (max(of, key=lambda x: x[key]) for key in ("label_free", "validation"))
        default = next((x for x in of if x["point"].default), None)
        rank = rank_correlation([x["label_free"] for x in of], [x["test"] for x in of])
        shown.append([name, str(len(of)), f"{default['test']:.3f}" if default else "-",
                      f"{free['test']:.3f} ({_said(free)})",
                      f"{labels['test']:.3f} ({_said(labels)})",
                      f"{100 * (free['test'] - labels['test']):+.1f}", f"{rank:.2f}"])
    rank = rank_correlation([x["label_free"] for x in lines], [x["test"] for x in lines])
    shown.append(["all", str(len(lines)), "", "", "", "", f"{rank:.2f}"])
    return shown


def _said(line: dict) -> str:
    point = line["point"]
    second = "" if point.ratio is None else f", {point.method.ratio_key} {point.ratio:g}"
    return f"lambda {point.strength:g}{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=("encoder", "causal"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="what run.py has made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of each task")
    parser.add_argument("--test-rows", type=int, help="test rows of each task, all by default")
    parser.add_argument("--only", help="these methods, separated by commas")
    parser.add_argument("--few", action="store_true", help="half of the strengths, no second "
                        "parameter, and of validation rows as many as of test rows")
    parser.add_argument("--finished", action="store_true", help="merge nothing")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    lab = Lab(args.setting, args.out, args.seed, args.rows, args.test_rows, args.few)
    names = tuple(args.only.split(",")) if args.only else LIST
    lines = list(lab.run(names, args.finished))
    target = args.results / args.setting
    target.mkdir(parents=True, exist_ok=True)
    name = f"label_free_{args.seed}" if args.seed else "label_free"
    with (target / f"{name}.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["method", "lambda", "second", "label_free", *SPLITS])
        for x in lines:
            p = x["point"]
            out.writerow([p.method.name, p.strength, "" if p.ratio is None else p.ratio,
                          *(f"{x[key]:.5f}" for key in ("label_free", *SPLITS))])
    head, *body = table(lines)
    rule = ["---", *["---:"] * (len(head) - 1)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
    note = (f"Test scores ({lab.comparison.setting.METRIC}, as a share of the experts') of the "
            f"{args.setting} setting, seed {args.seed}, at three choices from the same merges: by "
            f"the label-free score on {args.rows} held-out rows of each task, by validation labels,"
            " and what the method does by default. Last column: Spearman's correlation of the "
            "label-free with the test score over the merges."
            + (f" {args.test_rows} test rows of each task"
               f"{', and as many for validation' * args.few}." if args.test_rows else ""))
    (target / f"{name}.md").write_text(f"{note}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
