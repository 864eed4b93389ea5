"""Commands that work on a folder: card, publish, materialize, compress, reconstruct."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_pave.algebra.choices import DTYPES, RESCALERS
from mergekit_pave.cli.options import device_option, model_options
from mergekit_pave.errors import PaveError

if TYPE_CHECKING:  # what computes is imported when a command runs: help texts need none of it
    import torch

    from mergekit_pave.models.source import LoaderOptions


@click.command("card")
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False))
@click.option("--push", metavar="REPO_ID", help="Upload OUT to this model repository of the Hub.")
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
def card_command(folder: str, push: str | None, private: bool) -> None:
    """Complete the model card of a merge, and publish the merge if you say so.

    Adds tags, parents, calibration data and the citation to the card in OUT that mergekit
    wrote, and takes local paths out of it and of mergekit_config.yml.

    \b
    Example:
        mergekit-pave card OUT --push me/wizard-math-code
    """
    from mergekit_pave.plugin import register
    from mergekit_pave.publish.card import write_card
    from mergekit_pave.publish.hub import merge_files, push_merge
    from mergekit_pave.publish.markdown import CARD
    from mergekit_pave.recipe.reading import CONFIGURATION

    if private and not push:
        raise PaveError("--private goes with --push REPO_ID.")
    register()
    if push:
        click.echo(push_merge(folder, push, private=private))
    else:
        write_card(folder)
        click.echo(
            f"{Path(folder) / CARD}: complete; no local path of the merge is left in it and in "
            f"{CONFIGURATION}."
        )
        try:
            files = "uploads " + ", ".join(merge_files(Path(folder)))
        except PaveError as error:
            files = f"would not upload it: {error}"
        click.echo(f"`--push REPO_ID` {files.rstrip('.')}.")


@click.command("compress")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank-fraction", type=click.FloatRange(0, 1, min_open=True), metavar="FRACTION",
              help="Share of every matrix's rank to keep, above 0 and at most 1; one over the "
              "number of fine-tunes when not given.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Precision of the singular vectors; each "
              "matrix's own when not given.")
@device_option("Where to decompose")
@model_options
def compress_command(
    config: Path, out: Path, rank_fraction: float | None, dtype: str | None, device: torch.device,
    options: LoaderOptions,
) -> None:
    """Store the fine-tunes of CONFIG as low-rank differences from their base (TSV-Compress).

    CONFIG is a merge configuration; only its base_model and models matter. OUT/TASK gets the
    leading singular triples of every changed matrix. Tensors that are no matrices, and matrices
    that are smaller that way, are stored exactly: whole, or the rows that changed. `reconstruct`
    turns OUT/TASK and the base into a model again. An interrupted run with the same arguments
    goes on with the tasks it has not finished.

    With 8 fine-tunes the factors are 25% of a square matrix and 15.6% of a 3072 x 768 one. What is
    printed is counted: bytes on disk, and the energy (squared singular values) that is kept.

    \b
    Examples:
        mergekit-pave compress merge.yml compressed
        mergekit-pave compress merge.yml compressed --rank-fraction 0.05
    """
    from mergekit_pave.recipe.recipe import read_raw
    from mergekit_pave.tasks.compress import compress

    for summary in compress(read_raw(config), out, rank_fraction=rank_fraction,
                            dtype=dtype, device=device, options=options):
        click.echo(str(summary))
    click.echo(
        f"`mergekit-pave reconstruct {out}/TASK DIR --base MODEL` writes a model of one again; "
        "MODEL, the base, is needed where it is not on the Hub.")


@click.command("materialize")
@click.argument("merged", metavar="OUT")
@click.argument("task")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--base", metavar="MODEL", help="The base model, where it is not found by itself: "
              "a local one that has moved, or is on another machine.")
@click.option("--rescaler", type=click.Choice(RESCALERS), help="Weigh the tensors otherwise than "
              "the merge did: each alike, or by size.")
@model_options
def materialize_command(
    merged: str, task: str, folder: Path, base: str | None, rescaler: str | None,
    options: LoaderOptions,
) -> None:
    """Write the model of one TASK of an EMR merge to the folder DIR.

    OUT is what `merge_method: emr` or `pave_emr` wrote, a folder or a Hub id. TASK is one of the
    models that were merged: its Hub id, the last part of its path, or its number from 0; any
    other word lists them. DIR becomes an ordinary model folder with that model's own config and
    tokenizer.

    \b
    Examples:
        mergekit-pave materialize ./merged math-expert ./merged-math
        mergekit-pave materialize me/merged 0 ./merged-math --base ./base
    """
    from mergekit_pave.tasks.emr import materialize

    materialize(merged, task, folder, base=base, rescaler=rescaler, options=options)
    click.echo(f"{folder}: the model of {task}.")


@click.command("publish")
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
def publish_command(store: str, repo_id: str, private: bool) -> None:
    """Publish a covariance STORE as a data set of the Hub, with a card.

    Others can then merge your model without its data, by `covariance: REPO_ID`. The card says
    what the statistics contain and what they give away; it is published as README.md, or STORE's
    own README.md if there is one.

    \b
    Example:
        mergekit-pave publish wizardmath-covariance me/wizardmath-covariance
    """
    from mergekit_pave.publish.hub import push_store

    click.echo(push_store(store, repo_id, private=private))


@click.command("reconstruct")
@click.argument("compressed", metavar="OUT/TASK",
                type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The base model, needed where it is not on the Hub.")
@model_options
def reconstruct_command(
    compressed: Path, folder: Path, base: str | None, options: LoaderOptions
) -> None:
    """Write the model folder DIR from a compressed fine-tune and its base.

    OUT/TASK is a task's folder in what `compress` wrote. The base has to be the very one it was
    compressed against, which is checked by its values.

    \b
    Examples:
        mergekit-pave reconstruct compressed/math-expert ./math
        mergekit-pave reconstruct compressed/math-expert ./math --base ./base
    """
    from mergekit_pave.tasks.reconstruct import reconstruct

    reconstruct(compressed, folder, base=base, options=options)
    click.echo(f"{folder}: reconstructed from {compressed}.")
