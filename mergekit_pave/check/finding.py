"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing to know: `level` is `error` or `warning`, `where` a path into the YAML.

    `said_again`: the calibration says it, too, so that a merge need not say it before.
    """

    level: str
    where: str
    what: str
    said_again: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def error(where: str, what: str) -> Finding:
    return Finding("error", where, what)
