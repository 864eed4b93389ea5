"""Purification against the paper's procedure, written straightforwardly, in one run.

    python tests/benchmarks/purify.py [--large] [--repeats N] [--cpu-time] [--json PATH]

One linear layer of two models, `rank_ratio` 0.98. The procedures take turns, so that a busy machine
slows all of them, and the ratios of medians are what counts:

* paper: from the retained activations X, in float32, `C = X^T X / n`, `C + eps I` with eps doubled
  from 0.1 until its inverse is good, and a full SVD of `W C_e`: once to search the ranks, and all
  of it again to purify, `W' = SVD_r(W C_e) C_e^-1`.
* ours: `damped`, `tail`, `allocate`, `purify`, from a covariance that is ready.
* ours+C: the same, and `C` accumulated once from X in float32.
* factor: `W C` and its triangular factor in float32 for each model, and nothing else:
  `paper / factor` bounds what any method can gain that forms and reduces this product, were all
  the rest free and float32 enough.

On a machine that others use as well, OMP_NUM_THREADS=1 and `--cpu-time` still give figures that
mean something: threads that wait for each other would burn the time of those that work.

Accuracy is the relative error of what is removed (`W - W'`), and the activated pruning error
`||(W - W') C_e||^2` over its minimum, for one model, against a full SVD in float64 at the same rank
and damping. Both are of the float32 result; of ours the float64 directions are judged as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mergekit_pave.algebra.allocation import allocate, cap
from mergekit_pave.algebra.subspace import damped, purify, tail

RATIO = 0.98
TOKENS = 4096
FASTER = ("ours", "ours+C", "factor")  # than the paper's
SHAPES = {"RoBERTa-base": [(768, 768), (3072, 768), (768, 3072)],
          "Llama-size": [(4096, 4096), (1024, 4096)]}  # fmt: skip


def activations(width: int, seed: int) -> Tensor:
    """(TOKENS, in) correlated rows: variances falling as 1/i, an offset, a few outlier channels."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    deviations = torch.arange(1, width + 1) ** -0.5
    x = torch.randn(TOKENS, width, generator=g) * deviations @ mixing.mT
    x = x / x.std() + 0.3 * torch.randn(width, generator=g)
    x[:, torch.randperm(width, generator=g)[:4]] += 8 + 4 * torch.randn(4, generator=g)
    return x


def weights(out: int, width: int, seed: int) -> Tensor:
    """(out, in) noise with a decaying low-rank part, as trained weights have."""
    g, rank = torch.Generator().manual_seed(seed), min(out, width) // 4
    left, right = torch.randn(out, rank, generator=g), torch.randn(rank, width, generator=g)
    strength = 0.5 * torch.arange(1, rank + 1) ** -0.7
    return 0.03 * (torch.randn(out, width, generator=g) + left * strength @ right)


def second_moment(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def paper_damped(c: Tensor) -> tuple[Tensor, Tensor, float]:
    eye, eps = torch.eye(len(c)), 0.1
    for _ in range(20):
        inverse = torch.linalg.inv(c + eps * eye)
        if torch.linalg.norm(inverse @ (c + eps * eye) - eye) < 5e-2:
            break
        eps *= 2
    return c + eps * eye, inverse, eps


def paper(models: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, int, float]]:
    """`(W', dropped, eps)` per model, from `(W, X)`."""
    spectra = []
    for w, x in models:
        c, _, _ = paper_damped(second_moment(x))
        spectra.append(torch.linalg.svd(w @ c, full_matrices=False).S.flip(0))
    drops = allocate([s / s[-1] for s in spectra], len(spectra[0]), RATIO)
    result = []
    for (w, x), dropped in zip(models, drops, strict=True):
        c, inverse, eps = paper_damped(second_moment(x))
        u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
        r = len(s) - dropped
        result.append((u[:, :r] * s[:r] @ v[:r] @ inverse, dropped, eps))
    return result


def ours(models: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, int, str]]:
    """`(W', dropped, route)` per model, from `(W, C)`."""
    rank = min(models[0][0].shape)
    tails = [tail(w, damped(c, dampening_frac=0.01), cap(rank, RATIO)) for w, c in models]
    drops = allocate([t.normalised for t in tails], rank, RATIO)
    return [
        (purify(w, t.basis[:, :d]), d, t.route)
        for (w, _), t, d in zip(models, tails, drops, strict=True)
    ]


def factor(w: Tensor, c: Tensor) -> Tensor:
    a = w @ c
    return torch.linalg.qr(a if a.shape[0] > a.shape[1] else a.mT, mode="r").R


def accuracy(w: Tensor, purified: Tensor, c: Tensor, dropped: int) -> dict[str, float]:
    removed = w.double() - purified.double()
    u, s, _ = torch.linalg.svd(w.double() @ c, full_matrices=False)
    u, rank = u[:, len(s) - dropped :], len(s)
    truth = u @ (u.mT @ w.double())
    least = (s[rank - dropped :] ** 2).sum()
    return {
        "error of the removed part": ((removed - truth).norm() / truth.norm()).item(),
        "activated error over minimum": ((removed @ c).norm() ** 2 / least).item(),
        "gap at the cut": (s[rank - dropped - 1] / s[rank - dropped] - 1).item(),
    }


def compare(out: int, width: int, repeats: int, clock: Callable[[], float]) -> dict:
    pairs = [(weights(out, width, seed), activations(width, seed + 10)) for seed in range(2)]
    ready = [(w, second_moment(x)) for w, x in pairs]
    runs = {
        "paper": lambda: paper(pairs),
        "ours": lambda: ours(ready),
        "ours+C": lambda: ours([(w, second_moment(x)) for w, x in pairs]),
        "factor": lambda: [factor(w, c) for w, c in ready],
    }
    seconds, results = {name: [] for name in runs}, {}
    ours(ready)  # thread pools and the like
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            results[name] = run()
            seconds[name].append(clock() - start)
    (w, c), (theirs, their_drop, eps) = ready[0], results["paper"][0]
    mine, my_drop, route = results["ours"][0]
    my_c = damped(c, dampening_frac=0.01)
    found = tail(w, my_c, cap(min(out, width), RATIO))
    directions = found.basis[:, :my_drop]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "shape": [out, width],
        "medians_s": medians,
        "ratios": {name: medians["paper"] / medians[name] for name in FASTER},
        "route": route,
        "condition number of A": found.largest / found.values[0].item(),
        "dropped": [d for _, d, _ in results["ours"]],
        "paper": accuracy(w, theirs, damped(c, regularization=eps), their_drop) | {"eps": eps},
        "ours": accuracy(w, mine, my_c, my_drop),
        "ours, directions": accuracy(w, purify(w.double(), directions), my_c, my_drop),
    }


def show(row: dict) -> None:
    times = ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in row["medians_s"].items())
    ratios = ", ".join(f"{name} {x:.1f}x" for name, x in row["ratios"].items())
    condition = f"condition number {row['condition number of A']:.1g}"
    print(f"{row['shape'][0]}x{row['shape'][1]}: {ratios}  ({times}; {row['route']}; {condition})")
    for who in ("paper", "ours", "ours, directions"):
        print(f"    {who}: " + ", ".join(f"{k} {v:.3g}" for k, v in row[who].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="4096x4096 and 1024x4096 instead")
    parser.add_argument("--repeats", type=int, help="turns of each procedure (7, or 1 if large)")
    parser.add_argument("--cpu-time", action="store_true", help="processor, not wall clock")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    group = "Llama-size" if args.large else "RoBERTa-base"
    repeats = args.repeats or (1 if args.large else 7)
    rows = []
    for shape in SHAPES[group]:
        clock = time.process_time if args.cpu_time else time.perf_counter
        rows.append(compare(*shape, repeats, clock))
        show(rows[-1])
    total = {n: sum(row["medians_s"][n] for row in rows) for n in ("paper", *FASTER)}
    overall = {name: total["paper"] / total[name] for name in FASTER}
    print("all shapes: " + ", ".join(f"{name} {x:.1f}x" for name, x in overall.items()))
    if args.json:
        report = {"threads": torch.get_num_threads(), "torch": torch.__version__,
                  "rows": rows, "ratios": overall}  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
