"""What a report says, as types; `report.json` holds the same by the same names.

Sizes and numbers of directions are integers, all else is a share of one, a share of an energy or an
energy, as the fields say. A model is its number in `Report.models`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from typing import Any, Generic, TypeVar

FORMAT = 1
Value = TypeVar("Value")
Matrix = list[list[float | None]]  # (models, models)


@dataclass(frozen=True)
class ByBasis(Generic[Value]):
    """The same of plain SVD and of the weight times its covariance."""

    svd: Value
    covariance: Value


@dataclass(frozen=True)
class Row:
    """One weight of one model.

    Attributes:
        kept: directions that stay.
        dropped: directions that go.
        spectrum: singular values over the largest, at `Report.shares` of their index.
        holding: share of the directions that hold nearly all of the energy.
        error: share of the energy lost at the rank ratios `Report.shares`.
        knee: the kept share where that curve bends.
        energy_removed: of the weight's output energy, what the dropped directions carry.
        energy_removed_svd: what as many directions of plain SVD carry.
        task_energy_removed: `energy_removed` over the output energy of the task vector.
    """

    model: int
    kept: int
    dropped: int
    spectrum: ByBasis[list[float]]
    holding: ByBasis[float]
    error: list[float]
    knee: float
    energy_removed: float
    energy_removed_svd: float
    task_energy_removed: float | None


@dataclass(frozen=True)
class Interference:
    """Singular task interference of `rank` directions per model, and over their singular values."""

    rank: int
    before: float
    after: float
    relative_before: float
    relative_after: float


@dataclass(frozen=True)
class Sides:
    """What random subspaces of that many directions would overlap."""

    output: float
    input: float


@dataclass(frozen=True)
class Overlap:
    """Mean squared cosine between the models' `rank` leading directions, and what they drop."""

    rank: int
    chance: Sides
    output: Matrix
    input: Matrix
    dropped: Matrix


@dataclass(frozen=True)
class Weight:
    """One linear weight over the models that purify it; `shape` is (out, in)."""

    name: str
    block: int | None
    kind: str
    shape: list[int]
    rank: int
    rank_ratio: float
    models: list[Row]
    interference: Interference
    overlap: Overlap


@dataclass(frozen=True)
class Covariance:
    """One covariance of one model; its effective rank only where it was measured."""

    model: int
    site: str
    width: int
    tokens: int
    tokens_per_dimension: float
    effective_rank: float | None


@dataclass(frozen=True)
class Part:
    """How many tensors, and how many for which reason."""

    tensors: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Coverage:
    """What happens to the tensors of one model."""

    purified: Part
    plain: Part
    skipped: Part


@dataclass(frozen=True)
class Settings:
    """The purification's; `rank_ratio` is its smallest and its largest."""

    rank_ratio: list[float]
    rank_allocation: str
    subspace: str
    dampening_frac: float | None
    regularization: float | None


@dataclass(frozen=True)
class Sampling:
    """The numbered layers that were measured `of` all, and their weights."""

    blocks: list[int]
    of: int
    weights: int
    of_weights: int


@dataclass(frozen=True)
class Spread:
    median: float
    most: float


@dataclass(frozen=True)
class Tokens:
    """Tokens per dimension: `singular` covariances have less than one, `short` ones too few."""

    covariances: int
    least: float
    median: float
    singular: int
    short: int
    effective_rank_share: float | None


@dataclass(frozen=True)
class Cut:
    """What is dropped, over several rows."""

    dropped: int
    kept_share: float
    energy_removed: Spread
    energy_removed_svd: float
    task_energy_removed: Spread
    tokens: Tokens


@dataclass(frozen=True)
class Tensors:
    """How many are treated in which way."""

    purified: int
    plain: int
    skipped: int


@dataclass(frozen=True)
class ModelCut(Tensors, Cut):
    """What is dropped of one model, and its numbers of tensors."""


@dataclass(frozen=True)
class Change:
    """Interference summed over the weights; `change` is relative, `None` where there was none."""

    before: float
    after: float
    change: float | None


@dataclass(frozen=True)
class Pairs:
    """Mean overlaps over the weights, and the pair of models that overlaps most."""

    matrix: Matrix
    chance: float | None
    pair: list[int] | None
    most: float | None


@dataclass(frozen=True)
class Overlaps:
    output: Pairs
    input: Pairs
    dropped: Pairs


@dataclass(frozen=True)
class Summary(Cut):
    """What the page shows as numbers; all follows from the rest of the report."""

    holding: ByBasis[float]
    knee: float
    interference: Change
    overlap: Overlaps
    tensors: Tensors
    models: list[ModelCut]


@dataclass(frozen=True)
class Kept:
    """What a merge keeps of what a model learned, as `mergekit-pave evaluate` has measured it.

    Attributes:
        merge, model: their names.
        value: 1 as the expert, 0 as the base; `low` and `high` end its 95 % interval.
    """

    merge: str
    model: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """Everything that the page and the figures show, without a path in it."""

    method: str
    base: str
    models: list[str]
    settings: Settings
    sampling: Sampling
    shares: list[float]
    layers: list[Weight]
    covariances: list[Covariance]
    coverage: list[Coverage]
    summary: Summary
    evaluation: list[Kept] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """`report.json`."""
        return {"kind": "mergekit-pave report", "format": FORMAT,
                "version": version("mergekit-pave"), **asdict(self)}


def rounded(value: Any) -> Any:
    """The same facts with numbers of six digits: further ones depend on the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: rounded(getattr(value, part.name))
                                 for part in fields(value)})
    return [rounded(item) for item in value] if isinstance(value, list) else value
