"""From YAML to mergekit's configuration; every fault becomes one sentence."""

from __future__ import annotations

from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_pave.errors import PaveError


def configuration(raw: Any) -> MergeConfiguration:
    """Have mergekit read the YAML; its complaint becomes one sentence."""
    try:
        return MergeConfiguration.model_validate(raw)
    except (ValueError, RuntimeError) as fault:
        raise PaveError(f"mergekit cannot read the configuration: {_reason(fault)}.") from fault


def model_reference(name: str) -> ModelReference:
    """Have mergekit read a model's name, `MODEL[@REVISION][+ADAPTER]`."""
    try:
        return ModelReference.model_validate(name)
    except (ValueError, RuntimeError) as fault:
        raise PaveError(f"mergekit cannot read the model's name: {_reason(fault)}.") from fault


def _reason(fault: Exception) -> str:
    if isinstance(fault, ValidationError):
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}".lstrip(": ")
    reason = str(fault)
    if "@" in reason or "Can't parse" in reason:
        reason += (
            " (in a model's name `@` starts a revision and `+` an adapter: rename or link a "
            "folder that has them in its path)"
        )
    return reason


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; other YAML readers silently keep the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is given twice, keep one of them",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, name: str = "The configuration") -> Any:
    """Parse one YAML document; raises `PaveError` with the line of what is wrong."""
    try:
        return bounded(yaml.load(text, _Loader), name)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        if "expected a single document" in str(fault):
            raise PaveError(
                f"{name} holds several YAML documents{where}: put the one to check in a file "
                "of its own."
            ) from fault
        raise PaveError(f"{name} is not valid YAML: {fault.problem}{where}.") from fault
    except UNREADABLE as fault:
        raise PaveError(f"{name} is not valid YAML: {' '.join(str(fault).split())}.") from fault


# What the parser raises: for a date that is none, and for brackets in brackets in brackets.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
_MOST = 10**6


def bounded(value: Any, name: str) -> Any:
    """The value of a YAML document; raises `PaveError` where aliases make it endless.

    A few aliases to lists of aliases stand for more values than any memory holds.
    """
    todo, seen = [value], 0
    while todo:
        item, seen = todo.pop(), seen + 1
        if seen > _MOST:
            raise PaveError(
                f"{name} stands for more than {_MOST:,} values: write out what its aliases repeat.")
        todo += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return value


CONFIGURATION = "mergekit_config.yml"  # mergekit writes it beside a merged model
