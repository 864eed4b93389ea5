"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import CALIBRATION, Parameter

if TYPE_CHECKING:  # help texts need none of it
    import torch

    from mergekit_pave.evaluation.setup import RowOptions
    from mergekit_pave.models.source import LoaderOptions


def calibration_options(command: Callable) -> Callable:
    """The keys of calibration, by their names in the YAML."""
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


def _checked(parameter: Parameter, value: Any) -> Any:
    try:
        return parameter.validate(value)
    except PaveError as error:
        raise click.BadParameter(error.message) from error


def device_of(name: str) -> torch.device:
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


def _device(ctx: click.Context, option: click.Parameter, name: str) -> torch.device:
    return device_of(name)


def device_option(what: str) -> Callable:
    """`--device`, as a torch device."""
    return click.option(
        "--device", default="cpu", show_default=True, callback=_device,
        help=f"{what}: cpu, cuda, ..., or auto for the accelerator that is there.")


def memory_option(flag: str, text: str) -> Callable:
    """A size such as 8GiB, as bytes."""

    def read(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
        from mergekit_pave.storage.sizes import parse_bytes

        return parse_bytes(flag, value)

    return click.option(flag, callback=read, help=text)


def _gathered(name: str, make: Callable, options: dict[str, Callable]) -> Callable:
    """Have a command take several options as one argument, which `make` makes of them."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**given: Any) -> Any:
            own = {key: given.pop(key) for key in options}
            return command(**given, **{name: make(**own)})

        for option in reversed(options.values()):
            run = option(run)
        return run

    return decorate


def _loader_options(
    lora_merge_cache: str | None, transformers_cache: str | None, trust_remote_code: bool
) -> LoaderOptions:
    from mergekit_pave.models.source import LoaderOptions

    return LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)


# How models are loaded, as mergekit-yaml takes it: the argument `options`.
model_options = _gathered("options", _loader_options, {
    "lora_merge_cache": click.option(
        "--lora-merge-cache", help="Folder for merged copies of MODEL+ADAPTER."),
    "transformers_cache": click.option("--transformers-cache", help="Folder for downloads."),
    "trust_remote_code": click.option(
        "--trust-remote-code", is_flag=True, help="Let the models' repositories run code."),
})


def _row_options(**given: Any) -> RowOptions:
    from mergekit_pave.evaluation.setup import RowOptions

    return RowOptions(**given)


_ROWS = {
    "rows": click.option("--rows", default=64, show_default=True, type=click.IntRange(min=2),
                         help="Held-out rows of each model, at most."),
    "max_tokens": click.option("--max-tokens", default=256, show_default=True,
                               type=click.IntRange(min=2), help="Tokens of a row, at most."),
    "held_out": click.option(
        "--held-out", multiple=True, metavar="DATA",
        help="Rows of a model's task, a file or data set; once for each model, in their order. By "
        "default rows of its calibration data that calibration does not draw."),
    "split": click.option("--split", help="Split of each model's own data to take rows from."),
    "base": click.option("--base", metavar="MODEL",
                         help="The base model, where the merge names none."),
}
_GENERAL = {"general": click.option("--general", metavar="DATA",
                                    help="Rows of no task: what the merge damages.")}
# Which rows are scored: the argument `rows`.
row_options = _gathered("rows", _row_options, _ROWS)
rows_and_general = _gathered("rows", _row_options, _ROWS | _GENERAL)
