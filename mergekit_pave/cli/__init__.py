"""`mergekit-pave`: calibrate models, check configurations, list methods."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import click
from tqdm.contrib.logging import logging_redirect_tqdm

# Each command is imported when it is asked for, so that `--help` stays quick.
_COMMANDS = {
    "calibrate": "merges:calibrate",
    "card": "folders:card_command",
    "check": "merges:check",
    "compress": "folders:compress_command",
    "evaluate": "evaluation:evaluate",
    "materialize": "folders:materialize_command",
    "methods": "merges:methods",
    "publish": "folders:publish_command",
    "reconstruct": "folders:reconstruct_command",
    "report": "merges:report",
    "tune": "evaluation:tune_command",
}


class _Group(click.Group):
    """Prints one line for what goes wrong; the traceback only with `-v`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name].partition(":")
        return getattr(importlib.import_module(f"mergekit_pave.cli.{module}"), attribute)

    def invoke(self, ctx: click.Context) -> Any:
        verbose = ctx.params.get("verbose")
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException:
            if verbose:
                logging.getLogger(__name__).error("Traceback:", exc_info=True)
            raise
        except Exception as error:
            if verbose:
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(f"{text} (run with -v for the traceback)") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Log what happens; show tracebacks.")
@click.version_option(package_name="mergekit-pave")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Stronger merges of fine-tuned models, inside stock mergekit; PAVE among them.

    \b
    Merging itself is mergekit's own command:
        mergekit-yaml merge.yml OUT      with `merge_method: tsv_regmean` in merge.yml
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    ctx.with_resource(logging_redirect_tqdm())  # lines above progress bars, not at their ends
