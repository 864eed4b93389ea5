"""What must not be published: local paths, in a merge's configuration and in its card."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from mergekit_pave.models.names import is_local, last_part, name_of

_MODEL_KEYS = {"model", "base_model", "lora", "path", "source", "tokenizer_source"}
_DATA_KEYS = {"calibration_dataset", "covariance"}
_YAML_BLOCK = re.compile(r"^```ya?ml\n.*?^```", re.MULTILINE | re.DOTALL)


def scrub_configuration(raw: Any, local: Collection[str] = ()) -> str:
    """A merge's configuration as YAML, every local path cut to its name.

    It is written anew from what it says, so that no comment can keep a path.

    Args:
        raw: the parsed configuration.
        local: names in it that are known to be paths, however they look from here.
    """
    return yaml.safe_dump(_public(raw, local), sort_keys=False, allow_unicode=True)


def _public(raw: Any, local: Collection[str], key: str = "") -> Any:
    if isinstance(raw, list):
        return [_public(item, local, key) for item in raw]
    if isinstance(raw, dict):
        return {name: _public(value, local, name) for name, value in raw.items()}
    if not isinstance(raw, str) or key not in _MODEL_KEYS | _DATA_KEYS:
        return raw
    if key in _DATA_KEYS:
        # A URL is no path, and loses only what may be secret, even if the record calls it local.
        return last_part(raw) if raw in local and "://" not in raw else name_of(raw)
    return "+".join(_public_part(part, local) for part in raw.split("+"))


def _public_part(part: str, local: Collection[str]) -> str:
    path, at, revision = part.partition("@")
    return (last_part(path) if path in local else name_of(path)) + at + revision


def scrub_card(text: str, raw: Any, local: Collection[str] = ()) -> str:
    """A model card without the local paths of its configuration, wherever they are.

    Its block of YAML becomes that of `scrub_configuration`. Other paths stay: they may be
    links that the user has written.
    """
    fenced = f"```yaml\n{scrub_configuration(raw, local)}```"
    text = _YAML_BLOCK.sub(
        lambda found: fenced if "merge_method:" in found[0] else found[0], text)
    for path in sorted({*local_paths(raw), *local}, key=len, reverse=True):
        exact = rf"(?<![\w./~\\-]){re.escape(path)}(?![\w\\/-]|\.\w)"
        public = name_of(path) if "://" in path else last_part(path)
        # `re.sub` would read backslashes in the name as groups.
        text = re.sub(exact, public.replace("\\", r"\\"), text)
    return text


def local_paths(raw: Any) -> Iterator[str]:
    """Every local path that a merge configuration names, with its adapters', and every URL of data
    with what may be secret in it."""
    if isinstance(raw, list):
        for item in raw:
            yield from local_paths(item)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if not isinstance(value, str):
                yield from local_paths(value)
            elif key in _DATA_KEYS and name_of(value) != value:
                yield value
            elif key in _MODEL_KEYS:
                paths = (part.partition("@")[0] for part in value.split("+"))
                yield from (path for path in paths if path and is_local(path))
