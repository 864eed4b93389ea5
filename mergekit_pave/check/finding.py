"""What a check found, and the words for keys that are almost right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

# Names of the same thing in neighbouring tools.
_ELSEWHERE = {
    "nsamples": "num_calibration_samples",
    "n_samples": "num_calibration_samples",
    "num_samples": "num_calibration_samples",
    "num_ada_examples": "num_calibration_samples",
    "seqlen": "max_seq_length",
    "max_length": "max_seq_length",
    "batch_size": "calibration_batch_size",
    "dataset": "calibration_dataset",
    "dataset_config": "calibration_config",
    "split": "calibration_split",
    "seed": "calibration_seed",
    "percdamp": "dampening_frac",
    "damp_percent": "dampening_frac",
    "rank_scale": "rank_ratio",
    "rank_ratios": "rank_ratio",
}


@dataclass(frozen=True)
class Finding:
    """One thing to know: `level` is `error` or `warning`, `where` a path into the YAML.

    `said_again`: by the calibration, so that the merge need not say it before.
    """

    level: str
    where: str
    what: str
    said_again: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def error(where: str, what: str) -> Finding:
    return Finding("error", where, what)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant."""
    known = list(known)
    if _ELSEWHERE.get(key) in known:
        return _ELSEWHERE[key]
    return next(iter(difflib.get_close_matches(key.lower().replace("-", "_"), known, 1)), None)


def suggestion(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known)
    return f"did you mean {near}?" if near else "known: " + ", ".join(sorted(known)) + "."
