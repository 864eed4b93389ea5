"""What is compared, as data: every entry becomes YAML files that `mergekit-yaml` runs.

To add a method, add an entry. One that the installed mergekit does not know is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

# Five strengths each. A plain method tries all and then one between the best two; one with a
# second parameter finds the best with four and spends two on that: six merges for everyone.
SUM = (0.15, 0.25, 0.4, 0.6, 0.9)  # of methods that add task vectors up
MEAN = (0.75, 1.25, 1.75, 2.5, 3.5)  # of methods that average them
SOLVED = (0.7, 0.85, 1.0, 1.2, 1.5)  # of those that keep tasks apart, where 1 is meant
FLATTENED = (0.7, 1.0, 1.25, 1.5, 1.8)
MATCHED = (0.5, 0.65, 0.8, 1.0, 1.2)
SHRUNK = (0.2, 0.35, 0.5, 0.75, 1.0)
WEIGHT_RATIOS = (0.98, 0.95, 0.995)  # of `purify: weight`; the first is the default
DELTA_RATIOS = (0.25, 0.1, 0.5)  # of `purify: delta`
SEPARATIONS = (None, 0.1, 0.5)  # `separation` of `purify: separate`, `averaging` of `regmean`

# What turns a merge's folder, or a YAML file, into one model for every task.
TASK_MODELS = {
    "emr": "mergekit-yaml, then `mergekit-pave materialize OUT TASK DIR` for every task",
    "tsv_c": "mergekit-pave compress, then `mergekit-pave reconstruct OUT/TASK DIR` for every task",
}


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: in tables and files.
        merge_method: mergekit's.
        group: `plain`, or what the purified one purifies (`weight` is the PAVE paper's), or
            `per task`.
        strengths: values of `lambda` that are tried, in order; none for a method without one.
        ratios: values of `ratio_key` that are tried, the default first.
        ratio_key: the second parameter that is tuned.
        parameters: of the merge.
        model_parameters: of every model.
        twin: the plain method that this one purifies.
        task_models: for a method that makes one model for every task, which of `TASK_MODELS`.
        calibration: for a method that looks at data, whose; as in `Ablation`.
    """

    name: str
    merge_method: str
    group: str
    strengths: tuple[float, ...] = ()
    ratios: tuple[float | None, ...] = ()
    ratio_key: str = "rank_ratio"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model_parameters: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None
    task_models: str | None = None
    calibration: str = "own"


@dataclass(frozen=True)
class Ablation:
    """One change to a tuned method, nothing tuned again.

    Attributes:
        parent: a method's name.
        curve: which figure or table it belongs to.
        value: its place on that curve.
        parameters: replaced in the merge.
        samples: rows of calibration instead of the setting's.
        calibration: `own`, the `next` task's rows, `none` at all, or text that the fine-tuned
            model writes (`self`).
        suggested: the parameters are those that `mergekit-pave suggest` prints for the merge.
        of_twin: the strength is that of the plain method, which was tuned more finely.
    """

    parent: str
    curve: str
    value: str | float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None
    calibration: str = "own"
    suggested: bool = False
    of_twin: bool = False

    @property
    def name(self) -> str:
        return f"{self.parent}, {self.curve} {self.value}"


_SPARSE = {"weight": 1.0, "density": 0.2}
_PLAIN = {
    # name: (strengths, parameters of every model)
    "task_arithmetic": (SUM, {"weight": 1.0}),
    "ties": (MEAN, _SPARSE),
    "dare_ties": (SUM, _SPARSE),
    "breadcrumbs": (SUM, {"weight": 1.0, "density": 0.8, "gamma": 0.05}),
    "della": (MEAN, {"weight": 1.0, "density": 0.5}),
    "tsv_m": (SOLVED, {"weight": 1.0}),
    "regmean": (SOLVED, {"weight": 1.0}),
}
# Elsewhere the paper's form is enough to see what purification does.
_PURIFIED = {
    "weight": tuple(_PLAIN),
    "delta": ("task_arithmetic", "ties", "tsv_m", "regmean"),
    "separate": ("task_arithmetic", "ties", "tsv_m"),
}


def _purified(
    name: str,
    purify: str,
    strengths: tuple[float, ...] = (),
    model_parameters: Mapping[str, Any] | None = None,
    task_models: str | None = None,
) -> Method:
    return Method(
        f"pave_{name} ({purify})",
        f"pave_{name}",
        purify,
        strengths,
        {"weight": WEIGHT_RATIOS, "delta": DELTA_RATIOS, "separate": SEPARATIONS}[purify],
        "separation" if purify == "separate" else "rank_ratio",
        {"purify": purify},
        model_parameters or {},
        twin=name,
        task_models=task_models,
    )


METHODS: tuple[Method, ...] = (
    Method("average", "linear", "plain", model_parameters={"weight": 1.0}),
    *(Method(name, name, "plain", grid, model_parameters=own)
      for name, (grid, own) in _PLAIN.items()),
    Method("regmean (averaging)", "regmean", "plain", SOLVED, (0.2, 0.1, 0.5), "averaging",
           twin="regmean"),
    Method("regmean (flattened)", "regmean", "plain", FLATTENED, (0.2, 0.1, 0.5),
           "averaging", {"flattening": 0.5}, twin="regmean"),
    Method("tsv_regmean", "tsv_regmean", "plain", FLATTENED, (0.5, 0.3, 0.7), "balance",
           {"flattening": 0.5}, twin="tsv_m"),
    Method("regmean (flattened without data)", "regmean", "plain", FLATTENED, (0.2, 0.1, 0.5),
           "averaging", {"flattening": 0.5}, twin="regmean", calibration="none"),
    Method("tsv_regmean (without data)", "tsv_regmean", "plain", FLATTENED, (0.5, 0.3, 0.7),
           "balance", {"flattening": 0.5}, twin="tsv_m", calibration="none"),
    Method("matched_regmean (without data)", "matched_regmean", "plain", MATCHED,
           twin="tsv_regmean (without data)", calibration="none"),
    *(
        _purified(name, purify, SHRUNK if (name, purify) == ("tsv_m", "separate") else
                  _PLAIN[name][0], _PLAIN[name][1])
        for purify, names in _PURIFIED.items()
        for name in names
    ),
    replace(_purified("task_arithmetic", "separate", SUM, {"weight": 1.0}), calibration="none",
            name="pave_task_arithmetic (separate without data)"),
    Method("emr", "emr", "per task", task_models="emr"),
    *(_purified("emr", purify, task_models="emr") for purify in ("weight", "delta", "separate")),
    # Reads base and models alone from its YAML.
    Method("tsv_c", "tsv_m", "per task", model_parameters={"weight": 1.0}, task_models="tsv_c"),
)
QUICK = ("average", "ties", "pave_ties (weight)", "pave_ties (delta)", "emr", "tsv_c")

_CURVE = {  # of `rank_ratio`
    "weight": (0.8, 0.9, 0.95, 0.98, 0.998),
    "delta": (0.05, 0.1, 0.25, 0.5, 0.9),
}


def ablations(samples: tuple[int, ...], quick: bool, writes: bool) -> tuple[Ablation, ...]:
    """All of them.

    Args:
        samples: sizes of the sample-size curve.
        quick: a few.
        writes: the models can write their own calibration data.
    """
    if quick:
        return (
            Ablation("pave_ties (weight)", "subspace random at ratio", 0.9,
                     {"rank_ratio": 0.9, "subspace": "random"}),
            Ablation("pave_ties (weight)", "samples", samples[0], samples=samples[0]),
        )
    result = []
    for purify in ("weight", "delta", "separate"):
        parent = f"pave_task_arithmetic ({purify})"
        if purify in _CURVE:
            result += _of_ranks(parent, _CURVE[purify])
        result += _of_data(parent, samples, writes)
        result += [
            Ablation(parent, "dampening", value, {"dampening_frac": value})
            for value in (0.001, 0.01, 0.1, 1.0)
        ]
    result += _of_data("tsv_regmean", samples, writes)
    result.append(Ablation("pave_task_arithmetic (weight)", "parameters", "of suggest",
                           suggested=True))
    result += [
        Ablation(f"pave_{name} ({purify})", "strength", "of the plain method", of_twin=True)
        for purify in ("weight", "delta") for name in _PURIFIED[purify]
    ]
    return tuple(result)


def _of_data(parent: str, samples: tuple[int, ...], writes: bool) -> list[Ablation]:
    """How much, and whose."""
    sources = {"of the next task": "next", "without data": "none"}
    if writes:
        sources["written by itself"] = "self"
    return [
        *(Ablation(parent, "samples", count, samples=count) for count in samples),
        *(Ablation(parent, "calibration", what, calibration=source)
          for what, source in sources.items()),
    ]


def _of_ranks(parent: str, ratios: tuple[float, ...]) -> list[Ablation]:
    """What goes, and how it is shared out: only where whole directions go."""
    return [
        *(
            Ablation(parent, f"subspace {space} at ratio", ratio,
                     {"rank_ratio": ratio, "subspace": space})
            for space in ("covariance", "svd", "random") for ratio in ratios
        ),
        Ablation(parent, "allocation", "uniform", {"rank_allocation": "uniform"}),
        Ablation(parent, "subspace", "svd", {"subspace": "svd"}),
        Ablation(parent, "subspace", "random", {"subspace": "random"}),
    ]


@dataclass(frozen=True)
class Place:
    """Where a merge finds its models and data."""

    out: Path
    seed: int
    tasks: tuple[str, ...]
    samples: int
    max_length: int

    def expert(self, task: str) -> Path:
        return self.out / "experts" / str(self.seed) / task


def configuration(
    method: Method,
    place: Place,
    strength: float | None = None,
    ratio: float | None = None,
    ablation: Ablation | None = None,
) -> dict[str, Any]:
    """The merge as mergekit reads it."""
    shared = dict(method.parameters)
    if strength is not None:
        shared["lambda"] = strength
    if ratio is not None:
        shared[method.ratio_key] = ratio
    if ablation:
        shared |= ablation.parameters
    data = "calibration_dataset" in _declared(method.merge_method)
    if data:
        shared |= {
            "num_calibration_samples": (ablation and ablation.samples) or place.samples,
            "max_seq_length": place.max_length,
        }
    models = []
    for index, task in enumerate(place.tasks):
        own = dict(method.model_parameters)
        if data:
            source = (ablation or method).calibration
            own["calibration_dataset"] = _calibration(place, index, source)
        models.append({"model": str(place.expert(task)), "parameters": own})
    result = {
        "merge_method": method.merge_method,
        "models": models,
        "parameters": shared,
        "dtype": "float32",
    }
    if method.merge_method != "linear":  # has no base
        result["base_model"] = str(place.out / "base")
    return {key: value for key, value in result.items() if value != {}}


def _calibration(place: Place, index: int, source: str) -> str:
    if source in ("none", "self"):
        return source
    task = place.tasks[(index + (source == "next")) % len(place.tasks)]
    return str(place.out / "calibration" / f"{task}.jsonl")


def text(method: Method, configuration: Mapping[str, Any]) -> str:
    """The YAML file, headed by the command that reads it."""
    command = TASK_MODELS.get(method.task_models, "mergekit-yaml")
    return f"# {command}\n" + yaml.safe_dump(configuration, sort_keys=False)


def _declared(merge_method: str) -> dict[str, Any]:
    """The parameters of a registered method; `KeyError` without one."""
    from mergekit.merge_methods import registered_methods

    specs = {method.spec.name: method.spec for method in registered_methods()}
    return {parameter.name: parameter for parameter in specs[merge_method].parameters}


def unavailable(method: Method) -> str | None:
    """Why the installed mergekit cannot run the method, or None where it can."""
    try:
        declared = _declared(method.merge_method)
    except KeyError:
        return f"no merge method {method.merge_method}"
    wanted = [*method.parameters.items(), *method.model_parameters.items()]
    wanted += [("lambda", strength) for strength in method.strengths]
    wanted += [(method.ratio_key, ratio) for ratio in method.ratios if ratio is not None]
    for name, value in wanted:
        if name not in declared:
            return f"{method.merge_method} has no parameter {name}"
        try:
            declared[name].validate(value)
        except Exception as error:  # whatever a method refuses a value with
            return f"{method.merge_method} refuses {name}: {value} ({error})"
    return None
