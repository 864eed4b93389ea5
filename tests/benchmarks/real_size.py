"""The stock command at the sizes of real models: what each method costs beside `ties`.

    OMP_NUM_THREADS=1 nice python tests/benchmarks/real_size.py [--layers 24] [--small]
        [--vocabulary 32000] [--rows 16] [--only ties ...] [--keep PATH] [--json PATH]

Generated Llama-shaped families, a base and two fine-tunes in bfloat16 shards: two small ones
(512 and 1024 wide) and a large one with the shapes of a 1.5 B model (2048 wide, 5632 inside,
32,000 words), of which `--layers` says how many. Every run is the stock command's own function in a
fork of a process that has made its imports, which cost every command about 4 seconds more, with the
models dropped from the page cache before it.

The seconds that a method needs besides are modelled as

    per_parameter * parameters + per_operation * operations

with one operation for each `out * in * min(out, in)` of a linear layer: what reads, casts and adds
grows with the first, what factorises with the second. Both rates come from the two small
families alone; the large one is predicted before it is measured. Then all three give the rates
from which 7B and 70B are predicted. Processor seconds are modelled: beside other work wall
seconds tell of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from generated import Cost, Shape, cost_of_call, forget, write_data, write_model
from mergekit.scripts.run_yaml import main as merge

from mergekit_pave.cli import main as pave

SMALL = (Shape(512, 1408, 128, 2, 4_000), Shape(1024, 2816, 256, 1, 4_000))
LENGTH = 64
LLAMA = {
    "7B": Shape(4096, 11008, 4096, 32, 32_000), "70B": Shape(8192, 28672, 1024, 80, 128_256)}
# Per method what it reads beside the models.
METHODS = {
    "ties": "", "tsv_m": "", "regmean": "store", "pave_ties": "store", "tsv_regmean": "none"}
AGAIN = "pave_ties, again"
RUNS = ["calibrate", *METHODS, AGAIN]


def features(shape: Shape) -> tuple[float, float]:
    """Parameters, and operations of the factorisations of the linear layers."""
    return shape.parameters, shape.layers * sum(a * b * min(a, b) for a, b in shape.weights)


def config(folder: Path, method: str) -> Path:
    statistics = METHODS[method]
    models = []
    for name in ("expert0", "expert1"):
        own = {"weight": 1.0, "density": 0.2} if method.endswith("ties") else {}
        if statistics == "store":
            own["covariance"] = str(folder / f"{name}-store")
        models.append({"model": str(folder / name), **({"parameters": own} if own else {})})
    whole = {"merge_method": method, "base_model": str(folder / "base"), "models": models,
             "dtype": "bfloat16"}
    if statistics == "none":
        whole["parameters"] = {"calibration_dataset": "none"}
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(whole))
    return path


def measure(
    shape: Shape, rows: int, folder: Path, wanted: Sequence[str], done: dict[str, Cost]
) -> Iterator[tuple[str, Cost]]:
    """The cost of each wanted command on a family of that shape, but of those that are done."""
    names = [name for name in wanted if name not in done]
    if not names:
        return
    models = [write_model(folder / "base", shape)]
    models += [write_model(folder / f"expert{i}", shape, i) for i in range(2)]
    data = write_data(folder / "data.jsonl", rows, LENGTH)
    out, cache = folder / "out", folder / "cache"

    def run(main: Callable, *arguments: object, keep: bool = False) -> Cost:
        if not keep:
            shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        forget(*models)
        words = [str(argument) for argument in arguments]
        return cost_of_call(lambda: main(words, standalone_mode=False))

    os.environ["MERGEKIT_PAVE_CACHE"] = str(cache)
    if any(METHODS.get(name, "store") == "store" for name in names):
        for model in models[1:]:
            cost = run(pave, "calibrate", model, "--dataset", data, "-o", f"{model}-store")
        if "calibrate" in names:
            yield "calibrate", cost
    for name in [name for name in METHODS if name in names]:
        yield name, run(merge, config(folder, name), out, "--quiet")
    if AGAIN in names:
        if "pave_ties" not in names:
            run(merge, config(folder, "pave_ties"), out, "--quiet")
        yield AGAIN, run(merge, config(folder, "pave_ties"), out, "--quiet", keep=True)


def rates(families: list[tuple[Shape, dict[str, Cost]]], name: str) -> tuple[float, float]:
    """Seconds per parameter and per operation, neither below 0, by relative least squares."""
    from scipy.optimize import nnls

    rows, right = [], []
    for shape, costs in families:
        rows.append([value / costs[name].cpu for value in features(shape)])
        right.append(1.0)
    matrix = np.array(rows)
    scale = matrix.max(0)
    solution, _ = nnls(matrix / scale, np.array(right))
    return tuple((solution / scale).tolist())


def predicted(shape: Shape, rate: tuple[float, float]) -> float:
    return float(np.dot(features(shape), rate))


def report(families: list[tuple[Shape, dict[str, Cost]]], rows: int) -> dict:
    """Ratios, rates and predictions, for the runs that all families have."""
    small, large = families[: len(SMALL)], families[len(SMALL):]
    names = [name for name in RUNS if all(name in costs for _, costs in families)]
    fitted = {name: rates(families, name) for name in names}
    return {
        "tokens": rows * LENGTH,
        "families": [
            {"shape": asdict(shape), "parameters": shape.parameters,
             "costs": {name: asdict(cost) for name, cost in costs.items()},
             "ratios to ties": {n: costs[n].ratios(costs["ties"]) for n in names}}
            for shape, costs in families],
        "CPU seconds of the large family, predicted from the small ones / measured": {
            name: predicted(shape, rates(small, name)) / costs[name].cpu
            for shape, costs in large for name in names},
        "seconds per parameter and per operation": fitted,
        "CPU hours predicted": {
            size: {name: predicted(shape, rate) / 3600 for name, rate in fitted.items()}
            for size, shape in LLAMA.items()},
    }


def table(result: dict) -> str:
    """The large family as a table of ratios to `ties`."""
    last = result["families"][-1]
    check = result["CPU seconds of the large family, predicted from the small ones / measured"]
    lines = ["| | wall | CPU | peak | read | written | CPU predicted / measured | 7B, CPU hours | "
             "70B |", "|---|---|---|---|---|---|---|---|---|"]
    for name, ratios in last["ratios to ties"].items():
        hours = [result["CPU hours predicted"][size][name] for size in LLAMA]
        cells = [f"{ratios[k]:.2f}" for k in ("wall", "cpu", "peak", "read", "written")]
        cells += [f"{check[name]:.2f}" if name in check else "", *(f"{h:.2g}" for h in hours)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def load(path: Path | None) -> list[tuple[Shape, str, Cost]]:
    """What an earlier run has measured."""
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(Shape(**x["shape"]), x["name"], Cost(**x["cost"])) for x in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--small", action="store_true", help="the small families alone")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--keep", type=Path, help="a file of what is measured, one run a line: "
                        "what it has already is not run again")
    parser.add_argument("--json", type=Path, help="the results")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    large = Shape(layers=options.layers, vocabulary=options.vocabulary)
    shapes = [*SMALL, *([] if options.small else [large])]
    measured = load(options.keep)
    for shape in shapes:
        done = {name: cost for s, name, cost in measured if s == shape}
        with tempfile.TemporaryDirectory() as folder:
            for name, cost in measure(shape, options.rows, Path(folder), options.only, done):
                measured.append((shape, name, cost))
                line = json.dumps({"shape": asdict(shape), "name": name, "cost": asdict(cost)})
                sys.stderr.write(f"{line}\n")
                if options.keep:
                    with options.keep.open("a") as file:
                        file.write(f"{line}\n")
    families = [(shape, {n: c for s, n, c in measured if s == shape}) for shape in shapes]
    result = report(families, options.rows)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
