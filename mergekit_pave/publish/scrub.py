"""What must not be published: local paths and user names in text that came from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import is_local, last_part, name_of

_MODEL_KEYS = {"model", "base_model", "lora", "path", "source", "tokenizer_source"}
_DATA_KEYS = {"calibration_dataset", "covariance"}

# In comments and prose: from the root with two parts at least, from home, from a `.` or `..`.
_LOOSE = re.compile(
    r"""(?<![\w/.:~<\]])(?:file://)?
    (?:(?:~|\.\.?)(?:/[^\s/"'`,;()<>\[\]{}|*]+)+ | (?:/[^\s/"'`,;()<>\[\]{}|*]+){2,})/?
    | (?<!\w)[A-Za-z]:[\\/]+[^\s"'`,;()<>\[\]{}|*]+""",
    re.VERBOSE,
)

_YAML_BLOCK = re.compile(r"(^```ya?ml\n.*?^```)", re.MULTILINE | re.DOTALL)


def scrub_card(text: str, raw: Any, local: Collection[str] = ()) -> str:
    """A model card without local paths, for which see `scrub_configuration`.

    Those of the configuration go wherever they are; any other only from a block of YAML, where a
    comment may have it. Elsewhere it may as well be a link of the user's own.
    """
    parts = _YAML_BLOCK.split(_without(text, raw, local))
    return "".join(_cleaned(part) if i % 2 else part for i, part in enumerate(parts))


def _without(text: str, raw: Any, local: Collection[str]) -> str:
    for path in sorted({*local_paths(raw), *local}, key=len, reverse=True):
        exact = rf"(?<![\w./~\\-]){re.escape(path)}(?![\w\\/-]|\.\w)"
        # As a template the name would be read for backslashes.
        text = re.sub(exact, last_part(path).replace("\\", r"\\"), text)
    return text


def _cleaned(source: str) -> str:
    """YAML without anything that looks like a path, but for a chat template: text of its own."""
    start, end = _chat_template(source)
    return (
        _LOOSE.sub(_name_found, source[:start]) + source[start:end]
        + _LOOSE.sub(_name_found, source[end:])
    )


def _chat_template(source: str) -> tuple[int, int]:
    """Where in a merge's YAML, perhaps fenced, its value is."""
    fenced = source.startswith("```")
    before = source.index("\n") + 1 if fenced else 0
    try:
        node = yaml.compose(source[before:].removesuffix("```"), yaml.SafeLoader)
    except yaml.YAMLError:
        return 0, 0
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "chat_template":
            return before + value.start_mark.index, before + value.end_mark.index
    return 0, 0


def _name_found(found: re.Match) -> str:
    return name_of(found[0])


def scrub_configuration(text: str, local: Collection[str] = ()) -> str:
    """The YAML source of a merge without local paths; it still says the same otherwise.

    Args:
        text: the source.
        local: names in it that are known to be paths, however they look from here.

    Raises:
        PaveError: a path is written in a way that it cannot be cut out safely.
    """
    clean = _cleaned(_without(text, yaml.safe_load(text), local))
    for path in local_paths(yaml.safe_load(clean)):
        if name_of(path) != path:
            raise PaveError(
                f"The local path of {name_of(path)} could not be taken out of the merge "
                "configuration; write it on one line, as a plain scalar, in mergekit_config.yml."
            )
    return clean


def local_paths(raw: Any) -> Iterator[str]:
    """Every local path that a merge configuration names, with its adapters'."""
    if isinstance(raw, list):
        for item in raw:
            yield from local_paths(item)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if not isinstance(value, str):
                yield from local_paths(value)
            elif key in _DATA_KEYS and is_local(value):
                yield value
            elif key in _MODEL_KEYS:
                paths = (part.partition("@")[0] for part in value.split("+"))
                yield from (path for path in paths if path and is_local(path))
