"""The YAML parameters that purification adds to a merge method, in one table.

Everything that knows a parameter's name, type, default or range reads it here: the merge
methods, `mergekit-pave check`, the command line and the README's reference table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mergekit_pave.errors import PaveError

SUBSPACES = ("covariance", "svd", "random")
ALLOCATIONS = ("spectral", "uniform")
# What is decomposed and truncated, and the kept fraction of its rank when none is given.
DEFAULT_RATIO = {"weight": 0.98, "delta": 0.25, "separate": None}


@dataclass(frozen=True)
class Parameter:
    """One flat YAML scalar.

    Attributes:
        name: the key under `parameters`.
        kind: `str`, `int` or `float`; the value is converted to it.
        default: the value when the key is absent; `None` means "not set".
        per_model: may differ between models (and be given once for all of them).
        gradient: a YAML list is meaningful (mergekit interpolates it over the layers).
        accepts: `(test, sentence)`; the sentence ends "must be ..." when the test fails.
        doc: one line for `--help` and the README.
    """

    name: str
    kind: type
    default: Any
    per_model: bool
    doc: str
    gradient: bool = False
    accepts: tuple[Callable[[Any], bool], str] | None = None

    def validate(self, value: Any) -> Any:
        """Return `value` as `kind`, or raise `PaveError` with what is accepted."""
        if value is None:
            return None
        wanted = {str: "a single string", int: "a whole number", float: "a number"}[self.kind]
        try:
            if isinstance(value, (list, dict)) or isinstance(value, bool):
                raise ValueError
            if self.kind is str and not isinstance(value, str):
                raise ValueError
            result = self.kind(value)
            if self.kind is int and float(value) != result:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise PaveError(f"{self.name} must be {wanted}; got {value!r}.") from None
        if self.kind is float and not math.isfinite(result):
            raise PaveError(f"{self.name} must be a finite number; got {value!r}.")
        if self.accepts is not None and not self.accepts[0](result):
            raise PaveError(f"{self.name} must be {self.accepts[1]}; got {value!r}.")
        return result


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "one of " + ", ".join(names)


_POSITIVE_INT = (lambda value: value >= 1), "at least 1"
_NOT_EMPTY = (lambda value: bool(value.strip())), "a non-empty string"
# Values of `calibration_dataset` that are no dataset.
DATA_FREE = "none"
GENERATED = "self"

CALIBRATION = (
    Parameter("calibration_dataset", str, None, True,
              "the model's own task data: Hub id, local .jsonl/.json/.csv/.parquet/.txt file, "
              "or a folder (data files, or written by `save_to_disk`); `self` has a causal "
              "language model generate its own, up to 256 tokens a row; `none` estimates the "
              "covariances from the task vectors",
              accepts=_NOT_EMPTY),
    Parameter("calibration_config", str, None, True,
              "configuration (subset) of the dataset", accepts=_NOT_EMPTY),
    Parameter("calibration_split", str, "train", True,
              "split, with `datasets` slicing such as `train[:5%]`", accepts=_NOT_EMPTY),
    Parameter("text_column", str, "text", True,
              "column to read; several joined as `question,answer`; `messages`/`conversations` "
              "use the model's chat template; an image column uses its processor",
              accepts=_NOT_EMPTY),
    Parameter("num_calibration_samples", int, 128, True,
              "rows to use, drawn with the seed", accepts=_POSITIVE_INT),
    Parameter("max_seq_length", int, 2048, True,
              "tokens per row at most (capped by the model); longer rows are cut",
              accepts=_POSITIVE_INT),
    Parameter("calibration_batch_size", int, 8, True,
              "rows per forward pass; never changes the result", accepts=_POSITIVE_INT),
    Parameter("calibration_seed", int, 42, True,
              "seed of the draw of rows", accepts=((lambda value: value >= 0), "0 or more")),
)

COVARIANCE = Parameter(
    "covariance", str, None, True,
    "folder or Hub id of a covariance store; replaces the calibration keys", accepts=_NOT_EMPTY)

PURIFICATION = (
    Parameter("purify", str, "weight", False,
              "`weight` truncates the whole fine-tuned weight (the paper's), `delta` its "
              "difference from the base; `separate` truncates nothing but weighs the inputs of "
              "each task vector by how much they are its own task's",
              accepts=_one_of(*DEFAULT_RATIO)),
    Parameter("rank_ratio", float, None, False,
              "kept fraction of the rank (0.98 of a `weight`, 0.25 of a `delta` when not given); "
              "1.0 switches purification off",
              gradient=True, accepts=((lambda value: 0 < value <= 1), "above 0 and at most 1")),
    Parameter("separation", float, None, False,
              "with `purify: separate`, how much each other task's inputs count "
              "(1 / (models - 1) when not given); 0 keeps the task vector, 1 and more spares them",
              gradient=True, accepts=((lambda value: value >= 0), "0 or more")),
    Parameter("rank_allocation", str, "spectral", False,
              "`spectral` shares the cut between the models by normalised error (the paper's), "
              "`uniform` cuts every model alike", accepts=_one_of(*ALLOCATIONS)),
    Parameter("subspace", str, "covariance", False,
              "what ranks the directions: `covariance` (the paper's), or `svd` and `random` "
              "for its ablations", accepts=_one_of(*SUBSPACES)),
    Parameter("dampening_frac", float, None, False,
              "damping added to the covariance's diagonal, as a fraction of its mean "
              "(0.01 when neither damping key is given)", gradient=True,
              accepts=((lambda value: 0 < value <= 1), "above 0 and at most 1")),
    Parameter("regularization", float, None, False,
              "absolute damping, as in the paper's code; excludes `dampening_frac`",
              gradient=True, accepts=((lambda value: value > 0), "above 0")),
)

DEFAULT_DAMPENING = 0.01
PARAMETERS = {p.name: p for p in (*CALIBRATION, COVARIANCE, *PURIFICATION)}


def reference_table() -> str:
    """The parameters as a Markdown table, as the README shows it."""
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


RANK_FRACTION = Parameter(
    "rank_fraction", float, None, False,
    "share of every matrix's rank that each model keeps; one over the number of models that "
    "changed it when not given",
    gradient=True, accepts=((lambda value: 0 < value <= 1), "above 0 and at most 1"))

PREFIX = "pave_"
