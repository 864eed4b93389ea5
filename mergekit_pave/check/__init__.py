"""Everything that can be known about a merge before a download or a forward pass.

`mergekit-pave check` prints the findings; the stock command stops at the first error.
mergekit itself ignores unknown keys and reads lists as gradients over the layers.

    keys     the YAML alone: names, places and values of keys
    inputs   what the merge is made of: base, fine-tunes, slices
    output   what mergekit would only notice when it writes
    planned  names and shapes that mergekit plans, against those in the models' files
    models   configs, calibration data and covariance stores
    settings what lies beside the weights, and differs between base and fine-tunes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_pave.check.finding import Finding
from mergekit_pave.check.keys import check_keys
from mergekit_pave.check.models import Allowances, check_data, check_models
from mergekit_pave.check.planned import check_planned
from mergekit_pave.check.rules import check_inputs, check_output
from mergekit_pave.check.settings import check_settings
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.reading import configuration, read_yaml


def check(
    raw: Any, options: LoaderOptions | None = None, allowed: Allowances | None = None
) -> list[Finding]:
    """All findings for a parsed YAML file; a later stage only runs when the earlier are clean."""
    options, allowed = options or LoaderOptions(), allowed or Allowances()
    findings: list[Finding] = []
    stages = (
        lambda: check_keys(raw),
        lambda: check_inputs(configuration(raw), options),
        lambda: check_output(configuration(raw)),
        lambda: check_models(configuration(raw), options, allowed),
        lambda: check_planned(configuration(raw), options, allowed),
        lambda: check_settings(configuration(raw), options),
        lambda: check_data(configuration(raw), options),
    )
    for stage in stages:
        try:
            findings += stage()
        except PaveError as error:
            findings.append(Finding("error", "", str(error)))
        if any(f.level == "error" for f in findings):
            break
    return _joined(findings)


def _joined(findings: Iterable[Finding]) -> list[Finding]:
    """Each thing once; a warning with all the places that it was found at."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        same = replace(finding, where="") if finding.level == "warning" else finding
        places.setdefault(same, []).append(finding.where)
    return [
        replace(finding, where=", ".join(dict.fromkeys(filter(None, where))))
        for finding, where in places.items()
    ]


def preflight(
    config: MergeConfiguration,
    source: str | None,
    options: LoaderOptions,
    allowed: Allowances | None = None,
) -> list[str]:
    """Refuse a merge that cannot work; return the warnings that nothing later on gives.

    Args:
        config: what will be merged.
        source: the YAML it was read from, which still has the keys that mergekit dropped.
        options: mergekit's loading options.
        allowed: mergekit's flags that lift a refusal.

    Raises:
        PaveError: the first error found.
    """
    raw = _as_written(config, source)
    findings = check(raw, options, allowed)
    errors = [str(f) for f in findings if f.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: run `mergekit-pave check`)" if errors[1:] else ""
        raise PaveError(errors[0] + more)
    return [str(f) for f in findings if not f.said_again]


def _as_written(config: MergeConfiguration, source: str | None) -> Any:
    if source:
        raw = read_yaml(source)
        # A caller's source may be a mere label, and planning rewrites `config` in place.
        try:
            if configuration(raw) == config:
                return raw
        except PaveError:
            pass
    return _named(config.model_dump(exclude_none=True))


def _named(value: Any) -> Any:
    """`value` with models as strings: mergekit gives up on turning a path with a space into one."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, ModelReference) else value
