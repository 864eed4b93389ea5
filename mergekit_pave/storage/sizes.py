"""Sizes as people write them: `8GiB`, `500MB`."""

from __future__ import annotations

import os
import re

from mergekit_pave.errors import PaveError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(name: str, text: str | None) -> int | None:
    """Bytes of a size such as `8GiB`, `500MB` or a plain number; `None` for no text.

    Raises:
        PaveError: it is no size; the sentence begins with `name`, the option or variable.
    """
    if not text or not text.strip():
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not found or len(found[1]) > 20:  # no disk is that large, and a float may not be
        raise PaveError(f"{name} must be a size such as 8GiB or 500MB; got {text[:40]!r}.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def from_environment(name: str) -> int | None:
    """The size that an environment variable holds; `None` where it is not set."""
    return parse_bytes(name, os.environ.get(name))
