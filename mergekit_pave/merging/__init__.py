"""Merge methods that mergekit lacks, one module each: its algebra, then its mergekit class.

They are ordinary mergekit methods: they take whatever weights they are given, and
`PaveMerge` makes their purified twins.
"""

from __future__ import annotations

from mergekit.merge_methods import MergeMethod


def methods() -> tuple[MergeMethod, ...]:
    """One instance of each."""
    return ()
