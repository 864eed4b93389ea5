"""Merge methods that mergekit lacks, one module each: its algebra, then its mergekit class.

They are ordinary mergekit methods: they take whatever weights they are given, and
`PaveMerge` makes their purified twins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

    from mergekit_pave.statistics import Statistics


def methods(statistics: Statistics) -> tuple[MergeMethod, ...]:
    """One instance of each."""
    from mergekit_pave.merging.blend import TsvRegMean
    from mergekit_pave.merging.emr import EmrMerge
    from mergekit_pave.merging.regmean import RegMean
    from mergekit_pave.merging.tsv import TaskSingularVectors

    return EmrMerge(), RegMean(statistics), TaskSingularVectors(), TsvRegMean(statistics)


# The first import of mergekit's methods makes the start-up hook ask for ours. Were it the import
# in one of the modules here, that module would be half there.
import mergekit.merge_methods  # noqa: E402, F401
