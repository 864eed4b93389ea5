"""What purification does to one merge, as numbers (`report.json`), figures and a page.

`measure` is algebra on tensors, `gather` finds the tensors, `build` makes the one dictionary
that `summary`, `figures` and `page` read. Nothing of a merge imports this package.
"""

