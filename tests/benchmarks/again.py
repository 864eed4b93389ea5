"""A second merge of the same models with other settings, and the first, against `ties`.

    OMP_NUM_THREADS=1 python tests/benchmarks/again.py [--layers 4] [--repeats 3] [--json PATH]

The stock command on a base and three fine-tunes with the shapes of SmolLM2-135M (576 wide, 1536
inside, bfloat16), in a fork of a process that has made its imports. `pave_ties` has its statistics
already. The second merge has another strength or balance (`lambda`, `rank_ratio`). CPU seconds,
medians of the rounds, each of which runs everything in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import yaml
from generated import Shape, cost_of_call, write_data, write_model
from mergekit.scripts.run_yaml import main as merge

from mergekit_pave.cli import main as pave

EXPERTS = [f"expert{i}" for i in range(3)]
FREE = {"calibration_dataset": "none"}
# Per method its settings at first, and what is changed for the second merge.
METHODS = {
    "ties": ({}, {}),
    "tsv_m": ({}, {"lambda": 0.9}),
    "tsv_regmean": (FREE, {"lambda": 0.9, "balance": 0.3}),
    "tsv_regmean, other flattening": (FREE, {"flattening": 0.3}),
    "matched_regmean": (FREE, {"lambda": 0.9}),
    "pave_ties": ({"rank_ratio": 0.98}, {"rank_ratio": 0.99}),
}


def config(folder: Path, name: str, settings: dict) -> Path:
    method = name.partition(",")[0]
    models = []
    for expert in EXPERTS:
        own = {"weight": 1.0, "density": 0.2} if method.endswith("ties") else {}
        if method == "pave_ties":
            own["covariance"] = str(folder / f"{expert}-store")
        models.append({"model": str(folder / expert), **({"parameters": own} if own else {})})
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({
        "merge_method": method, "base_model": str(folder / "base"), "models": models,
        "parameters": settings, "dtype": "bfloat16"}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    shape = Shape(576, 1536, 192, options.layers, 8_000)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MERGEKIT_PAVE_CACHE"] = str(folder / "cache")
        write_model(folder / "base", shape)
        data = write_data(folder / "data.jsonl", 16, 64)
        for i, expert in enumerate(EXPERTS):
            write_model(folder / expert, shape, i)
            if "pave_ties" in options.only:
                words = ["calibrate", folder / expert, "--dataset", data, "-o",
                         folder / f"{expert}-store"]
                cost_of_call(lambda w=words: pave([*map(str, w)], standalone_mode=False))

        def run(name: str, settings: dict) -> float:
            words = [str(config(folder, name, settings)), str(folder / "out"), "--quiet"]
            return cost_of_call(lambda: merge(words, standalone_mode=False)).cpu

        for _ in range(options.repeats):
            for name in options.only:
                shutil.rmtree(folder / "cache", ignore_errors=True)
                first, change = METHODS[name]
                seconds.setdefault(f"{name}, first", []).append(run(name, first))
                seconds.setdefault(f"{name}, again", []).append(run(name, first | change))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ties = statistics.median(seconds["ties, first"] + seconds["ties, again"])
    result = {"layers": options.layers, "rounds": options.repeats, "seconds": medians,
              "ratio to ties": {name: taken / ties for name, taken in medians.items()}}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
