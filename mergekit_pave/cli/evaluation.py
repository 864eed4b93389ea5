"""Commands that look at what a merge does: evaluate, tune."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_pave.errors import PaveError

_SAME = "As you give it to mergekit-yaml."


def _row_options(without: tuple[str, ...] = ()):
    """Options that say which rows are scored, and where."""

    def decorate(command):
        for name, option in reversed(_OPTIONS.items()):
            if name not in without:
                command = option(command)
        return command

    return decorate


_OPTIONS = {
    "rows": click.option("--rows", default=64, show_default=True, type=click.IntRange(min=2),
                         help="Held-out rows of each model, at most."),
    "max_tokens": click.option("--max-tokens", default=256, show_default=True,
                               type=click.IntRange(min=2), help="Tokens of a row, at most."),
    "held_out": click.option(
        "--held-out", multiple=True, metavar="DATA",
        help="Rows of a model's task, a file or data set; once for each model, in their order. By "
        "default rows of its calibration data that calibration does not draw."),
    "split": click.option("--split", help="Split of each model's own data to take rows from."),
    "general": click.option("--general", metavar="DATA",
                            help="Rows of no task: what the merge damages."),
    "base": click.option("--base", metavar="MODEL",
                         help="The base model, where the merge names none."),
    "device": click.option("--device", default="cpu", show_default=True,
                           help="Where to compute: cpu, cuda, ..., or auto."),
    "max_memory": click.option("--max-memory", help="Main memory for weights, such as 8GiB; the "
                               "rest is read from the shards as it is needed."),
    "lora_merge_cache": click.option("--lora-merge-cache", help=_SAME),
    "transformers_cache": click.option("--transformers-cache", help=_SAME),
    "trust_remote_code": click.option("--trust-remote-code", is_flag=True, help=_SAME),
}


@click.command("evaluate")
@click.argument("merges", metavar="OUT...", nargs=-1, required=True,
                type=click.Path(exists=True, path_type=Path))
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The merge's configuration, where the one in OUT has lost its local paths.")
@_row_options()
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Also write everything to this file.")
@click.option("--card", is_flag=True, help="Also write it into OUT's model card, with metadata "
              "for the Hub.")
@click.option("--write", "length", default=24, show_default=True, type=click.IntRange(min=0),
              help="Tokens that a language model writes for you to read.")
def evaluate(merges, config, rows, max_tokens, held_out, split, general, base, device, max_memory,
             lora_merge_cache, transformers_cache, trust_remote_code, json_file, card,
             length) -> None:
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
    from mergekit_pave.evaluation.run import evaluate as evaluate_merges
    from mergekit_pave.evaluation.verdict import printed, table

    which, options, resources = _settings(
        rows, max_tokens, held_out, split, general, base, device, max_memory, lora_merge_cache,
        transformers_cache, trust_remote_code)
    results = evaluate_merges(
        merges, config, rows=which, options=options, resources=resources, length=length)
    click.echo(printed(table({r.name: r.everything for r in results})))
    for result in results:
        click.echo(f"\n{result.name}: {result.sentence}")
        for label, start, rest in result.written:
            click.echo(f"  {label}: {_line(start)} => {_line(rest)}")
        if result.language and result.target.folder:
            click.echo(f"  Benchmarks: lm_eval --model hf --model_args "
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
@_row_options(without=("general",))
def tune_command(config, output, budget, methods, rows, max_tokens, held_out, split, base, device,
                 max_memory, lora_merge_cache, transformers_cache, trust_remote_code) -> None:
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
    from mergekit_pave.evaluation.tuned import tune

    which, options, resources = _settings(
        rows, max_tokens, held_out, split, None, base, device, max_memory, lora_merge_cache,
        transformers_cache, trust_remote_code)
    if output.resolve() == config.resolve():
        raise PaveError(f"{output} is the configuration itself; name another file for the result.")
    names = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    try:
        found = tune(config, output, budget, names, rows=which, options=options,
                     resources=resources, say=click.echo)
    except KeyboardInterrupt:
        raise PaveError(
            "Interrupted: what is scored is kept; run the same command again to go on.") from None
    click.echo(f"{output}: " + found.text.splitlines()[1].removeprefix("# "))


def _settings(rows, max_tokens, held_out, split, general, base, device, max_memory,
              lora_merge_cache, transformers_cache, trust_remote_code, drawn=None):
    from mergekit_pave.calibration.load import Resources, parse_bytes
    from mergekit_pave.cli.options import device_of
    from mergekit_pave.evaluation.setup import RowOptions
    from mergekit_pave.models.source import LoaderOptions

    wanted = RowOptions(rows, max_tokens, tuple(held_out), split, general, base, drawn)
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    resources = Resources(device_of(device), parse_bytes("--max-memory", max_memory))
    return wanted, options, resources


def _line(text: str) -> str:
    return " ".join(text.split())


def _write_json(path: Path, results) -> None:
    from mergekit_pave.storage.files import write_atomically

    text = json.dumps({r.name: r.as_dict() for r in results}, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
