"""Everything that can be known about a merge before a download or a forward pass.

`mergekit-pave check` prints the findings; the stock command stops at the first error.
mergekit itself ignores unknown keys and reads lists as gradients over the layers.

    keys     the YAML alone: names, places and values of keys
    rules    what the merge is made of (base, fine-tunes, slices), and what mergekit would only
             notice when it writes
    models   configs, calibration data and covariance stores
    planned  names and shapes that mergekit plans, against those in the models' files
    settings configs and tokenizers that differ between base and fine-tunes
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from mergekit_pave.calibration.load import Resources
from mergekit_pave.check.finding import Finding
from mergekit_pave.check.keys import check_keys
from mergekit_pave.check.models import Allowances, check_data, check_models, check_tokenizer
from mergekit_pave.check.planned import check_planned
from mergekit_pave.check.rules import check_inputs, check_output
from mergekit_pave.check.settings import check_settings
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.decompositions import room


def check(
    raw: Any, options: LoaderOptions | None = None, allowed: Allowances | None = None
) -> list[Finding]:
    """All findings for a parsed YAML file; a later stage only runs when the earlier are clean."""
    read = functools.cache(partial(Recipe.of, raw))
    return _findings(raw, read, options or LoaderOptions(), allowed or Allowances())


def _findings(
    raw: Any, read: Callable[[], Recipe], options: LoaderOptions, allowed: Allowances
) -> list[Finding]:
    findings: list[Finding] = []
    stages = (
        lambda: check_keys(raw),
        lambda: check_inputs(read(), options),
        lambda: check_output(read().config),
        lambda: check_models(read(), options, allowed),
        lambda: check_tokenizer(read(), options),
        lambda: check_planned(read(), options, allowed),
        lambda: check_settings(read(), options),
        lambda: check_data(read(), options),
        lambda: _environment(read()),
    )
    for stage in stages:
        try:
            findings += stage()
        except PaveError as error:
            findings.append(Finding("error", "", str(error)))
        if any(f.level == "error" for f in findings):
            break
    return _joined(findings)


def _environment(recipe: Recipe) -> list[Finding]:
    """Refuse sizes in environment variables that are none, which only calibrated models meet."""
    if any(entry.calibrated for entry in recipe.inputs):
        Resources.from_environment()
        room()
    return []


def _joined(findings: Iterable[Finding]) -> list[Finding]:
    """Findings without repetitions; a warning names all the places where it was found."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        same = replace(finding, where="") if finding.level == "warning" else finding
        places.setdefault(same, []).append(finding.where)
    return [
        replace(finding, where=", ".join(dict.fromkeys(filter(None, where))))
        for finding, where in places.items()
    ]


def preflight(
    recipe: Recipe, options: LoaderOptions, allowed: Allowances | None = None
) -> list[str]:
    """Refuse a merge that cannot work; return the warnings that nothing later on gives.

    Args:
        recipe: what will be merged.
        options: mergekit's loading options.
        allowed: mergekit's flags that lift a refusal.

    Raises:
        PaveError: the first error found.
    """
    findings = _findings(recipe.raw, lambda: recipe, options, allowed or Allowances())
    errors = [str(f) for f in findings if f.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: run `mergekit-pave check`)" if errors[1:] else ""
        raise PaveError(errors[0] + more)
    return [str(f) for f in findings if not f.said_again]
