"""Merge methods that mergekit lacks, one module each: its algebra, then its mergekit class.

They are ordinary mergekit methods: they take whatever weights they are given, and
`PaveMerge` makes their purified twins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod


def methods() -> tuple[MergeMethod, ...]:
    """One instance of each."""
    from mergekit_pave.methods.emr import EmrMerge
    from mergekit_pave.methods.matched_regmean import MatchedRegMean
    from mergekit_pave.methods.regmean import RegMean
    from mergekit_pave.methods.tsv import TaskSingularVectors
    from mergekit_pave.methods.tsv_regmean import TsvRegMean

    return EmrMerge(), MatchedRegMean(), RegMean(), TaskSingularVectors(), TsvRegMean()


# The first import of mergekit's methods makes the start-up hook ask for ours. Python runs this file
# before any module of the folder, so that none of them is half imported at that moment.
import mergekit.merge_methods  # noqa: E402, F401
