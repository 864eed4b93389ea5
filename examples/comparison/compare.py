"""The comparison of one setting: tune, test, ablate. Returns plain data, printed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from bench import Bench, NotScored, Rows
from intervals import Bootstrap, bootstrap
from methods import Ablation, Method, configuration, text
from search import Tuned, tune


@dataclass
class Tested:
    """A method's tuning, and its scores on test rows: seed -> task -> rows."""

    method: Method
    tuned: Tuned
    rows: list[Rows]


@dataclass
class Comparison:
    """Everything measured in one setting."""

    bench: Bench
    seeds: tuple[int, ...]
    references: dict[str, list[Rows]]
    tested: dict[str, Tested] = field(default_factory=dict)
    ablated: list[tuple[Ablation, Rows]] = field(default_factory=list)
    exact: dict[str, list[float]] = field(default_factory=dict)

    @property
    def best_plain(self) -> str | None:
        """The plain method that is best on the *validation* rows."""
        plain = [t for t in self.tested.values() if t.method.group == "plain"]
        return max(plain, key=lambda t: t.tuned.value).method.name if plain else None

    def bootstrap(self, resample_tasks: bool = True) -> Bootstrap:
        scores = self.references | {name: t.rows for name, t in self.tested.items()}
        return self._bootstrap(scores, resample_tasks)

    def ablation_bootstrap(self) -> Bootstrap:
        """Ablations and their parents, on the first seed."""
        scores = {name: rows[:1] for name, rows in self.references.items()}
        scores |= {name: t.rows[:1] for name, t in self.tested.items()}
        scores |= {ablation.name: [rows] for ablation, rows in self.ablated}
        return self._bootstrap(scores, resample_tasks=True)

    def _bootstrap(self, scores: Mapping[str, list[Rows]], resample_tasks: bool) -> Bootstrap:
        setting = self.bench.setting
        groups = self.bench.groups("test")
        return bootstrap(scores, groups, setting.strength, resample_tasks=resample_tasks)


def compare(
    bench: Bench,
    methods: list[Method],
    ablations: tuple[Ablation, ...],
    seeds: tuple[int, ...],
    exact: bool = False,
) -> Comparison:
    """Tune on the first seed's validation rows, then test with every seed."""
    references = {name: [] for name in ("base", "experts")}
    for seed in seeds:
        for name, rows in bench.references(seed, "test").items():
            references[name].append(rows)
    result = Comparison(bench, seeds, references)
    if exact:
        _exact_references(bench, seeds, result)
    for method in methods:
        with _unfinished_left_out(method.name):
            result.tested[method.name] = _tested(bench, method, seeds, exact, result)
    for ablation in ablations:
        if ablation.parent in result.tested:
            with _unfinished_left_out(ablation.name):
                result.ablated.append(_ablated(result, ablation, seeds[0]))
    return result


@contextmanager
def _unfinished_left_out(name: str) -> Iterator[None]:
    try:
        yield
    except NotScored:
        print(f"{name}: not finished, left out", flush=True)


def _tested(
    bench: Bench, method: Method, seeds: tuple[int, ...], exact: bool, result: Comparison
) -> Tested:
    tuned = _tuned(bench, method, seeds[0])
    print(
        f"{method.name}: strength {tuned.strength}, ratio {tuned.ratio}, "
        f"validation {tuned.value:.4f}", flush=True,
    )
    tested, written = Tested(method, tuned, []), []
    for seed in seeds:
        config = configuration(method, bench.place(seed), tuned.strength, tuned.ratio)
        splits = ("test", "exact") if exact else ("test",)
        found = bench.scores(method, method.name, config, seed, splits)
        bench.keep_yaml(method.name, seed, text(method, config))
        tested.rows.append(found["test"])
        if exact:
            written.append(_mean(found["exact"]))
    if exact:
        result.exact[method.name] = written
    return tested


def _tuned(bench: Bench, method: Method, seed: int) -> Tuned:
    references = bench.references(seed, "validation")

    def objective(strength: float | None, ratio: float | None) -> float:
        config = configuration(method, bench.place(seed), strength, ratio)
        rows = bench.scores(method, method.name, config, seed, ("validation",))
        return mean_strength(bench, rows["validation"], references)

    return tune(method, objective, bench.quick)


def mean_strength(bench: Bench, rows: Rows, references: Mapping[str, Rows]) -> float:
    """Over the tasks."""
    means = [np.array([r.mean() for r in of]) for of in
             (rows, references["base"], references["experts"])]
    return float(bench.setting.strength(*means).mean())


def _ablated(result: Comparison, ablation: Ablation, seed: int) -> tuple[Ablation, Rows]:
    """The ablation with all its parameters, and its scores."""
    bench, parent = result.bench, result.tested[ablation.parent]
    method, tuned = parent.method, parent.tuned
    place = bench.place(seed)
    if ablation.of_twin:
        if method.twin not in result.tested:
            raise NotScored
        strength = result.tested[method.twin].tuned.strength
        ablation = replace(ablation, parameters={"lambda": strength})
    if ablation.suggested:
        before = text(method, configuration(method, place, tuned.strength, tuned.ratio))
        ablation = replace(ablation, parameters=bench.suggested(before, seed))
    config = configuration(method, place, tuned.strength, tuned.ratio, ablation)
    rows = bench.scores(method, ablation.name, config, seed, ("test",))["test"]
    bench.keep_yaml(ablation.name, seed, text(method, config))
    return ablation, rows


def _exact_references(bench: Bench, seeds: tuple[int, ...], result: Comparison) -> None:
    for seed in seeds:
        for name, rows in bench.references(seed, "exact").items():
            result.exact.setdefault(name, []).append(_mean(rows))


def _mean(rows: Rows) -> float:
    """Of the one task that has exact answers."""
    return float(np.mean(np.concatenate(rows)))
