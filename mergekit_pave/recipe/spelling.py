"""Names of keys and methods: which are ours, and what a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod

from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import PREFIX

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


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant."""
    known = list(known)
    if _ELSEWHERE.get(key) in known:
        return _ELSEWHERE[key]
    return next(iter(difflib.get_close_matches(key.lower().replace("-", "_"), known, 1)), None)


def suggestion(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known)
    return f"did you mean {near}?" if near else "known: " + ", ".join(sorted(known)) + "."


def is_ours(name: str) -> bool:
    """Whether a registered method is one that this package brought."""
    return name in our_names()


def our_names() -> list[str]:
    """Names of the registered methods that this package brought."""
    registered = merge_methods.registered_methods()
    package = __name__.partition(".")[0] + "."
    return [m.spec.name for m in registered if type(m).__module__.startswith(package)]


def our_method(name: str) -> MergeMethod:
    """The registered method of ours of that name, or `PaveError` with the nearest ones."""
    ours = our_names()
    if name in ours:
        return merge_methods.get(name)
    if PREFIX + name in ours:
        hint = f"its purified form is {PREFIX + name}."
    else:
        near = nearest(name, ours)
        hint = f"did you mean {near}?" if near else "they are: " + ", ".join(ours) + "."
    raise PaveError(f"merge_method: {name!r} is not a merge method of mergekit-pave; {hint}")


def looks_like_ours(name: str) -> bool:
    """Whether an unknown method name was meant to be one of ours (`pave-ties`, `pvae_tie`)."""
    known = [method.spec.name for method in merge_methods.registered_methods()]
    plain = name.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, 1, 0.75)
    return name not in known and ("pave" in plain or bool(near and is_ours(near[0])))
