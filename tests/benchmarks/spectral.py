"""TSV-Merge, and its mean with RegMean without data, against the published procedure, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/spectral.py [--shapes NAME ...] [--tasks 2 3 8]
        [--repeats N] [--seed N] [--json PATH]

One weight of T models, CPU time of one thread, ratios to `published`: the procedure of the paper's
repository in float32, an SVD of every task vector, truncation to R / T, two more SVDs for the polar
factors. Task vectors are noise with a decaying part (a quarter of the rank) and a little that all
tasks have in common.

* tsv_m: `merged_change`, from the weights to the merged task vector.
* tsv_regmean: the same, `regmean` with covariances estimated from the task vectors, `flattened`.
* matched_regmean: `toward` from `tsv_m`, evened out and scaled, the same covariances.
* float64: what `tsv_m` computes where float32 does not do.
* factorise: the eigenvalue problems alone that `tsv_m` solves, of random matrices: what it would
  cost if all products were free.

An SVD depends on its task alone, so the published procedure's are timed once a task and summed for
each T. Errors are relative to the merged task vector in float64 (by `factors`, whose error against
SVDs in float64 is 1e-10 and below; the tests say so).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_pave.algebra.separation import flattened, regmean
from mergekit_pave.algebra.tsv import factors, kept_rank, merged_change, merged_delta
from mergekit_pave.methods.matched_regmean import solved

SHAPES = {
    "768x768": (768, 768), "3072x768": (3072, 768), "768x3072": (768, 3072),
    "4096x4096": (4096, 4096), "11008x4096": (11008, 4096), "1024x4096": (1024, 4096),
}  # fmt: skip


def task_vectors(out: int, width: int, tasks: int, seed: int = 0) -> list[Tensor]:
    g, rank = torch.Generator().manual_seed(seed), min(out, width) // 4
    common = torch.randn(out, 16, generator=g), torch.randn(16, width, generator=g)
    decay = torch.arange(1, rank + 1) ** -0.7
    return [
        1e-3 * (
            torch.randn(out, width, generator=g)
            + 2 * torch.randn(out, rank, generator=g) * decay
            @ torch.randn(rank, width, generator=g)
            + common[0] * decay[:16] @ common[1]
        )
        for _ in range(tasks)
    ]  # fmt: skip


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What it returns, and the median of its CPU seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(x, full_matrices=False)


def recombined(parts: list, count: int) -> Tensor:
    """The published procedure from the SVDs of the tasks on."""
    u = svd(torch.cat([part[0][:, :count] for part in parts], 1))
    v = svd(torch.cat([part[2][:count] for part in parts]))
    s = torch.cat([part[1][:count] for part in parts])
    return (u[0] @ u[2]) * s @ (v[0] @ v[2])


def estimated(delta: Tensor) -> Tensor:
    """As `methods.layers` has it."""
    delta = delta * len(delta) ** -0.5
    return delta.mT @ delta


def without_data(deltas: list[Tensor]) -> Tensor:
    """The RegMean half of `tsv_regmean`, `calibration_dataset: none`, at its defaults."""
    covariances = [lambda d=d: estimated(d) for d in deltas]
    averaging = 1 / max(len(deltas) - 1, 1)
    return flattened(regmean(deltas, covariances, [1.0] * len(deltas), 0.9, averaging), 0.5)


def matched(deltas: list[Tensor], prior: Tensor) -> Tensor:
    """The rest of `matched_regmean` with covariances estimated from the task vectors."""
    return solved(deltas, [lambda d=d: estimated(d) for d in deltas], prior, 0.0)


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def rows(name: str, counts: list[int], repeats: int, seed: int) -> list[dict[str, Any]]:
    out, width = SHAPES[name]
    deltas = task_vectors(out, width, max(counts), seed)
    decomposed = [timed(lambda d=d: svd(d), repeats) for d in deltas]
    square, _ = timed(lambda: torch.randn(min(out, width), min(out, width)), 1)
    square = square + square.mT
    _, eigen = timed(lambda: torch.linalg.eigh(square), repeats)
    found = []
    for tasks in counts:
        found.append({"shape": name, "tasks": tasks,
                      **compared(deltas[:tasks], decomposed[:tasks], eigen, repeats)})
        print("{shape:>10} T={tasks}  published {published seconds:7.2f} s   "
              "float64 {float64:.2f}   tsv_m {tsv_m:.2f}   tsv_regmean {tsv_regmean:.2f}   "
              "matched_regmean {matched_regmean:.2f} (float64: {matched float64:.2f})   "
              "factorise {factorise:.2f}   errors: published "
              "{error of published:.1e}, tsv_m {error of tsv_m:.1e} ({dtype})".format(**found[-1]),
              flush=True)
    return found


def compared(
    deltas: list[Tensor], decomposed: list[tuple], eigen: float, repeats: int
) -> dict[str, Any]:
    tasks, base = len(deltas), torch.zeros_like(deltas[0])
    count = kept_rank(base.shape, tasks)
    parts = [part for part, _ in decomposed]
    merged, seconds = timed(lambda: recombined(parts, count), repeats)
    published = seconds + sum(seconds for _, seconds in decomposed)
    ours, tsv = timed(lambda: merged_change(base, deltas, [1.0] * tasks, count), repeats)
    _, rest = timed(lambda: without_data(deltas), repeats)
    _, answered = timed(lambda: matched(deltas, ours), repeats)
    truth, double = timed(lambda: merged_delta([factors(d, count) for d in deltas]), 1)
    return {
        "published seconds": published, "float64": double / published,
        "tsv_m": tsv / published, "tsv_regmean": (tsv + rest) / published,
        "matched_regmean": (tsv + answered) / published,
        "matched float64": (double + answered) / published,
        "factorise": (tasks + (2 if tasks > 2 else 2 * 0.4)) * eigen / published,
        "dtype": str(ours.dtype).removeprefix("torch."),
        "error of published": error(merged, truth), "error of tsv_m": error(ours, truth),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--tasks", nargs="*", type=int, default=[2, 3, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in arguments.shapes:
        found += rows(name, arguments.tasks, arguments.repeats, arguments.seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
