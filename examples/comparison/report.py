"""What was measured as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from compare import Comparison, mean_strength
from intervals import Bootstrap, Interval
from methods import Ablation, configuration, text

Record = dict[str, Any]


def records(comparison: Comparison) -> list[Record]:
    """One for every method, base and experts first; differences are to the twin and best plain."""
    all_tasks, these = comparison.bootstrap(), comparison.bootstrap(resample_tasks=False)
    best = comparison.best_plain
    result = []
    for name in ("base", "experts"):
        result.append(_record(comparison, name, comparison.references[name], all_tasks, these))
    for name, tested in comparison.tested.items():
        record = _record(comparison, name, tested.rows, all_tasks, these)
        method, tuned = tested.method, tested.tuned
        record |= {
            "group": method.group,
            "strength": tuned.strength,
            "ratio": tuned.ratio,
            "validation": tuned.value,
            "tried": [list(trial) for trial in tuned.tried],
            "twin": method.twin,
            "best_plain": best,
        }
        for key, other in (("over_twin", method.twin), ("over_best_plain", best)):
            if other in comparison.tested and other != name:
                record[key] = all_tasks.difference(name, other).as_dict()
                record[key + "_these_tasks"] = these.difference(name, other).as_dict()
        record["yaml"] = {
            seed: text(method, configuration(
                method, comparison.bench.place(seed), tuned.strength, tuned.ratio))
            for seed in comparison.seeds
        }
        result.append(record)
    _add_exact(comparison, result)
    return result


def _record(
    comparison: Comparison, name: str, rows: list, all_tasks: Bootstrap, these: Bootstrap
) -> Record:
    tasks = comparison.bench.tasks
    first = {key: of_seeds[0] for key, of_seeds in comparison.references.items()}
    return {
        "name": name,
        "first_seed": mean_strength(comparison.bench, rows[0], first),
        "score": all_tasks.score(name).as_dict(),
        "score_these_tasks": these.score(name).as_dict(),
        "tasks": {
            task: float(np.mean([of_seed[t].mean() for of_seed in rows]))
            for t, task in enumerate(tasks)
        },
        "seeds": comparison.seeds,
    }


def _add_exact(comparison: Comparison, records: list[Record]) -> None:
    """Shares of right answers, where they were written."""
    if "base" not in comparison.exact or "experts" not in comparison.exact:
        return
    drawn = comparison.exact_bootstrap()
    for record in records:
        name, twin = record["name"], record.get("twin")
        if name in comparison.exact:
            record["exact"] = drawn.score(name).as_dict()
            if twin in comparison.exact:
                record["exact_over_twin"] = drawn.difference(name, twin).as_dict()
        if name in comparison.written:
            record["written"] = float(np.mean(np.concatenate(comparison.written[name][0])))


def ablation_records(comparison: Comparison) -> list[Record]:
    """One for every ablation; differences are to the method that it changes."""
    if not comparison.ablated:
        return []
    drawn = comparison.ablation_bootstrap()
    result = []
    for ablation, _ in comparison.ablated:
        tested = comparison.tested[ablation.parent]
        place = comparison.bench.place(comparison.seeds[0])
        config = configuration(tested.method, place, tested.tuned.strength, tested.tuned.ratio,
                               ablation)
        result.append({
            "name": ablation.name,
            "parent": ablation.parent,
            "curve": ablation.curve,
            "value": ablation.value,
            "score": drawn.score(ablation.name).as_dict(),
            "over_parent": drawn.difference(ablation.name, ablation.parent).as_dict(),
            "parent_score": drawn.score(ablation.parent).as_dict(),
            **_over_twin(comparison, drawn, ablation),
            **_over_covariance(comparison, drawn, ablation),
            "seeds": comparison.seeds[:1],
            "yaml": text(tested.method, config),
        })
    return result


def write(comparison: Comparison, folder: Path) -> str:
    """`results.md`, `.csv` and `.json` in the folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    methods, ablations = records(comparison), ablation_records(comparison)
    setting = comparison.bench.setting
    result = {
        "setting": setting.KIND,
        "metric": setting.METRIC,
        "quick": comparison.bench.quick,
        "seeds": comparison.seeds,
        "test_rows": {t: len(r) for t, r in zip(
            comparison.bench.tasks, comparison.references["base"][0], strict=True)},
        "methods": methods,
        "ablations": ablations,
    }
    (folder / "results.json").write_text(json.dumps(result, indent=1))
    _write_csv(folder / "results.csv", methods + ablations, comparison.bench.tasks)
    markdown = _table(comparison, methods) + "\n" + _ablation_table(ablations)
    (folder / "results.md").write_text(markdown)
    return markdown


def _table(comparison: Comparison, records: list[Record]) -> str:
    tasks = comparison.bench.tasks
    percent = comparison.bench.setting.METRIC == "accuracy"
    exact = ["right answers", "over its twin's"] if any("exact" in r for r in records) else []
    header = ["method", "score", *tasks, *exact, "over its twin", "over the best plain", "strength",
              "ratio or separation"]
    lines = [_line(header), "|---" * len(header) + "|"]
    for record in records:
        cells = [record["name"], _cell(record["score"])]
        cells += [_number(value, percent) for value in record["tasks"].values()]
        if exact:
            cells += [_cell(record.get("exact")), _cell(record.get("exact_over_twin"), signed=True)]
        cells += [_cell(record.get(key), signed=True) for key in ("over_twin", "over_best_plain")]
        cells += [_plain(record.get(key)) for key in ("strength", "ratio")]
        lines.append(_line(cells))
    if exact:
        alone = [f"{r['name']} {_number(r['written'], True)}" for r in records if "written" in r]
        lines += ["", "Right answers: percent of the maths test questions for which a model writes "
                  "the right number after the right working. With its own working, first seed: "
                  f"{', '.join(alone)}."]
    return "\n".join(lines) + "\n"


def _over_twin(comparison: Comparison, drawn: Bootstrap, ablation: Ablation) -> Record:
    twin = comparison.tested[ablation.parent].method.twin
    if twin not in comparison.tested:
        return {}
    return {"over_twin": drawn.difference(ablation.name, twin).as_dict()}


def _over_covariance(comparison: Comparison, drawn: Bootstrap, ablation: Ablation) -> Record:
    """Of directions chosen otherwise, at the same ratio."""
    same = [
        other.name for other, _ in comparison.ablated
        if (other.parent, other.value) == (ablation.parent, ablation.value)
        and other.curve == "subspace covariance at ratio"
    ]
    if not same or same[0] == ablation.name or not ablation.curve.startswith("subspace "):
        return {}
    return {"over_covariance": drawn.difference(ablation.name, same[0]).as_dict()}


def _ablation_table(records: list[Record]) -> str:
    if not records:
        return ""
    header = ["ablation", "score", "over the tuned method", "over its twin"]
    lines = [_line(header), "|---" * len(header) + "|"]
    lines += [
        _line([r["name"], _cell(r["score"]), _cell(r["over_parent"], signed=True),
               _cell(r.get("over_twin"), signed=True)])
        for r in records
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(interval: dict[str, float] | None, signed: bool = False) -> str:
    """In percent of the expert, with the interval."""
    if interval is None:
        return ""
    form = "{:+.1f}" if signed else "{:.1f}"
    value, low, high = (form.format(100 * interval[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _write_csv(file: Path, records: list[Record], tasks: tuple[str, ...]) -> None:
    intervals = ("score", "over_twin", "over_best_plain", "over_parent", "over_covariance", "exact",
                 "exact_over_twin")
    header = ["name", "group", "strength", "ratio", "validation", *tasks]
    header += [f"{key}{end}" for key in intervals for end in ("", "_low", "_high")]
    with open(file, "w", newline="") as opened:
        rows = csv.DictWriter(opened, header)
        rows.writeheader()
        for record in records:
            row = {key: record.get(key, "") for key in header[:5]} | record.get("tasks", {})
            for key in intervals:
                if key in record:
                    found = Interval(**record[key])
                    row |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
            rows.writerow(row)
