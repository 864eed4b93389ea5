"""Cards in Markdown: templates of this package, and our block in a card that is the user's."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_pave.errors import PaveError

CARD = "README.md"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mergekit_pave.publish"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


def rendered(name: str, **values: Any) -> str:
    """A template of the folder `templates`; parts that are empty leave no empty lines."""
    text = _environment().get_template(name).render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def table(rows: Sequence[Sequence[str]], words: int) -> str:
    """Rows as a table, the first its head; columns behind the first `words` are numbers."""
    rule = ["---:" if i >= words else "---" for i in range(len(rows[0]))]
    lines = ([_cell(text) for text in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def parsed_card(path: Path, text: str) -> ModelCard:
    """A card by its text; raises `PaveError` where the metadata at its head are broken."""
    try:
        card = ModelCard(text)
        for key in ("tags", "base_model", "datasets"):
            names = getattr(card.data, key, None) or []
            if not isinstance(names, str) and not (
                    isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError(f"{key} is no list of names")
        return card
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PaveError(
            f"The metadata at the head of {path} is broken ({reason}); repair the block between "
            "the two `---` lines."
        ) from error


def with_block(text: str, name: str, new: str) -> str:
    """The text with our block of that name replaced, or added at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{new.strip()}\n{end}"
    old = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if old.search(text):
        return old.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"
