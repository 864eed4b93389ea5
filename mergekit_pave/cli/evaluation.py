"""Commands that look at what a merge does: evaluate, tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_pave.cli.options import (
    device_option,
    memory_option,
    model_options,
    row_options,
    rows_and_general,
)
from mergekit_pave.errors import PaveError

if TYPE_CHECKING:  # help texts need none of it
    import torch

    from mergekit_pave.evaluation.run import Result
    from mergekit_pave.evaluation.setup import RowOptions
    from mergekit_pave.models.source import LoaderOptions

_DEVICE = device_option("Where to compute")
_MEMORY = memory_option("--max-memory", "Main memory for weights, such as 8GiB; the rest is read "
                        "from the shards as it is needed.")


@click.command("evaluate")
@click.argument("merges", metavar="OUT...", nargs=-1, required=True,
                type=click.Path(exists=True, path_type=Path))
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The merge's configuration, where the one in OUT has lost its local paths.")
@rows_and_general
@_DEVICE
@_MEMORY
@model_options
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Also write everything to this file.")
@click.option("--card", is_flag=True, help="Also write it into OUT's model card, with metadata "
              "for the Hub.")
@click.option("--write", "length", default=24, show_default=True, type=click.IntRange(min=0),
              help="Tokens that a language model writes for you to read.")
def evaluate(
    merges: tuple[Path, ...], config: Path | None, rows: RowOptions, device: torch.device,
    max_memory: int | None, options: LoaderOptions, json_file: Path | None, card: bool, length: int,
) -> None:
    """Say how much each expert's skill a merge keeps, without labels.

    OUT is the folder of a merge, or a configuration, which is then merged and thrown away;
    several are shown side by side. Every model's held-out rows are scored by the base, the expert
    and the merge: token loss and divergence from the expert of language models, agreement of
    classifiers under the expert's own head, the distance of the last hidden state of other
    encoders. "Kept" is 100 % for the expert and 0 % for the base. Scores are cached by content.

    \b
    Examples:
        mergekit-pave evaluate ./merged
        mergekit-pave evaluate ./merged-ties ./merged-tsv --general wikitext.txt --json scores.json
    """
    from mergekit_pave.plugin import register

    register()
    from mergekit_pave.calibration.load import Resources
    from mergekit_pave.evaluation.run import evaluate as evaluate_merges
    from mergekit_pave.evaluation.verdict import doubt, printed, table

    results = evaluate_merges(merges, config, rows=rows, options=options,
                              resources=Resources(device, max_memory), length=length)
    click.echo(printed(table({r.name: r.everything for r in results})))
    for result in results:
        click.echo(f"\n{result.name}: {result.sentence}")
        for task in result.of_tasks if result is results[0] else ():
            if warning := doubt(task.label, task.kind, task.expert, task.base):
                click.echo(f"  Warning: {warning}")
        for label, start, rest in result.written:
            click.echo(f"  {label}: {_line(start)} => {_line(rest)}")
        if result.language and result.target.folder:
            click.echo(f"  Benchmarks (pip install lm_eval): lm_eval --model hf --model_args "
                       f"pretrained={result.target.folder} --tasks hellaswag,arc_challenge "
                       "--batch_size auto")
    if json_file:
        _write_json(json_file, results)
    if card:
        from mergekit_pave.evaluation.card import write_evaluation

        for result in results:
            if result.target.folder is None:
                raise PaveError(f"{result.name} is no folder and has no card; merge it first.")
            write_evaluation(result.target.folder, result.of_tasks, result.general)
            click.echo(f"{result.target.folder / 'README.md'}: the evaluation is in the card.")


@click.command("tune")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help="The tuned configuration; merges lie beside it while they are looked at.")
@click.option("--budget", default="10", show_default=True, metavar="N|MINUTESm",
              help="Merges to make at most, or minutes to spend, such as 30m.")
@click.option("--methods", metavar="A,B,C", help="Compare these methods, each with an equal share "
              "of the budget, and take the best.")
@row_options
@_DEVICE
@_MEMORY
@model_options
def tune_command(
    config: Path, output: Path, budget: str, methods: str | None, rows: RowOptions,
    device: torch.device, max_memory: int | None, options: LoaderOptions,
) -> None:
    """Find the strength of CONFIG's merge, and the parameters that matter, without labels.

    The strength (`lambda`, or `weight` where a method has none) comes first, then one or two
    parameters such as rank_ratio, balance or density. Candidates are merged the stock way and
    scored as `evaluate` does it; one that is clearly worse than the best is stopped early. The
    result is an ordinary configuration for mergekit-yaml. Run it again after an interruption, and
    it goes on where it was.

    \b
    Examples:
        mergekit-pave tune merge.yml -o tuned.yml
        mergekit-pave tune merge.yml -o tuned.yml --budget 30m --methods ties,tsv_m,tsv_regmean
    """
    from mergekit_pave.plugin import register

    register()
    from mergekit_pave.calibration.load import Resources
    from mergekit_pave.evaluation.tuned import tune

    if output.resolve() == config.resolve():
        raise PaveError(f"{output} is the configuration itself; name another file for the result.")
    names = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    try:
        found = tune(config, output, budget, names, rows=rows, options=options,
                     resources=Resources(device, max_memory), say=click.echo)
    except KeyboardInterrupt:
        raise PaveError(
            "Interrupted: what is scored is kept; run the same command again to go on.") from None
    click.echo(f"{output}: " + found.text.splitlines()[1].removeprefix("# ")
               + f" Next: mergekit-yaml {output} OUT")


def _line(text: str) -> str:
    return " ".join(text.split())


def _write_json(path: Path, results: list[Result]) -> None:
    from mergekit_pave.storage.files import write_text

    write_text(path, json.dumps({r.name: r.as_dict() for r in results}, indent=1) + "\n")
