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
    exact: dict[str, list[Rows]] = field(default_factory=dict)  # right answers
    written: dict[str, list[Rows]] = field(default_factory=dict)

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

    def exact_bootstrap(self) -> Bootstrap:
        """Shares of right answers, over the rows and seeds of the one task that has such."""
        groups = [of for of, rows in zip(
            self.bench.groups("test"), self.exact["base"][0], strict=True) if len(rows)]
        scores = {name: [[rows for rows in of_seed if len(rows)] for of_seed in seeds]
                  for name, seeds in self.exact.items()}
        return bootstrap(scores, groups, lambda model, base, expert: model, resample_tasks=False)

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
        for seed in seeds:
            bench.references(seed, "exact")
        bench.references(seeds[0], "written")  # hardly any is right
    for name in references:
        _keep(result.exact, name, [bench.known(name, seed, "exact") for seed in seeds])
        _keep(result.written, name, [bench.known(name, seeds[0], "written")])
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
    tested, answers = Tested(method, tuned, []), []
    for seed in seeds:
        config = configuration(method, bench.place(seed), tuned.strength, tuned.ratio)
        splits = ("test", "exact") if exact else ("test",)
        found = bench.scores(method, method.name, config, seed, splits)
        bench.keep_yaml(method.name, seed, text(method, config))
        tested.rows.append(found["test"])
        answers.append(bench.known(text(method, config), seed, "exact"))
    _keep(result.exact, method.name, answers)
    return tested


def _keep(found: dict[str, list[Rows]], name: str, rows: list[Rows | None]) -> None:
    """Where every seed has been scored, whether in this run or before."""
    if all(of_seed is not None for of_seed in rows):
        found[name] = rows


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
