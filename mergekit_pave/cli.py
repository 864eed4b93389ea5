"""`mergekit-pave`: calibrate models, check configurations, list methods."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click
import yaml

from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import CALIBRATION, Parameter


class _Group(click.Group):
    """Prints one line for what goes wrong; the traceback only with `-v`."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            if ctx.params.get("verbose"):
                logging.getLogger(__name__).error("Traceback:", exc_info=True)
            raise
        except Exception as error:
            if ctx.params.get("verbose"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(f"{text} (run with -v for the traceback)") from error


@click.group(cls=_Group)
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
        command = click.option(
            "--" + parameter.name.removeprefix("calibration_").replace("_", "-"),
            parameter.name,
            type=parameter.kind,
            default=parameter.default,
            required=parameter.name == "calibration_dataset",
            show_default=parameter.default is not None,
            callback=lambda ctx, option, value, p=parameter: _checked(p, value),
            help=parameter.doc[0].upper() + parameter.doc[1:].replace("`", "") + ".",
        )(command)
    return command


def _checked(parameter: Parameter, value):
    return parameter.validate(value)


@main.command()
@click.argument("model")
@_calibration_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
              help="Folder for the covariance store.")
@click.option("--device", default="cpu", show_default=True,
              help="Kind of device for the forward passes: cpu, cuda, auto.")
@click.option("--max-memory", help="Main memory for weights, such as 8GiB; what does not fit is "
              "read from the shards as it is needed.")
@click.option("--statistics-memory", help="Memory for second moments held at a time, such as "
              "2GiB; a smaller one means more passes over the data.")
@click.option("--lora-merge-cache", help="Folder for the merged copy of MODEL+ADAPTER.")
@click.option("--transformers-cache", help="Folder for downloads.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's repository run code.")
def calibrate(model, output, device, max_memory, statistics_memory, lora_merge_cache,
              transformers_cache, trust_remote_code, **calibration) -> None:
    """Compute MODEL's covariances on its own task data and write a store.

    The store holds second moments of layer inputs, no text. Name it under `covariance:` in a
    merge, or publish it: others can then merge your model without your data. An interrupted
    run with the same output folder goes on where it stopped.

    \b
    Example:
        mergekit-pave calibrate WizardLMTeam/WizardMath-7B-V1.0 --dataset openai/gsm8k \\
            --config main --text-column question,answer -o wizardmath-covariance
    """
    import torch
    from mergekit.common import ModelReference

    from mergekit_pave.calibration.data import CalibrationSpec
    from mergekit_pave.calibration.run import Resources, calibrate_to, parse_bytes
    from mergekit_pave.sources import LoaderOptions, model_source

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    source = model_source(ModelReference.model_validate(model), options)
    resources = Resources(
        torch.device(device),
        parse_bytes("--max-memory", max_memory),
        parse_bytes("--statistics-memory", statistics_memory),
    )
    spec = CalibrationSpec.from_parameters(calibration)
    store = calibrate_to(source, spec, output, resources)
    click.echo(
        f"{output}: {len(store.sites)} covariances for {len(store.weights)} weights from "
        f"{store.manifest['data']['tokens']} tokens; {len(store.skipped)} weights left out."
    )


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--lora-merge-cache", help="As you will give it to mergekit-yaml.")
@click.option("--transformers-cache", help="As you will give it to mergekit-yaml.")
@click.option("--trust-remote-code", is_flag=True, help="As you will give it to mergekit-yaml.")
@click.option("--allow-crimes", is_flag=True, help="As you will give it to mergekit-yaml.")
def check(config, lora_merge_cache, transformers_cache, trust_remote_code, allow_crimes) -> None:
    """Say what is wrong with a merge before anything large is downloaded or run.

    Reads the configuration, the models' configs and the calibration data. Exits with 1 when
    the merge could not work.

    \b
    Example:
        mergekit-pave check merge.yml
    """
    from mergekit_pave.check import check as run_check
    from mergekit_pave.estimate import estimates
    from mergekit_pave.plugin import register
    from mergekit_pave.sources import LoaderOptions

    register()
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    try:
        raw = yaml.safe_load(config.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PaveError(f"{config} is not YAML: {' '.join(str(error).split())}") from error
    findings = run_check(raw, options, allow_crimes=allow_crimes)
    for finding in findings:
        click.echo(f"{finding.level}: {finding}", err=True)
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)
    for line in estimates(raw, options):
        click.echo(line)
    click.echo(f"{config}: nothing wrong found.")


@main.command()
def methods() -> None:
    """List the purified merge methods and the methods they wrap."""
    from mergekit import merge_methods

    from mergekit_pave.plugin import register

    for name in register():
        inner = merge_methods.get(name).inner.spec
        click.echo(f"{name:24} {inner.pretty_name or inner.name}  {inner.reference_url or ''}")


if __name__ == "__main__":
    main()
