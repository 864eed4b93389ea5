"""`mergekit-pave report`, and the options it shares with `suggest`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from mergekit_pave.cli import device_of

_SAME = "As you will give it to mergekit-yaml."


def merge_options(command: Callable) -> Callable:
    """CONFIG and how to open its models."""
    for option in reversed((
        click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
        click.option("--layers", type=click.IntRange(min=1), metavar="N",
                     help="Look at N evenly spaced layers; by default at all, or at as many as "
                     "take about five minutes."),
        click.option("--device", default="cpu", show_default=True,
                     help="Where to compute: cpu, cuda, ..., or auto for the accelerator that is "
                     "there."),
        click.option("--lora-merge-cache", help=_SAME),
        click.option("--transformers-cache", help=_SAME),
        click.option("--trust-remote-code", is_flag=True, help=_SAME),
        click.option("--allow-crimes", is_flag=True, help=_SAME),
    )):
        command = option(command)
    return command


@click.command()
@merge_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder for report.html, report.json and the figures.")
def report(config, output, layers, device, lora_merge_cache, transformers_cache,
           trust_remote_code, allow_crimes) -> None:
    """Show what purification would do to a merge, as one web page.

    Opens the models and their covariances as the merge of CONFIG would (models without a
    store are calibrated, and the merge will find that in the cache), but merges nothing.
    The page has spectra, kept ranks, the energy that is removed, the interference between
    the models before and after, whether the calibration is enough, and what is not
    purified and why. It names no local path and can be passed on.

    \b
    Example:
        mergekit-pave report merge.yml -o report
    """
    from mergekit_pave.report.drawing import require_matplotlib

    require_matplotlib()
    from mergekit_pave.locate import LoaderOptions
    from mergekit_pave.report.build import build
    from mergekit_pave.report.gather import open_merge
    from mergekit_pave.report.page import write
    from mergekit_pave.report.sample import choose

    where = device_of(device)
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    merge = open_merge(config, options, where, allow_crimes)
    sample = choose(merge.layers, layers, where)
    made = build(merge, sample, where)
    write(made, output)
    click.echo(
        f"{output / 'report.html'}: {len(sample.layers)} of {len(merge.layers)} weights of "
        f"{len(merge.models)} models measured."
    )
