"""`mergekit-pave`: calibrate models, check configurations, list methods."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import click

from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import CALIBRATION, Parameter
from mergekit_pave.plugin import register

# The commands import what is heavy themselves, for the sake of `--help`, and only after
# `register` has found a mergekit that has it.


# Imported when they are asked for: each brings more than a merge or a calibration needs.
_ELSEWHERE = {
    "report": "mergekit_pave.report.cli:report",
    "suggest": "mergekit_pave.suggest:suggest_cli",
    "card": "mergekit_pave.card:card_command",
    "publish": "mergekit_pave.hub:publish_command",
    "materialize": "mergekit_pave.emr_models:materialize_command",
    "compress": "mergekit_pave.compress:compress_command",
    "reconstruct": "mergekit_pave.reconstruct:reconstruct_command",
}


class _Group(click.Group):
    """Prints one line for what goes wrong; the traceback only with `-v`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            module, _, attribute = _ELSEWHERE[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        return super().get_command(ctx, name)

    def invoke(self, ctx: click.Context):
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
def main(verbose: bool) -> None:
    """Purify task vectors before merging (PAVE), inside stock mergekit.

    \b
    Merging itself is mergekit's own command:
        mergekit-yaml merge.yml OUT      with `merge_method: pave_ties` in merge.yml
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )


def _calibration_options(command):
    for parameter in reversed(CALIBRATION):
        # To click a default of None is a value that was given.
        default = {} if parameter.default is None else {"default": parameter.default}
        command = click.option(
            "--" + parameter.name.removeprefix("calibration_").replace("_", "-"),
            parameter.name,
            type=parameter.kind,
            **default,
            required=parameter.name == "calibration_dataset",
            show_default=parameter.default is not None,
            callback=lambda ctx, option, value, p=parameter: _checked(p, value),
            help=parameter.doc[0].upper() + parameter.doc[1:].replace("`", "") + ".",
        )(command)
    return command


def _checked(parameter: Parameter, value):
    try:
        return parameter.validate(value)
    except PaveError as error:
        raise click.BadParameter(error.message) from error


@main.command()
@click.argument("model")
@_calibration_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder for the covariance store.")
@click.option("--device", default="cpu", show_default=True,
              help="Kind of device for the forward passes: cpu, cuda, ..., or auto for the "
              "accelerator that is there.")
@click.option("--max-memory", help="Main memory for weights, such as 8GiB, in each process; what "
              "does not fit is read from the shards as it is needed.")
@click.option("--statistics-memory", help="Memory for second moments held at a time, such as "
              "2GiB, in each process; a smaller one means more passes over the data.")
@click.option("--lora-merge-cache", help="Folder for the merged copy of MODEL+ADAPTER.")
@click.option("--transformers-cache", help="Folder for downloads.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's repository run code.")
@click.option("--push", metavar="REPO_ID", help="Publish the finished store as this data set of "
              "the Hub, with a card that says what it holds and what it can leak.")
@click.option("--private", is_flag=True, help="Make that data set private if it is created.")
def calibrate(model, output, device, max_memory, statistics_memory, lora_merge_cache,
              transformers_cache, trust_remote_code, push, private, **calibration) -> None:
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
    from mergekit_pave import hub
    from mergekit_pave.calibration.data import CalibrationSpec
    from mergekit_pave.calibration.run import Resources, Workers, calibrate_to, parse_bytes
    from mergekit_pave.check.inputs import model_reference
    from mergekit_pave.check.models import read_config
    from mergekit_pave.locate import LoaderOptions, model_source

    resources = Resources(
        device_of(device),
        parse_bytes("--max-memory", max_memory),
        parse_bytes("--statistics-memory", statistics_memory),
    )
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    spec = CalibrationSpec.from_parameters(calibration)
    if push:
        hub.check_target(push)  # before hours of work

    def find():
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


def device_of(name: str):
    """The torch device of `--device`; raises `BadParameter` for one that is not here."""
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device(here.type if here else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", here.type if here else "cpu"}:
        usable = f"cpu or {here.type}" if here else "cpu"
        raise click.BadParameter(
            f"{name!r} cannot be used here; give {usable}.", param_hint="--device"
        )
    return device


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--lora-merge-cache", help="As you will give it to mergekit-yaml.")
@click.option("--transformers-cache", help="As you will give it to mergekit-yaml.")
@click.option("--trust-remote-code", is_flag=True, help="As you will give it to mergekit-yaml.")
@click.option("--allow-crimes", is_flag=True, help="As you will give it to mergekit-yaml.")
@click.option("--unsafe-truncate-embeddings", is_flag=True,
              help="As you will give it to mergekit-yaml.")
def check(config, lora_merge_cache, transformers_cache, trust_remote_code, allow_crimes,
          unsafe_truncate_embeddings) -> None:
    """Say what is wrong with a merge before anything large is downloaded or run.

    Reads the configuration, the models' configs and the calibration data. Exits with 1 when
    the merge could not work.

    \b
    Example:
        mergekit-pave check merge.yml
    """
    register()
    from mergekit_pave.check import Allowances, read_yaml
    from mergekit_pave.check import check as run_check
    from mergekit_pave.estimate import estimates
    from mergekit_pave.locate import LoaderOptions

    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    try:
        text = config.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PaveError(f"{config} is not text in UTF-8: {error.reason}.") from error
    raw = read_yaml(text, str(config))
    findings = run_check(raw, options, Allowances(allow_crimes, unsafe_truncate_embeddings))
    for finding in findings:
        click.echo(f"{finding.level}: {finding}", err=True)
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)
    for line in estimates(raw, options):
        click.echo(line)
    click.echo(f"{config}: nothing wrong found.")


@main.command()
def methods() -> None:
    """List the merge methods that mergekit-pave adds: its own, and what the purified ones wrap."""
    names = register()
    from mergekit import merge_methods

    from mergekit_pave.method import unwrapped

    for name in names:
        method = merge_methods.get(name)
        spec = unwrapped(method).spec
        click.echo(f"{name:24} {spec.pretty_name or spec.name}  {spec.reference_url or ''}")


if __name__ == "__main__":
    main()
