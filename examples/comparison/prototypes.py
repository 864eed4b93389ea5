"""Merges from task vectors alone, at matched and at fixed strengths, before they are methods.

    python examples/comparison/prototypes.py --setting encoder --tasks nouns,icd/verbs,bible
        [--methods tsv_m/matched_regmean] [--strengths matched:1,plain:1.25] [--split test]
        [--seeds 0,1]
    python examples/comparison/prototypes.py --setting causal --screen matched_regmean

Uses the experts that `run.py` has trained, adds a line per merge to `prototypes.csv` and row scores
to `prototypes.jsonl` in `out/SETTING`, and prints every score with the difference from the first,
both with 95 % intervals of a paired bootstrap over rows and tasks. A merge that is there already is
not made again. Tasks between slashes are merged by themselves, and all of them scored together.
A task may name its seed (`nouns:1`); the same task twice is an overlap.

`--screen` merges and scores nothing: it prints what strengths from the weights alone come to, as
multiples of the matched one: the median over the matrices, and their 10th and 90th percentile.

Everything that is no matrix, and the vocabulary, gets the mean of the task vectors.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from run import HERE, surroundings

surroundings()
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from strengths import closed_forms  # noqa: E402
from torch import Tensor  # noqa: E402

from mergekit_pave.algebra.response import evening, matched, toward  # noqa: E402
from mergekit_pave.algebra.separation import flattened, regmean  # noqa: E402
from mergekit_pave.algebra.tsv import factors, kept_rank, merged_delta, polar  # noqa: E402

Deltas = Sequence[Tensor]  # (out, in) float64 each


def estimated(delta: Tensor) -> Tensor:
    """`D^T D` (in, in), in the place of the second moment of the inputs."""
    return delta.mT @ delta


def tsv_m(deltas: Deltas) -> Tensor:
    count = kept_rank(deltas[0].shape, len(deltas))
    return merged_delta([factors(d, count) for d in deltas])


def from_prior(deltas: Deltas) -> Tensor:
    return toward(deltas, [lambda d=d: estimated(d) for d in deltas], tsv_m(deltas)).delta


def blend(deltas: Deltas) -> Tensor:
    """The mean of TSV-M and RegMean with its averaging below 1, evened out by 1/2."""
    moments = [lambda d=d: estimated(d) for d in deltas]
    other = regmean(deltas, moments, [1.0] * len(deltas), 0.9, 1 / max(len(deltas) - 1, 1))
    return (tsv_m(deltas) + flattened(other, 0.5)) / 2


def iso_cts(deltas: Deltas, common: float = 0.8) -> Tensor:
    """80 % of the rank from the sum, the rest from what the tasks have beside it; all equal."""
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    kept = max(1, int(common * len(s)))
    own = max(1, (len(s) - kept) // len(deltas))
    parts = [(u[:, :kept], s[:kept], vh[:kept])]
    for delta in deltas:
        rest = torch.linalg.svd(delta - u[:, :kept] @ (u[:, :kept].mT @ delta), full_matrices=False)
        parts.append((rest[0][:, :own], rest[1][:own], rest[2][:own]))
    left = polar(torch.cat([p[0] for p in parts], 1))
    right = polar(torch.cat([p[2] for p in parts]).mT)
    return torch.cat([p[1] for p in parts]).mean() * left @ right.mT


def dc(deltas: Deltas, kept: float = 0.1) -> Tensor:
    """Cores in TSV-M's bases: the largest entries, signs elected, blocks of the tasks alone."""
    count = kept_rank(deltas[0].shape, len(deltas))
    parts = [factors(d, count) for d in deltas]
    left, right = (polar(torch.cat(x, 1)) for x in ([p.u for p in parts], [p.v for p in parts]))
    cores = torch.stack([(left.mT @ p.u * p.s) @ (p.v.mT @ right) for p in parts])
    place = max(1, int((1 - kept) * cores[0].numel()))
    cut = cores.abs().flatten(1).kthvalue(place, dim=1).values[:, None, None]
    cores = torch.where(cores.abs() > cut, cores, 0)
    agree = (cores.sign() == cores.sum(0).sign()) & (cores != 0)
    core = (cores * agree).sum(0) / agree.sum(0).clamp_min(1)
    blocks = torch.block_diag(*(torch.ones_like(p.s[:, None] * p.s) for p in parts))
    return left @ (core * blocks) @ right.mT


def trimmed(deltas: Deltas) -> Tensor:
    """The regression with second moments of the larger half of each task vector's entries."""
    halves = [torch.where(d.abs() > d.abs().median(), d, 0) for d in deltas]
    return toward(deltas, [lambda d=d: estimated(d) for d in halves], tsv_m(deltas)).delta


def ties(deltas: Deltas, density: float = 0.2) -> Tensor:
    """The largest entries of each, and where those disagree in sign, the mean of the side that
    weighs more (arXiv 2306.01708)."""
    place = max(1, int((1 - density) * deltas[0].numel()))
    kept = torch.stack([torch.where(d.abs() > d.abs().flatten().kthvalue(place).values, d, 0)
                        for d in deltas])
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


METHODS: dict[str, Callable[[Deltas], Tensor]] = {
    "tsv_m": tsv_m,
    "tsv_m, flattening 0.5": lambda ds: flattened(tsv_m(ds), 0.5),
    "blend": blend,
    "prior": from_prior,
    "prior, flattening 0.5": lambda ds: flattened(from_prior(ds), 0.5),
    "prior, flattening 0.7": lambda ds: flattened(from_prior(ds), 0.7),
    "matched_regmean": lambda ds: flattened(from_prior(ds), evening(ds)),
    "matched_regmean, trimmed": lambda ds: flattened(trimmed(ds), evening(ds)),
    "iso_c": lambda ds: flattened(sum(ds), 1.0),
    "iso_cts": iso_cts,
    "dc": dc,
    "task_arithmetic": sum,
    "ties": ties,
}


class Experts:
    """Base and experts of a setting, merges of them, and what those score, kept on disk."""

    def __init__(self, name: str, out: Path, tasks: Sequence[str], split: str):
        self.setting, self.out, self.split = importlib.import_module(name), out, split
        self.tasks = [task.partition(":")[::2] for task in tasks]
        self.file, self.key = out / "prototypes.jsonl", [",".join(tasks), split]
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {name: [np.asarray(r) for r in rows]
                     for *key, name, rows in map(json.loads, lines) if key == self.key}
        for of, folders in {"base": [out / "base"] * len(tasks), "experts": self.folders}.items():
            if of not in self.rows:
                self.keep(of, folders)

    @property
    def folders(self) -> list[Path]:
        return [self.out / "experts" / (seed or "0") / task for task, seed in self.tasks]

    @functools.cached_property
    def base(self) -> dict[str, Tensor]:
        return _weights(self.out / "base")

    @functools.cached_property
    def experts(self) -> list[dict[str, Tensor]]:
        return [_weights(folder) for folder in self.folders]

    def deltas(self, name: str) -> tuple[list[Tensor], bool]:
        """Those that are not zero, and whether the tensor is a matrix to merge as one."""
        weight = self.base[name]
        deltas = [expert[name].double() - weight.double() for expert in self.experts]
        deltas = [d for d in deltas if d.any()]
        plain = weight.ndim != 2 or "embed" in name or "lm_head" in name
        return deltas, bool(deltas) and not plain

    def screen(self, method: Callable[[Deltas], Tensor], every: int) -> dict[str, list[float]]:
        """What `closed_forms` finds in every first, second, ... matrix, in the order of names."""
        found: dict[str, list[float]] = {}
        matrices = [name for name in sorted(self.base) if self.deltas(name)[1]]
        for matrix in matrices[::every]:
            deltas, _ = self.deltas(matrix)
            for name, value in closed_forms(deltas, method(deltas)).items():
                found.setdefault(name, []).append(value)
        return found

    @functools.lru_cache(maxsize=1)  # noqa: B019 - as large as the model; the latest is enough
    def changes(self, method: str) -> dict[str, tuple[Tensor, float]]:
        """Name -> the change that a method makes of a matrix, or the mean, and its strength."""
        result = {}
        for name, weight in self.base.items():
            deltas, matrix = self.deltas(name)
            if not matrix:
                total = sum(deltas, torch.zeros_like(weight, dtype=torch.float64))
                result[name] = total / len(self.experts), 0.0
            else:
                change = METHODS[method](deltas)
                result[name] = change, matched(deltas, change)
        return result

    def merged(self, method: str, strength: str) -> dict[str, Tensor]:
        """All weights of a merge, at `matched:x` or `plain:x`."""
        kind, factor = strength.split(":")
        return {
            name: (self.base[name].double() + change * (
                1 if own == 0 else float(factor) * (own if kind == "matched" else 1)
            )).float() for name, (change, own) in self.changes(method).items()}

    def score(self, label: str, weights: dict[str, Tensor]) -> None:
        """Rows of every task, on disk as `label`."""
        # A folder of its own for every merge: settings remember the model they opened last.
        with tempfile.TemporaryDirectory(dir=self.out) as name:
            folder = Path(name)
            for file in (self.out / "base").iterdir():
                if file.suffix != ".safetensors":
                    (folder / file.name).write_bytes(file.read_bytes())
            save_file({k: v.contiguous() for k, v in weights.items()},
                      folder / "model.safetensors", metadata={"format": "pt"})
            self.keep(label, [folder] * len(self.tasks))
        print("  merged", label, flush=True)

    def keep(self, label: str, folders: Sequence[Path]) -> None:
        score = functools.partial(self.setting.score, self.out)
        self.rows[label] = [
            np.asarray(score(folder, task, int(seed or 0), self.split, False))
            for folder, (task, seed) in zip(folders, self.tasks, strict=True)]
        with self.file.open("a") as opened:
            opened.write(json.dumps([*self.key, label, [r.tolist() for r in self.rows[label]]]))
            opened.write("\n")


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def options(description: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--setting", choices=("encoder", "causal", "halves"),
                        default="encoder")
    parser.add_argument("--tasks", help="TASK,TASK/TASK,...; default: all")
    parser.add_argument("--seeds", type=lambda text: text.split(","), default=["0"])
    parser.add_argument("--methods", type=lambda text: text.split("/"), default=methods,
                        help="NAME/NAME/...")
    parser.add_argument("--strengths", type=lambda text: text.split(","), default=["matched:1"])
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def chosen(args: argparse.Namespace) -> list[list[Experts]]:
    """Seed -> part -> its experts."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    out = args.out.resolve() / args.setting
    names = args.tasks or ",".join(importlib.import_module(args.setting).NAMES)
    parts = [part.split(",") for part in names.split("/")]
    return [[Experts(args.setting, out, [task + (seed != "0") * f":{seed}" for task in part],
                     args.split) for part in parts] for seed in args.seeds]


def main() -> None:
    parser = options(__doc__, ["tsv_m", "blend", "matched_regmean"])
    parser.add_argument("--screen", choices=METHODS, help="only strengths, of this method")
    parser.add_argument("--every", type=int, default=1, help="screen one matrix of so many")
    args = parser.parse_args()
    seeds = chosen(args)
    if args.screen:
        for name, values in seeds[0][0].screen(METHODS[args.screen], args.every).items():
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
            print(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
        return
    wanted = [f"{name} ({kind})" for name in args.methods for kind in args.strengths]
    for part in (part for parts in seeds for part in parts):
        for label in wanted:
            if label not in part.rows:
                part.score(label, part.merged(*label[:-1].rsplit(" (", 1)))
    report(seeds, wanted)


def report(seeds: Sequence[Sequence[Experts]], wanted: Sequence[str]) -> None:
    """Print a table; the first of `wanted` is what the others are compared with."""
    from intervals import bootstrap

    first = seeds[0][0]
    groups = [first.setting.groups(task, first.split, False)
              for part in seeds[0] for task, _ in part.tasks]
    scores = {name: [[rows for part in parts for rows in part.rows[name]] for parts in seeds]
              for name in ("base", "experts", *wanted)}
    tasks = "/".join(part.key[0] for part in seeds[0])
    print(f"\n{tasks}, {len(seeds)} seeds, {first.split}\n\n"
          "| | score | over the first | ... of other tasks, too |\n|---|---|---|---|")
    found = [bootstrap(scores, groups, first.setting.strength, resample_tasks=resample)
             for resample in (False, True)]
    for name in wanted:
        cells = [found[0].score(name), *(f.difference(name, wanted[0]) for f in found)]
        values = [[100 * v for v in (c.value, c.low, c.high)] for c in cells]
        print("| `{}` | {:.1f} ({:.1f} to {:.1f}) |".format(name, *values[0]), *(
            "{:+.1f} ({:+.1f} to {:+.1f}) |".format(*v) for v in values[1:]))
        with first.file.with_suffix(".csv").open("a", newline="") as opened:
            csv.writer(opened).writerow([tasks, len(seeds), first.split, name, *(
                f"{value:.1f}" for of in values for value in of)])


if __name__ == "__main__":
    main()
