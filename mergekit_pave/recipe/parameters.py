"""The YAML parameters that purification adds to a merge method, in one table.

Everything that knows a parameter's name, type, default or range reads it here: the merge
methods, `mergekit-pave check`, the command line and the reference in docs/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from mergekit_pave.errors import PaveError

# Ranges of values. Each is stated once, and serves the check and the sentence of its error.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]

# The kept fraction of the rank when none is given, by what is truncated.
DEFAULT_RATIO = {"weight": 0.98, "delta": 0.25, "separate": None}


@dataclass(frozen=True)
class Parameter:
    """One flat YAML scalar.

    Attributes:
        name: the key under `parameters`.
        kind: its type with its range, as pydantic takes it; the value is converted to it.
        default: the value when the key is absent; `None` means "not set".
        per_model: may differ between models (and be given once for all of them).
        doc: one line for `--help` and the reference.
        gradient: a YAML list is meaningful (mergekit interpolates it over the layers).
    """

    name: str
    kind: Any
    default: Any
    per_model: bool
    doc: str
    gradient: bool = False

    @property
    def plain_type(self) -> type:
        """`str`, `int` or `float`."""
        if get_origin(self.kind) is Literal:
            return str
        return get_args(self.kind)[0] if get_origin(self.kind) is Annotated else self.kind

    @cached_property
    def _adapter(self) -> TypeAdapter:
        return TypeAdapter(self.kind)

    def validate(self, value: Any) -> Any:
        """Return `value` as `kind`, or raise `PaveError` with what is accepted."""
        if value is None:
            return None
        try:
            # To pydantic, True is 1.
            return self._adapter.validate_python([] if isinstance(value, bool) else value)
        except ValidationError as error:
            wanted = self._wanted(error.errors()[0]["type"])
        raise PaveError(f"{self.name} must be {wanted}; got {value!r}.")

    def _wanted(self, fault: str) -> str:
        if fault == "finite_number":
            return "a finite number"
        if fault.startswith(("greater_than", "less_than", "literal", "string_pattern")):
            return accepted(self.kind)
        return {str: "a single string", int: "a whole number", float: "a number"}[self.plain_type]


def accepted(kind: Any) -> str:
    """The range of a type in words, such as `above 0 and at most 1`."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    said = {}
    for part in get_args(kind)[1:]:
        for limit in getattr(part, "metadata", [part]):
            for name in ("gt", "ge", "le", "pattern"):
                value = getattr(limit, name, None)
                if value is not None:
                    said[name] = value
    if "pattern" in said:
        return "a non-empty string"
    if {"ge", "le"} <= said.keys():
        return f"between {said['ge']} and {said['le']}"
    least = "at least {}" if get_args(kind)[0] is int and said.get("ge") else "{} or more"
    words = {"gt": "above {}", "ge": least, "le": "at most {}"}
    return " and ".join(words[name].format(said[name]) for name in words if name in said)


# Values of `calibration_dataset` that are no dataset.
DATA_FREE = "none"
GENERATED = "self"

CALIBRATION = (
    Parameter("calibration_dataset", Text, None, True,
              "the model's own task data: Hub id, local .jsonl/.json/.csv/.parquet/.txt file, "
              "or a folder (data files, or written by `save_to_disk`); `self` has a causal "
              "language model generate its own, up to 256 tokens a row; `none` estimates the "
              "covariances from the task vectors"),
    Parameter("calibration_config", Text, None, True,
              "configuration (subset) of the dataset"),
    Parameter("calibration_split", Text, "train", True,
              "split, with `datasets` slicing such as `train[:5%]`"),
    Parameter("text_column", Text, "text", True,
              "column to read, or `messages`, `conversations` or the image column where there is "
              "no `text`; several joined as `question,answer`; chats use the model's chat "
              "template, images its processor"),
    Parameter("num_calibration_samples", Count, 128, True,
              "rows to use, drawn with the seed"),
    Parameter("max_seq_length", Count, 2048, True,
              "tokens per row at most (capped by the model); longer rows are cut"),
    Parameter("calibration_batch_size", Count, 8, True,
              "rows per forward pass; never changes the result"),
    Parameter("calibration_seed", Seed, 42, True,
              "seed of the draw of rows"),
)

COVARIANCE = Parameter(
    "covariance", Text, None, True,
    "folder or Hub id of a covariance store; replaces the calibration keys")

PURIFICATION = (
    Parameter("purify", Literal["weight", "delta", "separate"], "weight", False,
              "`weight` truncates the whole fine-tuned weight (the paper's), `delta` its "
              "difference from the base; `separate` truncates nothing but weighs the inputs of "
              "each task vector by how much they are its own task's"),
    Parameter("rank_ratio", PositiveShare, None, False,
              "kept fraction of the rank (0.98 of a `weight`, 0.25 of a `delta` when not given); "
              "1.0 switches purification off",
              gradient=True),
    Parameter("separation", NotNegative, None, False,
              "with `purify: separate`, how much each other task's inputs count "
              "(1 / (models - 1) when not given); 0 keeps the task vector, 1 and more spares them",
              gradient=True),
    Parameter("rank_allocation", Literal["spectral", "uniform"], "spectral", False,
              "`spectral` shares the cut between the models by normalised error (the paper's), "
              "`uniform` cuts every model alike"),
    Parameter("subspace", Literal["covariance", "svd", "random"], "covariance", False,
              "what ranks the directions: `covariance` (the paper's), or `svd` and `random` "
              "for its ablations"),
    Parameter("dampening_frac", PositiveShare, None, False,
              "damping added to the covariance's diagonal, as a fraction of its mean "
              "(0.01 when neither damping key is given)", gradient=True),
    Parameter("regularization", Positive, None, False,
              "absolute damping, as in the paper's code; excludes `dampening_frac`",
              gradient=True),
)

DEFAULT_DAMPENING = 0.01
PARAMETERS = {p.name: p for p in (*CALIBRATION, COVARIANCE, *PURIFICATION)}


def reference_table() -> str:
    """The parameters as a Markdown table, as the reference shows it."""
    lines = ["| key | for | default | meaning |", "|---|---|---|---|"]
    for p in PARAMETERS.values():
        scope = "each model" if p.per_model else "the merge"
        default = "-" if p.default is None else f"`{p.default}`"
        lines.append(f"| `{p.name}` | {scope} | {default} | {p.doc} |")
    return "\n".join(lines)


_KEYS = {
    "dataset": "calibration_dataset",
    "config": "calibration_config",
    "split": "calibration_split",
    "text_column": "text_column",
    "num_samples": "num_calibration_samples",
    "max_seq_length": "max_seq_length",
    "batch_size": "calibration_batch_size",
    "seed": "calibration_seed",
}


def _default(field: str) -> Any:
    return PARAMETERS[_KEYS[field]].default


@dataclass(frozen=True)
class CalibrationSpec:
    """One model's calibration data, straight from the YAML keys."""

    dataset: str
    config: str | None = _default("config")
    split: str = _default("split")
    text_column: str = _default("text_column")
    num_samples: int = _default("num_samples")
    max_seq_length: int = _default("max_seq_length")
    batch_size: int = _default("batch_size")
    seed: int = _default("seed")

    @property
    def generated(self) -> bool:
        """Whether the model writes the data itself; there are no rows to open then."""
        return self.dataset == GENERATED

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any]) -> CalibrationSpec:
        """Read `calibration_dataset`, `text_column`, ... ; absent or null means the default."""
        found = {
            field.name: PARAMETERS[_KEYS[field.name]].validate(values.get(_KEYS[field.name]))
            for field in fields(cls)}
        if found["dataset"] is None:
            raise PaveError(
                "calibration_dataset is missing; name the model's own task data (a Hub id or a "
                "local file) under its `parameters`.")
        if found["dataset"] == DATA_FREE:
            raise PaveError(
                "calibration_dataset: none means no data, so nothing can be computed here; name "
                "a dataset (a folder called none as ./none).")
        return cls(**{name: value for name, value in found.items() if value is not None})


@dataclass(frozen=True)
class CovarianceSource:
    """Where the covariances of one model come from.

    Attributes:
        store: folder or Hub id of a finished store; it goes before the data.
        data: the calibration data, `None` without any or with `calibration_dataset: none`.
        estimated: they are estimated from the task vector.
    """

    store: str | None = None
    data: CalibrationSpec | None = None
    estimated: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CovarianceSource:
        """Read `covariance` and the calibration keys of one model."""
        if values.get("covariance"):
            return cls(store=values["covariance"])
        if values.get("calibration_dataset") == DATA_FREE:
            return cls(estimated=True)
        if not values.get("calibration_dataset"):
            return cls()
        return cls(data=CalibrationSpec.from_parameters(values))


@dataclass(frozen=True)
class Purification:
    """What is done to the weights of one linear layer before they are merged.

    Attributes are the YAML's keys with their defaults worked out; `rank_ratio` is `None` only
    where nothing is truncated.

    Raises:
        PaveError: both damping keys are given.
    """

    purify: str = "weight"
    rank_ratio: float | None = None
    separation: float | None = None
    rank_allocation: str = "spectral"
    subspace: str = "covariance"
    dampening_frac: float | None = None
    regularization: float | None = None

    def __post_init__(self) -> None:
        if self.dampening_frac is not None and self.regularization is not None:
            raise PaveError(
                "dampening_frac and regularization exclude each other: keep one of them.")
        if self.dampening_frac is None and self.regularization is None:
            object.__setattr__(self, "dampening_frac", DEFAULT_DAMPENING)
        if self.rank_ratio is None:
            object.__setattr__(self, "rank_ratio", DEFAULT_RATIO[self.purify])

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Purification:
        """Read the keys of `PURIFICATION`; others are left alone."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def kept_share(self) -> float:
        """`rank_ratio`; raises `ValueError` where nothing is truncated."""
        if self.rank_ratio is None:
            raise ValueError("no ranks are cut where task vectors are separated")
        return self.rank_ratio

    @property
    def off(self) -> bool:
        """Whether nothing is to be purified."""
        return self.rank_ratio == 1

    @property
    def damping(self) -> dict[str, float | None]:
        """The keywords of `algebra.subspace.damped`."""
        return {
            "dampening_frac": self.dampening_frac, "regularization": self.regularization}


RANK_FRACTION = Parameter(
    "rank_fraction", PositiveShare, None, False,
    "share of every matrix's rank that each model keeps; one over the number of models that "
    "changed it when not given",
    gradient=True)

FLATTENING = Parameter(
    "flattening", Share, 0.0, False,
    "how far the merged singular values are evened out: 0 not at all, 1 all are equal",
    gradient=True)

STRENGTH = Parameter(
    "strength", Literal["plain", "matched"], "plain", False,
    "what `lambda: 1` is: `plain` the merge as published, `matched` the size at which it answers "
    "to the models' inputs as strongly as their own task vectors")

PREFIX = "pave_"
