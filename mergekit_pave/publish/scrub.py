"""What must not be published: local paths and user names in text that came from a YAML file."""

from __future__ import annotations

import json
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

_MARKS = re.compile(r"(?:[&!]\S*\s+)*")
_YAML_BLOCK = re.compile(r"(^```ya?ml\n.*?^```)", re.MULTILINE | re.DOTALL)


def scrub_card(text: str, raw: Any, local: Collection[str] = ()) -> str:
    """A model card without local paths, for which see `scrub_configuration`.

    Those of the configuration go wherever they are; any other only from a block of YAML, where a
    comment may have it. Elsewhere it may as well be a link of the user's own.
    """
    paths = {*local_paths(raw), *local}
    parts = _YAML_BLOCK.split(text)
    for i, part in enumerate(parts):
        fence, line, source = part.partition("\n") if i % 2 else ("", "", "")
        parts[i] = fence + line + _cleaned(source, paths) if i % 2 else _without(part, paths)
    return "".join(parts)


def _without(text: str, paths: Collection[str]) -> str:
    for path in sorted(paths, key=len, reverse=True):
        exact = rf"(?<![\w./~\\-]){re.escape(path)}(?![\w\\/-]|\.\w)"
        # As a template the name would be read for backslashes.
        text = re.sub(exact, last_part(path).replace("\\", r"\\"), text)
    return text


def _cleaned(source: str, paths: Collection[str]) -> str:
    """YAML without anything that looks like a path, but for a chat template: text of its own."""
    parts, end = [], 0
    for start, after, value in _replacements(source, paths):
        parts += [_LOOSE.sub(_name_found, _without(source[end:start], paths)), value]
        end = after
    parts.append(_LOOSE.sub(_name_found, _without(source[end:], paths)))
    return "".join(parts)


def _replacements(source: str, paths: Collection[str]) -> list[tuple[int, int, str]]:
    """Scalars of which every letter is known: (start, end, what they become), in their order."""
    try:
        root = yaml.compose(source.removesuffix("```"), yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    found = {}  # by their place: an alias leads to the same scalar again
    for key, node in _keyed_scalars(root):
        start, end = node.start_mark.index, node.end_mark.index
        if key == "chat_template":
            found[start] = (start, end, _without(source[start:end], paths))
        elif (public := _public_value(key, node.value, paths)) == node.value:
            found[start] = (start, end, source[start:end])
        else:
            # An anchor, to which aliases lead, and a tag stay.
            marks = _MARKS.match(source, start, end)[0]
            found[start] = (start, end, marks + _scalar(public, node.style))
    return sorted(found.values())


def _keyed_scalars(node: yaml.Node | None) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every name of a model or of data, and the chat template, with its key."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keyed_scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str"):
                if key.value in (*_MODEL_KEYS, *_DATA_KEYS, "chat_template"):
                    yield key.value, value
            else:
                yield from _keyed_scalars(value)


def _public_value(key: str, value: str, paths: Collection[str]) -> str:
    """What may be published of the value of a key, such as `MODEL@REVISION+ADAPTER`."""
    if key in _DATA_KEYS:
        return last_part(value) if value in paths else value
    parts = [part.partition("@") for part in value.split("+")]
    return "+".join(
        (last_part(path) if path in paths else path) + at + revision
        for path, at, revision in parts)


def _scalar(value: str, style: str | None) -> str:
    """A string as YAML, inside brackets and outside; quoted where it has to be, or was."""
    if style is None and _is_plain(value):
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    # The end of a block scalar is the beginning of the next line.
    return quoted + "\n" if style in ("|", ">") else quoted


def _is_plain(value: str) -> bool:
    try:
        return yaml.safe_load(f"[a: {value}]") == [{"a": value}]
    except yaml.YAMLError:
        return False


def _name_found(found: re.Match) -> str:
    return name_of(found[0])


def scrub_configuration(text: str, local: Collection[str] = ()) -> str:
    """The YAML source of a merge without local paths; it still says the same otherwise.

    Args:
        text: the source.
        local: names in it that are known to be paths, however they look from here.

    Raises:
        PaveError: a path is left, in a place where none is known to be.
    """
    clean = _cleaned(text, {*local_paths(yaml.safe_load(text)), *local})
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
