"""Commands around a merge configuration: calibrate, check, methods, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_pave.cli.options import (
    calibration_options,
    device_option,
    memory_option,
    model_options,
)
from mergekit_pave.plugin import register

if TYPE_CHECKING:  # what computes is imported when a command runs: help texts need none of it
    import torch

    from mergekit_pave.models.source import LoaderOptions, ModelSource


@click.command()
@click.argument("model")
@calibration_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder for the covariance store.")
@device_option("Kind of device for the forward passes")
@memory_option("--max-memory", "Main memory for weights, such as 8GiB, in each process; what "
              "does not fit is read from the shards as it is needed.")
@memory_option("--statistics-memory", "Memory for second moments held at a time, such as "
              "2GiB, in each process; below the sums of one block of the model, that block "
              "runs again.")
@model_options
@click.option("--push", metavar="REPO_ID", help="Publish the finished store as this data set of "
              "the Hub, with a card that says what it holds and what it can leak.")
@click.option("--private", is_flag=True, help="Make that data set private if it is created.")
def calibrate(
    model: str, output: Path, device: torch.device, max_memory: int | None,
    statistics_memory: int | None, options: LoaderOptions, push: str | None, private: bool,
    **calibration: Any,
) -> None:
    """Compute MODEL's covariances on its own task data and write a store.

    The store holds second moments of layer inputs, no text. Name it under `covariance:` in a
    merge, or publish it: others can then merge your model without your data. An interrupted
    run with the same output folder goes on where it stopped.

    \b
    Examples:
        mergekit-pave calibrate ./my-model --dataset ./task.jsonl -o my-model-covariance
        mergekit-pave calibrate WizardLMTeam/WizardMath-7B-V1.0 --dataset openai/gsm8k \\
            --config main --text-column question,answer -o wizardmath-covariance

    \b
    Several processes share the samples and give the covariances of one; each holds the model,
    on the device of its own if there are several. On a machine with GPUs, one with CPUs only,
    and two with 8 GPUs each (the same command on both, --machine_rank 1 on the second):
        accelerate launch --num_processes 4 -m mergekit_pave calibrate MODEL \\
            --dataset ./task.jsonl --device cuda -o DIR
        accelerate launch --multi_gpu --num_processes 2 --num_cpu_threads_per_process 8 \\
            -m mergekit_pave calibrate MODEL --dataset ./task.jsonl -o DIR
        accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 \\
            --main_process_ip 10.0.0.1 --main_process_port 29500 \\
            -m mergekit_pave calibrate MODEL --dataset ./task.jsonl --device cuda -o DIR
    The first process reads the data and writes DIR. To accelerate, --multi_gpu means several
    processes: without it a machine that has no two GPUs gets one.
    """
    register()
    from mergekit_pave.calibration.load import Resources
    from mergekit_pave.calibration.processes import Workers
    from mergekit_pave.calibration.run import calibrate_to
    from mergekit_pave.models.source import model_source, read_config
    from mergekit_pave.publish import hub
    from mergekit_pave.recipe.parameters import CalibrationSpec
    from mergekit_pave.recipe.reading import model_reference

    resources = Resources(device, max_memory, statistics_memory)
    spec = CalibrationSpec.from_parameters(calibration)
    if push:
        hub.check_target(push)  # before hours of work

    def find() -> ModelSource:
        reference = model_reference(model)
        read_config(reference, options)
        return model_source(reference, options)

    with Workers.launched(resources.device) as workers:
        source = workers.once_per_machine(find)
        store = calibrate_to(source, spec, output, resources, workers)
    if store is None:
        return
    click.echo(
        f"{output}: {len(store.sites)} covariances for {len(store.weights)} weights from "
        f"{store.manifest['data']['tokens']} tokens; {len(store.skipped)} weights left out."
    )
    if push:
        click.echo(hub.push_store(output, push, private=private))


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@model_options
@click.option("--allow-crimes", is_flag=True, help="As you will give it to mergekit-yaml.")
@click.option("--unsafe-truncate-embeddings", is_flag=True,
              help="As you will give it to mergekit-yaml.")
def check(
    config: Path, options: LoaderOptions, allow_crimes: bool, unsafe_truncate_embeddings: bool
) -> None:
    """Say what is wrong with a merge before anything large is downloaded or run, and what it costs.

    Reads the configuration, the models' configs and the calibration data. Exits with 1 when
    the merge could not work.

    \b
    Example:
        mergekit-pave check merge.yml
    """
    register()
    from mergekit_pave.calibration.estimate import estimates
    from mergekit_pave.check import check as run_check
    from mergekit_pave.check.cost import costs
    from mergekit_pave.check.models import Allowances
    from mergekit_pave.recipe.recipe import Recipe, read_raw

    raw = read_raw(config)
    findings = run_check(raw, options, Allowances(allow_crimes, unsafe_truncate_embeddings))
    for finding in findings:
        click.echo(f"{finding.level}: {finding}", err=True)
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)
    recipe = Recipe.of(raw)
    for line in (*estimates(recipe, options), *costs(recipe, options)):
        click.echo(line)
    said = f"{len(findings)} warning{'s' * (len(findings) > 1)}, and no error"
    click.echo(f"{config}: {said if findings else 'nothing wrong'} found.")


@click.command()
def methods() -> None:
    """List the merge methods that mergekit-pave adds: its own, and what the purified ones wrap."""
    names = register()
    from mergekit import merge_methods

    from mergekit_pave.recipe.inputs import unwrapped

    for name in names:
        method = merge_methods.get(name)
        spec = unwrapped(method).spec
        click.echo(f"{name:24} {spec.pretty_name or spec.name}  {spec.reference_url or ''}")
    click.echo("Start with tsv_regmean; `calibration_dataset: none` has it need no data.")


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), metavar="N",
              help="Look at N evenly spaced layers; by default at all, or at as many as take about "
              "five minutes.")
@device_option("Where to compute")
@model_options
@click.option("--allow-crimes", is_flag=True, help="As you will give it to mergekit-yaml.")
@click.option("--evaluation", metavar="FILE",
              type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What `evaluate --json` has written about the merge, as a figure of the page.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder for report.html, report.json and the figures.")
def report(
    config: Path, output: Path, layers: int | None, device: torch.device, options: LoaderOptions,
    allow_crimes: bool, evaluation: Path | None,
) -> None:
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
    from mergekit_pave.report.figures import require_matplotlib

    require_matplotlib()
    register()
    from dataclasses import replace

    from mergekit_pave.report.build import build
    from mergekit_pave.report.evaluated import read_evaluation
    from mergekit_pave.report.page import write
    from mergekit_pave.report.survey import choose, open_merge

    kept = read_evaluation(evaluation) if evaluation else []
    merge = open_merge(config, options, device, allow_crimes)
    sample = choose(merge.layers, layers, device)
    made = build(merge, sample, device)
    write(replace(made, evaluation=kept), output)
    click.echo(
        f"{output / 'report.html'}: {len(sample.layers)} of {len(merge.layers)} weights of "
        f"{len(merge.models)} models measured."
    )
