"""Merges from task vectors alone, at matched and at fixed strengths, before they are methods.

    python examples/comparison/prototypes.py --setting encoder --tasks nouns,verbs,icd
        [--methods tsv_m/matched_regmean] [--strengths matched:1,plain:1.25] [--split test]
    python examples/comparison/prototypes.py --setting causal --screen matched_regmean

Uses the experts that `run.py` has trained, adds a line per merge to `prototypes.csv` and row scores
to `prototypes.jsonl` in `out/SETTING`, and prints every score with the difference from the first,
both with 95 % intervals of a paired bootstrap over rows and tasks. A merge that is there already is
not made again. A task may name its seed (`nouns:1`); the same task twice is an overlap.

`--screen` merges and scores nothing: it prints what strengths from the weights alone come to, as
multiples of the matched one: the median over the matrices, and their 10th and 90th percentile.

Everything that is no matrix, and the vocabulary, gets the mean of the task vectors.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
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
}


class Experts:
    """Base and experts of a setting, and what merges of them score."""

    def __init__(self, name: str, out: Path, tasks: Sequence[str]):
        self.setting, self.out = importlib.import_module(name), out
        self.tasks = [task.partition(":")[::2] for task in tasks]
        self.base = _weights(out / "base")
        self.experts = [_weights(self._folder(*task)) for task in self.tasks]

    def _folder(self, task: str, seed: str) -> Path:
        return self.out / "experts" / (seed or "0") / task

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

    def merged(self, method: Callable[[Deltas], Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Name -> the change that a method makes of a matrix, or the mean, and its strength."""
        result = {}
        for name, weight in self.base.items():
            deltas, matrix = self.deltas(name)
            if not matrix:
                total = sum(deltas, torch.zeros_like(weight, dtype=torch.float64))
                result[name] = total / len(self.experts), 0.0
            else:
                change = method(deltas)
                result[name] = change, matched(deltas, change)
        return result

    def score(self, weights: dict[str, Tensor], split: str) -> list[np.ndarray]:
        """Rows of every task."""
        folder = self.out / "prototype"
        folder.mkdir(exist_ok=True)
        for file in (self.out / "base").iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})
        getattr(getattr(self.setting, "_opened", None), "cache_clear", lambda: None)()
        return [np.asarray(self.setting.score(self.out, folder, task, int(seed or 0), split, False))
                for task, seed in self.tasks]

    def references(self, split: str) -> dict[str, list[np.ndarray]]:
        score = self.setting.score
        found: dict[str, list[np.ndarray]] = {"base": [], "experts": []}
        for task, seed in self.tasks:
            folders = {"base": self.out / "base", "experts": self._folder(task, seed)}
            for name, folder in folders.items():
                rows = score(self.out, folder, task, int(seed or 0), split, False)
                found[name].append(np.asarray(rows))
        return found


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--setting", choices=("encoder", "causal"), default="encoder")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--methods", type=lambda text: text.split("/"),
                        default=["tsv_m", "blend", "matched_regmean"], help="NAME/NAME/...")
    parser.add_argument("--strengths", type=lambda text: text.split(","), default=["matched:1"])
    parser.add_argument("--screen", choices=METHODS, help="only strengths, of this method")
    parser.add_argument("--every", type=int, default=1, help="screen one matrix of so many")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    out = args.out.resolve() / args.setting
    tasks = args.tasks or importlib.import_module(args.setting).NAMES
    experts, kept = Experts(args.setting, out, tasks), Kept(out, tasks, args.split)
    if args.screen:
        for name, values in experts.screen(METHODS[args.screen], args.every).items():
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
            print(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
        return
    for name in ("base", "experts"):
        if name not in kept.rows:
            for of, rows in experts.references(args.split).items():
                kept.add(of, rows)
    for name in args.methods:
        labels = {f"{name} ({kind})": kind.split(":") for kind in args.strengths}
        changes = None
        for label, (kind, factor) in labels.items():
            if label in kept.rows:
                continue
            changes = changes or experts.merged(METHODS[name])
            weights = {
                key: (experts.base[key].double() + change * (
                    1 if strength == 0 else float(factor) * (strength if kind == "matched" else 1)
                )).float() for key, (change, strength) in changes.items()}
            kept.add(label, experts.score(weights, args.split))
            print("  merged", label, flush=True)
    wanted = [f"{name} ({kind})" for name in args.methods for kind in args.strengths]
    report(experts, kept, wanted)


class Kept:
    """Row scores on disk, of one list of tasks on one split."""

    def __init__(self, out: Path, tasks: Sequence[str], split: str):
        self.file, self.key = out / "prototypes.jsonl", [",".join(tasks), split]
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {name: [np.asarray(r) for r in rows]
                     for *key, name, rows in map(json.loads, lines) if key == self.key}

    def add(self, name: str, rows: list[np.ndarray]) -> None:
        self.rows[name] = rows
        with self.file.open("a") as opened:
            opened.write(json.dumps([*self.key, name, [r.tolist() for r in rows]]) + "\n")


def report(experts: Experts, kept: Kept, wanted: list[str]) -> None:
    from intervals import bootstrap

    tasks, split = kept.key
    groups = [experts.setting.groups(task, split, False) for task, _ in experts.tasks]
    scores = {name: [rows] for name, rows in kept.rows.items()}
    for resample in (True, False):
        found = bootstrap(scores, groups, experts.setting.strength, resample_tasks=resample)
        print(f"{tasks}, {split}; intervals over rows" + " and tasks" * resample)
        lines = []
        for name in wanted:
            score, over = found.score(name), found.difference(name, wanted[0])
            lines.append([tasks, split, "tasks and rows" if resample else "rows", name, *(
                f"{100 * value:.1f}" for value in (
                    score.value, score.low, score.high, over.value, over.low, over.high))])
            print("  {3}: {4} ({5} to {6}); over the first {7} ({8} to {9})".format(*lines[-1]))
        with (kept.file.with_suffix(".csv")).open("a", newline="") as opened:
            csv.writer(opened).writerows(lines)


if __name__ == "__main__":
    main()
