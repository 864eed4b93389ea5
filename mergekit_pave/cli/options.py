"""Options that several commands have, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CALIBRATION, Parameter


def _calibration_options(command):
    for parameter in reversed(CALIBRATION):
        # To click a default of None is a value that was given.
        default = {} if parameter.default is None else {"default": parameter.default}
        command = click.option(
            "--" + parameter.name.removeprefix("calibration_").replace("_", "-"),
            parameter.name,
            type=parameter.plain_type,
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


def device_of(name: str):
    """The torch device of `--device`; raises `BadParameter` for one that is not here."""
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    # MPS tells nothing of its memory, and has no float64.
    if here and not hasattr(torch.get_device_module(here), "mem_get_info"):
        here = None
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
