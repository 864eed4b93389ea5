"""The one exception users meet."""

from __future__ import annotations

import click


class PaveError(click.ClickException):
    """Input that cannot be honoured: one sentence with what, where and how to mend it.

    A `ClickException`, so every click command, mergekit's own `mergekit-yaml` included,
    prints the sentence without a traceback and exits with status 1.
    """
