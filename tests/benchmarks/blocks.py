"""Calibration of a model larger than its budgets: block by block against window by window.

    OMP_NUM_THREADS=1 python tests/benchmarks/blocks.py [--layers 14] [--rows 4] [--batch-size 4]
        [--max-memory 500MB] [--statistics-memory 250MB] [--json PATH]

A generated Llama-shaped model (2048 wide, 5632 inside) in bfloat16, 1.5 GB at 14 layers. Both
ways run the same command in turn. Bytes are those of the weights that accelerate takes from
the shards, as stored there: the page cache serves some of them, on a machine that has the memory
for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from generated import Shape, cost_of, write_data, write_model

from mergekit_pave.storage.covariances import CovarianceStore

# Counts what is read, and finds no blocks if it is told so.
CHILD = """
import sys
from contextlib import contextmanager
from accelerate.utils.offload import OffloadedWeightsLoader
from mergekit_pave import cli
from mergekit_pave.calibration import plan
from mergekit_pave.calibration.observed import Observed

read = 0
real = OffloadedWeightsLoader.__getitem__

def counted(self, key):
    global read
    tensor = real(self, key)
    read += tensor.numel() * 2
    return tensor

@contextmanager
def nothing(*args):
    yield Observed()

OffloadedWeightsLoader.__getitem__ = counted
if sys.argv.pop(1) == "windows":
    plan.observed = nothing
try:
    cli.main(standalone_mode=False)
finally:
    print(f"\\nread={read}", file=sys.stderr)
"""


def difference(one: Path, other: Path) -> float:
    """Largest relative difference of two stores' covariances."""
    a, b = CovarianceStore(one), CovarianceStore(other)
    assert a.weights == b.weights
    return max(
        float((a.covariance(s) - b.covariance(s)).norm() / b.covariance(s).norm())
        for s in b.sites)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    shape = Shape(layers=options.layers)
    model = write_model(folder / "model", shape)
    data = write_data(folder / "data.jsonl", options.rows, 64)
    cost, read = {}, {}
    for way in ("windows", "blocks"):
        cost[way], err = cost_of([
            sys.executable, "-c", CHILD, way, "calibrate", model, "--dataset", data,
            "--batch-size", options.batch_size, "--max-memory", options.max_memory,
            "--statistics-memory", options.statistics_memory, "-o", folder / way])
        read[way] = int(err.rpartition("read=")[2])
    ratios = cost["windows"].ratios(cost["blocks"])
    return {
        "parameters": shape.parameters,
        **{f"{way}: {name}": value for way in cost for name, value in vars(cost[way]).items()
           if name in ("wall", "cpu", "peak")},
        **{f"{way}: weights read": value for way, value in read.items()},
        "weights read, windows / blocks": read["windows"] / read["blocks"],
        **{f"{name}, windows / blocks": ratios[name] for name in ("wall", "cpu", "peak")},
        "largest difference": difference(folder / "blocks", folder / "windows"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-memory", default="500MB")
    parser.add_argument("--statistics-memory", default="250MB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    for name, value in figures.items():
        print(f"{name:32} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
