"""Writes the generated parts of docs/reference.md: `python docs/make_reference.py`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from mergekit_pave.cli import main
from mergekit_pave.methods import methods
from mergekit_pave.recipe.parameters import PARAMETERS, reference_table

REFERENCE = Path(__file__).with_name("reference.md")


def commands() -> str:
    """A table of all commands, then the options of each."""
    group = click.Context(main, info_name="mergekit-pave")
    table, details = ["| command | does |", "|---|---|"], []
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        context = click.Context(command, info_name=f"mergekit-pave {name}", parent=None)
        usage = [piece for piece in command.collect_usage_pieces(context) if piece != "[OPTIONS]"]
        paragraph = " ".join(command.help.split("\n\n")[0].split())
        table.append(f"| `mergekit-pave {' '.join([name, *usage])}` | {_cell(paragraph)} |")
        options = [p for p in command.params if isinstance(p, click.Option)]
        if options:
            details += ["", f"### Options of {name}", "", "| option | meaning |", "|---|---|"]
            details += [_option(option, context) for option in options]
    return "\n".join(table + details)


def _option(option: click.Option, context: click.Context) -> str:
    value = "" if option.is_flag else " " + option.make_metavar(context)
    default = ""
    if option.show_default and option.default is not None:
        default = f" Default: {option.default}."
    return f"| `{_cell(', '.join(option.opts) + value)}` | {_cell(option.help + default)} |"


def keys_of_methods() -> str:
    """For each method of this package a table of its own keys."""
    lines: list[str] = []
    for method in methods():
        spec = method.spec
        lines += [f"### `{spec.name}`", ""]
        lines += ["| key | for | default | meaning |", "|---|---|---|---|"]
        own = [p.parameter for p in spec.parameters]
        for p in own:
            if p.name not in PARAMETERS:
                scope = "each model" if p.per_model else "the merge"
                default = "-" if p.default is None else f"`{p.default}`"
                lines.append(f"| `{p.name}` | {scope} | {default} | {_cell(p.doc)} |")
        if any(p.name == "covariance" for p in own):
            lines += ["", "Beside these: `covariance` and the calibration keys."]
        lines.append("")
    return "\n".join(lines).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS = {"commands": commands, "methods": keys_of_methods, "parameters": reference_table}


def filled(text: str) -> str:
    """`text` with everything between the markers of `PARTS` written anew."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        made = make()
        text = re.sub(
            pattern, lambda m, made=made: m.group(1) + made + m.group(2), text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    REFERENCE.write_text(filled(REFERENCE.read_text("utf-8")), "utf-8")
