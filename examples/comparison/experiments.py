"""What the table does not show, on the encoder's experts of one seed (`run.py` trains them).

    python examples/comparison/experiments.py [interference] [conflict] [separation] [--seed N]

* interference: how much the tasks' weights disturb each other before and after purification:
  singular task interference (TSV paper, section 3.2), and how strongly a task vector answers to the
  inputs of the other tasks, relative to its own.
* conflict: the two tasks that merge worst; parts of their task vectors dropped at random or by
  purification, up to nearly all.
* separation: other shapes of `purify: separate` on the same generalised eigenvectors, in memory.

Every merge but those of `separation` runs through the stock command. Tuning, and all of
`separation`, sees validation rows; `conflict` is reported on test rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import run

EXPERIMENTS = ("interference", "conflict", "separation")
FORMS = ("none", "weight", "delta", "separate")
DROPPED = (0.25, 0.5, 0.75, 0.9)  # of every task vector
PAPER_RATIOS = (0.998, 0.98, 0.9)  # of every weight
STRENGTHS = (0.25, 0.4, 0.6, 0.9)
PAIRED = 0.6  # the strength at which pairs are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT",
                        help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=run.HERE / "out", help="of run.py")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if unknown := set(args.experiments) - {*EXPERIMENTS}:
        parser.error(f"no experiment {', '.join(sorted(unknown))}")
    run.require_packages(("encoder",))
    run.surroundings()
    import encoder
    import torch
    from bench import Bench
    from transformers.utils import logging

    import mergekit_pave

    torch.set_num_threads(args.threads)
    mergekit_pave.register()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    out = args.out.resolve() / "encoder"
    os.environ["MERGEKIT_PAVE_CACHE"] = str(out / "cache")
    bench = Bench(encoder, out, quick=False)
    expert = bench.place(args.seed).expert
    if missing := [task for task in bench.tasks if not expert(task).exists()]:
        raise SystemExit(
            f"No experts of seed {args.seed} for {', '.join(missing)} in {out}: train them with "
            f"run.py --setting encoder --only average --ablations none --seeds {args.seed}"
        )
    for name in args.experiments or EXPERIMENTS:
        found = globals()[name](bench, args.seed)
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{table(found)}\n", flush=True)


def table(rows: list[dict]) -> str:
    """Markdown; numbers with four digits."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key, "") for key in heads] for row in rows]
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells])


# --- models and statistics in memory -------------------------------------------------------


def tensors(folder: Path) -> dict:
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def covariances(bench, seed: int) -> dict[str, Callable]:
    """Task -> reader of the (in, in) covariance of a weight, by its name."""
    from bench import pave

    from mergekit_pave.storage.covariances import CovarianceStore
    from mergekit_pave.storage.identity import same_layer

    place, found = bench.place(seed), {}
    for task in bench.tasks:
        folder = bench.out / "covariances" / str(seed) / task
        if not (folder / "manifest.json").exists():
            data = bench.out / "calibration" / f"{task}.jsonl"
            pave("calibrate", place.expert(task), "--dataset", data, "-o", folder,
                 "--num-calibration-samples", place.samples, "--max-seq-length", place.max_length)
        store = CovarianceStore(folder)

        def read(name: str, store=store):
            key = next(key for key in store.weights if same_layer(key, name))
            return store.covariance(store.weights[key].site).double()

        found[task] = read
    return found


def layers(base: dict) -> list[str]:
    """The weights that are purified: the linear layers of the encoder."""
    return [name for name, tensor in base.items() if tensor.ndim == 2 and ".layer." in name]


# --- interference --------------------------------------------------------------------------


def interference(bench, seed: int) -> list[dict]:
    """One row for every form of purification."""
    import torch

    from mergekit_pave.algebra.tsv import factors, kept_rank
    from mergekit_pave.algebra.tsv import interference as of_parts

    base, moments, rows = tensors(bench.out / "base"), covariances(bench, seed), []
    for form in FORMS:
        changed = [purified_alone(bench, seed, form, task) for task in bench.tasks]
        sums = {"STI over sum of s": [], "answer to others over own": [], "own answer kept": [],
                "norm of task vector": []}
        for name in layers(base):
            deltas = [model[name].double() - base[name].double() for model in changed]
            plain = [model[name].double() - base[name].double() for model in _experts(bench, seed)]
            count = kept_rank(deltas[0].shape, len(deltas))
            sums["STI over sum of s"].append(of_parts([factors(d, count) for d in deltas])[1])
            cs = [moments[task](name) for task in bench.tasks]
            energy = torch.tensor([[((d @ c) * d).sum() for c in cs] for d in deltas])
            before = torch.tensor([((d @ c) * d).sum() for d, c in zip(plain, cs, strict=True)])
            own = energy.diagonal()
            others = (energy.sum(1) - own) / (len(cs) - 1)
            sums["answer to others over own"].append((others / own).mean().item())
            sums["own answer kept"].append((own / before).mean().item())
            norms = [(d.norm() / p.norm()).item() for d, p in zip(deltas, plain, strict=True)]
            sums["norm of task vector"].append(float(np.mean(norms)))
        rows.append({"purify": form} | {key: float(np.mean(v)) for key, v in sums.items()})
        print(f"  {rows[-1]}", flush=True)
    return rows


def _experts(bench, seed: int) -> Iterator[dict]:
    for task in bench.tasks:
        yield tensors(bench.place(seed).expert(task))


def purified_alone(bench, seed: int, form: str, task: str) -> dict:
    """The expert after `purify: form`: a sum in which all others have weight 0.

    Ranks are allotted uniformly, since models of weight 0 take no part in the allocation.
    """
    if form == "none":
        return tensors(bench.place(seed).expert(task))
    from methods import METHODS, configuration, text

    (method,) = (m for m in METHODS if m.name == f"pave_task_arithmetic ({form})")
    config = configuration(method, bench.place(seed), 1.0)
    config["parameters"]["rank_allocation"] = "uniform"
    for model, own in zip(config["models"], bench.tasks, strict=True):
        model["parameters"]["weight"] = float(own == task)
    with bench.merged(method, f"{task} purified ({form})", text(method, config), seed) as models:
        return tensors(models[task])


# --- conflict ------------------------------------------------------------------------------


def conflict(bench, seed: int) -> list[dict]:
    """The worst pair of tasks: score on test rows as parts of the task vectors go."""
    from compare import mean_strength
    from intervals import bootstrap
    from methods import METHODS, Method

    methods = {method.name: method for method in METHODS}

    def score(pair, method: Method, split: str, strength: float, **changes) -> float:
        rows = _pair_scores(pair, method, split, seed, strength, changes)
        return mean_strength(pair, rows, pair.references(seed, split))

    plain, merged = methods["task_arithmetic"], {}
    for tasks in itertools.combinations(bench.tasks, 2):
        pair = _pair(bench, tasks)
        merged[pair] = score(pair, plain, "validation", PAIRED)
        print(f"  {' and '.join(tasks)}: {merged[pair]:.4f}", flush=True)
    pair = min(merged, key=merged.__getitem__)
    dare = Method("dare", "dare_linear", "plain", model_parameters={"weight": 1.0})
    by_name = "pave_task_arithmetic ({})".format
    tried = [("nothing", 0.0, plain, {})]
    for share in DROPPED:
        kept = round(1 - share, 4)
        tried += [("entries at random, rescaled (DARE)", share, dare, {"density": kept})]
        tried += [
            (f"directions of the task vector, {space}", share, methods[by_name("delta")],
             {"rank_ratio": kept, "subspace": space})
            for space in ("random", "svd", "covariance")
        ]
    for ratio in PAPER_RATIOS:
        tried += [
            (f"directions of the weight, {space}", round(1 - ratio, 4),
             methods[by_name("weight")], {"rank_ratio": ratio, "subspace": space})
            for space in ("random", "svd", "covariance")
        ]
    tried += [("what answers to the other's inputs (separate)", 0.0,
               methods[by_name("separate")], {})]
    rows = []
    found = {name: [scores] for name, scores in pair.references(seed, "test").items()}
    for what, share, method, changes in tried:
        # Each at its best strength, on validation rows.
        tuned = {s: score(pair, method, "validation", s, **changes) for s in STRENGTHS}
        best = max(tuned, key=tuned.__getitem__)
        found[f"{what} {share}"] = [_pair_scores(pair, method, "test", seed, best, changes)]
        rows.append({"dropped": what, "share": share, "strength": best})
    drawn = bootstrap(found, pair.groups("test"), pair.setting.strength, resample_tasks=False)
    for row in rows:
        name = f"{row['dropped']} {row['share']}"
        over = drawn.difference(name, "nothing 0.0").as_dict()
        row["score"] = drawn.score(name).value
        row["over nothing"] = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**over)
    return [{"dropped": f"({' and '.join(pair.tasks)})"}, *rows]


def _pair(bench, tasks: tuple[str, str]):
    """A bench of its own: it remembers what its tasks' experts are."""
    from bench import Bench

    pair = Bench(bench.setting, bench.out, bench.quick)
    pair.tasks = tasks
    return pair


def _pair_scores(pair, method, split: str, seed: int, strength: float, changes: dict):
    from methods import configuration

    config = configuration(method, pair.place(seed), strength)
    for name, value in changes.items():
        if name == "density":
            for model in config["models"]:
                model["parameters"][name] = value
        else:
            config["parameters"][name] = value
    return pair.scores(method, f"conflict, {method.name}", config, seed, (split,))[split]


# --- separation ----------------------------------------------------------------------------


def separation(bench, seed: int) -> list[dict]:
    """`D M V f(L) V^T` with `C_t V = M V L`, `V^T M V = I`: `f(l) = l` is `purify: separate`.

    The eigenvalue is the share of its own task in the answer of a direction, 0 to 1 in every layer,
    so that one threshold allots ranks across models and layers. Summed as in task arithmetic.
    """
    import torch
    from compare import mean_strength

    from mergekit_pave.algebra.subspace import damped

    base, moments = tensors(bench.out / "base"), covariances(bench, seed)
    experts, names = list(_experts(bench, seed)), layers(base)
    references = bench.references(seed, "validation")

    def summed(values: Callable, rescaled: bool) -> dict:
        total = {}
        for name, tensor in base.items():
            deltas = [expert[name].double() - tensor.double() for expert in experts]
            if name in names:
                parts = decompositions(name)
                weights = values([eigenvalues for eigenvalues, _, _ in parts])
                for t, (_, left, right) in enumerate(parts):
                    new = ((deltas[t] @ left) * weights[t]) @ right
                    if rescaled:
                        c = moments[bench.tasks[t]](name)
                        before, after = (((d @ c) * d).sum() for d in (deltas[t], new))
                        new *= (before / after).sqrt()
                    deltas[t] = new
            total[name] = sum(deltas)
        return total

    kept: dict[str, list] = {}

    def decompositions(name: str) -> list:
        """Per task: eigenvalues, `M V` and `V^T`."""
        if name not in kept:
            cs = [moments[task](name) for task in bench.tasks]
            mean, kept[name] = sum(cs), []
            for own in cs:
                mixed = damped(torch.lerp(own, mean, 1 / (len(cs) - 1)), dampening_frac=0.01)
                lower = torch.linalg.cholesky(mixed)
                half = torch.linalg.solve_triangular(lower, own, upper=False)
                half = torch.linalg.solve_triangular(lower, half.mT, upper=False)
                eigenvalues, q = torch.linalg.eigh(half)
                right = torch.linalg.solve_triangular(lower.mT, q, upper=True).mT
                kept[name].append((eigenvalues.clamp(0, 1), (lower @ q), right))
        return kept[name]

    def threshold(level: float) -> Callable:
        return lambda spectra: [(s >= level).double() for s in spectra]

    def pooled(share: float) -> Callable:
        def of(spectra: list) -> list:
            values = torch.cat(spectra).sort(descending=True).values
            return threshold(values[int(share * len(values)) - 1].item())(spectra)

        return of

    def steep(spectra: list) -> list:
        return [s**2 / (s**2 + (1 - s) ** 2) for s in spectra]

    shapes = [
        ("soft (purify: separate)", lambda spectra: spectra, False),
        ("soft, own answer rescaled to what it was", lambda spectra: spectra, True),
        ("steeper: l^2 / (l^2 + (1 - l)^2)", steep, False),
        *((f"hard: l >= {level}, across layers and models", threshold(level), False)
          for level in (0.1, 0.25, 0.5)),
        *((f"hard: the best {share:.0%} of every layer, across models", pooled(share), False)
          for share in (0.25, 0.5)),
    ]  # fmt: skip
    rows = []
    for what, values, rescaled in shapes:
        total, scores = summed(values, rescaled), {}
        for strength in (*STRENGTHS[1:], 1.3):
            model = {n: (t.double() + strength * total[n]).to(t) for n, t in base.items()}
            scores[strength] = mean_strength(bench, _scored(bench, seed, model), references)
        best = max(scores, key=scores.__getitem__)
        rows.append({"shape": what, "strength": best, "validation": scores[best]})
        print(f"  {rows[-1]} {scores}", flush=True)
    return rows


def _scored(bench, seed: int, model: dict) -> list[np.ndarray]:
    """On validation rows."""
    import shutil

    from safetensors.torch import save_file

    folder = bench.out / "merged" / f"separation-{os.getpid()}"
    shutil.copytree(bench.out / "base", folder, dirs_exist_ok=True)
    try:
        save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
        where = (seed, "validation", bench.quick)
        rows = (bench.setting.score(bench.out, folder, task, *where) for task in bench.tasks)
        return list(map(np.asarray, rows))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
