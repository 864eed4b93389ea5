"""What is searched: the strength of a method, then the one or two parameters that matter for it.

A candidate is a merge configuration with some of its keys set. `lambda` scales the merged change
in all methods listed in `AFFINE`, so that a merge at any strength `s` is

    M(s) = M(0) + s (M(1) - M(0)),

and two merges serve all strengths. `M(0)` is the base, but for tensors with a scale of their own
(`lambda_other`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit import merge_methods

from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.inputs import purifies, unwrapped
from mergekit_pave.recipe.parameters import PARAMETERS, PREFIX

Raw = dict[str, Any]
Values = dict[str, Any]

AFFINE = frozenset({
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "tsv_m", "regmean", "tsv_regmean",
    "matched_regmean",
})
# Values that another method starts from, where the configuration does not set them.
_MODEL_START: dict[str, Values] = {
    "ties": {"density": 0.2}, "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05}, "della": {"density": 0.5},
    "della_linear": {"density": 0.5}, "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}
# Second parameters in the order in which they are tried; a method skips those it does not have.
_SECOND: dict[str, dict[str, tuple]] = {
    "tsv_regmean": {"balance": (0.5, 0.3, 0.7), "flattening": (0.5, 0.3, 0.7)},
    "regmean": {"averaging": (1.0, 0.2, 0.5), "flattening": (0.0, 0.5)},
    "matched_regmean": {"flattening": (None, 0.3, 0.7)},
    "tsv_m": {"flattening": (0.0, 0.5)},
    "ties": {"density": (0.2, 0.5, 0.1)},
    "dare_linear": {"density": (0.5, 0.8)},
    "dare_ties": {"density": (0.5, 0.8)},
    "della": {"density": (0.5, 0.8)},
    "della_linear": {"density": (0.5, 0.8)},
    "breadcrumbs": {"density": (0.8, 0.95)},
}
# 1.0 switches purification off: a purified method can then lose to its plain twin by chance only.
_PURIFIED: dict[str, dict[str, tuple]] = {
    "weight": {"rank_ratio": (0.98, 1.0, 0.995)},
    "delta": {"rank_ratio": (0.25, 1.0, 0.5)},
    "separate": {"rank_ratio": (None, 1.0), "separation": (None, 0.1, 0.5)},
}


@dataclass(frozen=True)
class Space:
    """The candidates of one method.

    Attributes:
        method: mergekit's name of it.
        raw: the configuration that they start from, with this method.
        strength: `lambda`, `weight`, or `None` for a method without a strength.
        start: the strength that is given.
        centre: the strength that the search looks around.
        affine: whether two merges serve all strengths.
        second: further parameters, each with the values to try, the present one first.
    """

    method: str
    raw: Raw
    strength: str | None
    start: float | None
    centre: float | None
    affine: bool
    second: Mapping[str, Sequence[Any]]

    @property
    def present(self) -> Values:
        """The second parameters as the configuration has them."""
        return {key: values[0] for key, values in self.second.items()}

    def with_values(self, values: Values) -> Raw:
        """The configuration of a candidate: `values` set, whatever they were."""
        raw = copy.deepcopy(self.raw)
        shared = raw.setdefault("parameters", {})
        for name, value in values.items():
            if name == "weight":
                for part in raw["models"]:
                    own = part.setdefault("parameters", {})
                    own["weight"] = round(float(own.get("weight", 1.0)) * value, 6)
            elif self._per_model(name):
                for part in raw["models"]:
                    part.setdefault("parameters", {})[name] = value
            elif value is None:
                shared.pop(name, None)
            else:
                shared[name] = value
        return raw

    def _per_model(self, name: str) -> bool:
        found = {p.name: p for p in merge_methods.get(self.method).spec.parameters}
        return found[name].scope.name != "SHARED"


def space_of(raw: Raw, method: str | None = None) -> Space:
    """The space of a configuration, or of its models under another method.

    Raises:
        PaveError: an unknown method, or one with nothing to tune; a key to be tuned that is set
            inside a slice, or as a gradient.
    """
    own = raw.get("merge_method")
    if not raw.get("models"):
        raise PaveError("tune needs a configuration with `models`; slices are not searched.")
    name = method or str(own)
    try:
        found = merge_methods.get(name)
    except (KeyError, RuntimeError, ValueError) as error:
        raise PaveError(f"{name} is no merge method that is installed here.") from error
    if unwrapped(found).spec.name == "emr":
        raise PaveError("emr makes one model for each task and has no strength to tune.")
    raw = raw if name == own else _under(raw, name)
    declared = {p.name: p for p in found.spec.parameters}
    inner = unwrapped(found).spec.name
    strength, start = _strength(raw, declared, inner)
    second = _second(raw, found, declared)
    if strength is None and not second:
        raise PaveError(f"{name} has no strength and no other parameter that could be tuned.")
    for key in ([strength] if strength == "lambda" else []) + list(second):
        _refuse_elsewhere(raw, key)
    affine = strength == "lambda" and inner in AFFINE
    centre = _centre(raw, declared, inner) if strength == "lambda" else start
    return Space(name, raw, strength, start, centre, affine, second)


def _under(raw: Raw, method: str) -> Raw:
    """The same models under another method: the keys that it knows, and its own first values."""
    declared = {p.name: p for p in merge_methods.get(method).spec.parameters}
    inner = method.removeprefix(PREFIX)
    raw = copy.deepcopy(raw)
    raw["merge_method"] = method
    for part in (raw, *raw["models"]):
        keys = (part.get("parameters") or {}).items()
        part["parameters"] = {key: value for key, value in keys if key in declared}
    raw["parameters"].pop("lambda", None)
    given = {key for part in raw["models"] for key in part["parameters"]} | {*raw["parameters"]}
    for part in raw["models"]:
        if part["model"] == raw.get("base_model"):
            continue
        own = part["parameters"]
        for key, value in _MODEL_START.get(inner, {}).items():
            if key not in given:
                own[key] = value
        if "weight" in declared and "weight" not in own and "weight" not in raw["parameters"]:
            own["weight"] = 1.0
    return raw


def _strength(raw: Raw, declared: Mapping, inner: str) -> tuple[str | None, float | None]:
    if "lambda" in declared:
        value = (raw.get("parameters") or {}).get("lambda", declared["lambda"].default)
        return "lambda", float(value) if isinstance(value, (int, float)) else 1.0
    normalised = (raw.get("parameters") or {}).get(
        "normalize", getattr(declared.get("normalize"), "default", False))
    if "weight" in declared and not normalised and raw.get("base_model"):
        return "weight", 1.0
    return None, None


def _second(raw: Raw, found: Any, declared: Mapping) -> dict[str, list]:
    shared, result = raw.get("parameters") or {}, {}
    grids: dict[str, tuple] = {}
    if purifies(found):
        purify = shared.get("purify", PARAMETERS["purify"].default)
        grids |= _PURIFIED.get(purify, {})
    grids |= _SECOND.get(unwrapped(found).spec.name, {})
    for key, values in grids.items():
        if key not in declared:
            continue
        present = _present(raw, key, values[0] if key in PARAMETERS else declared[key].default)
        if present is None and declared[key].default is not None:
            present = declared[key].default
        rest = [v for v in values if v != present and v is not None]
        result[key] = [present, *rest]
    return result


def _present(raw: Raw, key: str, default: Any) -> Any:
    own = [part["parameters"][key] for part in raw["models"] if key in (part.get("parameters")
                                                                       or {})]
    return own[0] if own else (raw.get("parameters") or {}).get(key, default)


def _refuse_elsewhere(raw: Raw, key: str) -> None:
    scopes = [raw.get("parameters") or {}, *((m.get("parameters") or {}) for m in raw["models"])]
    if any(isinstance(scope.get(key), (list, dict)) for scope in scopes):
        raise PaveError(
            f"{key} is set by layer or by filter, and tune looks for one number; remove the key.")


def _centre(raw: Raw, declared: Mapping, inner: str) -> float:
    """Where a strength of the method usually lies; the search goes on from there by itself."""
    shared = raw.get("parameters") or {}
    if "normalize" not in declared:
        flat = shared.get("flattening", getattr(declared.get("flattening"), "default", 0))
        return 1.25 if isinstance(flat, float) and flat > 0.2 else 1.0
    if shared.get("normalize", declared["normalize"].default):
        return 1.75
    weights = [(part.get("parameters") or {}).get("weight", shared.get("weight", 1.0))
               for part in raw["models"] if part["model"] != raw.get("base_model")]
    numbers = [w for w in weights if isinstance(w, (int, float)) and w > 0]
    return 0.35 / (sum(numbers) / len(numbers)) if numbers else 0.35
