"""Where the time of one purified linear layer goes, phase by phase.

    python tests/benchmarks/phases.py [--shapes roberta|llama|gqa|all] [--repeats N] [--cpu-time]
                                      [--device cuda] [--json PATH]

One layer of one model, `rank_ratio` 0.98, 4,096 correlated tokens:

* forward: the layer's own product, in float32; what its inputs cost to make is not counted.
* covariance: summing `x x^T`, in float32.
* write, read: folding, checksum and file of the covariance; the way back.
* damping, decomposition, allocation (over two models), projection: what a merge does with it.

In brackets each phase over the float32 product `W C_e`, the unit of all methods that form it.

`--operations` times what a decomposition could be built from instead: float64, on square matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from purify import RATIO, activations, weights

from mergekit_pave.algebra.allocation import allocate, cap
from mergekit_pave.algebra.second_moment import SecondMoment
from mergekit_pave.algebra.subspace import damped, purify, tail
from mergekit_pave.storage.covariances import StoreWriter

SHAPES = {
    "roberta": [(768, 768), (3072, 768), (768, 3072)],
    "llama": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "gqa": [(1024, 4096)],
    "square": [(2048, 2048)],
}


class Stopwatch:
    """Seconds of every phase, one list each."""

    def __init__(self, clock: Callable[[], float], device: str):
        self._clock, self._cuda = clock, device.startswith("cuda")
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, phase: str, work: Callable):
        start = self._now()
        result = work()
        self.seconds.setdefault(phase, []).append(self._now() - start)
        return result

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return self._clock()


def layer(out: int, width: int, repeats: int, clock: Callable[[], float], device: str) -> dict:
    w, x = (t.to(device) for t in (weights(out, width, 0), activations(width, 10)))
    rank, watch, route = min(out, width), Stopwatch(clock, device), ""
    for turn in range(repeats + 1):
        if turn == 1:  # the first one warms up
            watch.seconds.clear()
        watch("forward", lambda: x @ w.mT)
        moment = watch("covariance", lambda: SecondMoment(width).add(x))
        with tempfile.TemporaryDirectory() as folder:
            writer = StoreWriter(Path(folder), "benchmark")
            watch("write", lambda writer=writer, moment=moment: writer.take({"site": moment}))
            store = writer.finish({}, {}, {})
            read: Callable = lambda store=store: store.covariance("site").to(device)  # noqa: E731
            c = watch("read", read)
        watch("product", lambda c=c: w @ c)
        allowed = watch("damping", lambda c=c: damped(c, dampening_frac=0.01))
        found = watch("decomposition", lambda a=allowed: tail(w, a, cap(rank, RATIO)))
        drops = watch("allocation", lambda f=found: allocate([f.normalised] * 2, rank, RATIO))
        watch("projection", lambda f=found, d=drops: purify(w, f.basis[:, : d[0]]))
        route = found.route
    medians = {phase: statistics.median(times) for phase, times in watch.seconds.items()}
    unit = medians.pop("product")
    return {
        "shape": [out, width], "route": route, "float32 product_s": unit, "medians_s": medians,
        "over the product": {phase: seconds / unit for phase, seconds in medians.items()},
    }  # fmt: skip


def operations(width: int, repeats: int, clock: Callable[[], float], device: str) -> dict:
    """Seconds of single operations on (width, width) float64, a block as long as a tail needs."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(width, width, generator=generator, dtype=torch.float64).to(device)
    c = a @ a.mT / width + torch.eye(width, dtype=a.dtype, device=device)
    count = cap(width, RATIO)
    block, watch = a[:, : count + max(8, count // 2)].contiguous(), Stopwatch(clock, device)
    upper = torch.linalg.qr(a, mode="r").R
    for turn in range(repeats + 1):
        if turn == 1:
            watch.seconds.clear()
        watch("product", lambda: a @ c)
        watch("float32 product", lambda: a.float() @ c.float())
        watch("QR", lambda: torch.linalg.qr(a, mode="r"))
        watch("LU", lambda: torch.linalg.lu_factor(a))
        watch("Cholesky", lambda: torch.linalg.cholesky(c))
        watch("a block's triangular solve",
              lambda: torch.linalg.solve_triangular(upper, block, upper=True))
        watch("a block's product", lambda: block.mT @ a)
    return {name: statistics.median(times) for name, times in watch.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=(*SHAPES, "all"), default="roberta")
    parser.add_argument("--operations", action="store_true", help="of widths 768 and 2048 instead")
    parser.add_argument("--repeats", type=int, help="turns (5, or 1 for the large shapes)")
    parser.add_argument("--cpu-time", action="store_true", help="processor, not wall clock")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    chosen = () if args.operations else SHAPES if args.shapes == "all" else (args.shapes,)
    rows = []
    for width in (768, 2048) if args.operations else ():
        found = operations(width, args.repeats or 5, clock, args.device)
        rows.append({"width": width, "medians_s": found})
        listed = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found.items())
        print(f"{width}: {listed}", flush=True)
    for group in chosen:
        repeats = args.repeats or (1 if group in ("llama", "gqa") else 5)
        for shape in SHAPES[group]:
            rows.append(layer(*shape, repeats, clock, args.device))
            phases = ", ".join(
                f"{phase} {1e3 * seconds:.0f} ms ({rows[-1]['over the product'][phase]:.2f})"
                for phase, seconds in rows[-1]["medians_s"].items()
            )
            print(f"{shape[0]}x{shape[1]} ({rows[-1]['route']}): {phases}", flush=True)
    if args.json:
        name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        report = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
                  "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
