"""The YAML by itself: its syntax, and the names, places and values of its keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.config import InputModelDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods import MergeMethod, ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from mergekit.tokenizer.config import TokenizerConfig

from mergekit_pave.check.finding import Finding, error
from mergekit_pave.errors import PaveError
from mergekit_pave.recipe.parameters import PARAMETERS, PREFIX
from mergekit_pave.recipe.spelling import nearest, our_method, our_names, suggestion

# `name` is what mergekit-multi calls a merge, and stays behind in the files it made.
_TOP = (*MergeConfiguration.model_fields, "name")
_MODEL = tuple(InputModelDefinition.model_fields)
_SOURCE = (*_MODEL, "layer_range")
_SLICE = tuple(OutputSliceDefinition.model_fields)
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}
_MODULE = ("slices", "models", "parameters", "name")


def ignored(config: MergeConfiguration) -> str | None:
    """A warning where keys of a purified method are given to the plain one, which drops them."""
    name = config.merge_method
    if PREFIX + name not in our_names():
        return None
    own = {parameter.name for parameter in merge_methods.get(name).spec.parameters}
    found = [key for key in _parameter_names(config.model_dump()) if key in {*PARAMETERS} - own]
    if not found:
        return None
    return (
        f"{name} ignores {', '.join(sorted(set(found)))}; the method that purifies is "
        f"{PREFIX + name}."
    )


def _parameter_names(raw: Any) -> Iterator[str]:
    """The keys of every `parameters` mapping of a configuration."""
    if isinstance(raw, list):
        for item in raw:
            yield from _parameter_names(item)
    elif isinstance(raw, dict):
        yield from raw.get("parameters") or {}
        for value in raw.values():
            yield from _parameter_names(value)


def check_keys(raw: Any) -> Iterator[Finding]:
    """Every key that mergekit would drop or read as something else."""
    if not isinstance(raw, dict):
        raise PaveError("The configuration is not a YAML mapping with merge_method and models.")
    if raw.get("merge_method") is None:
        raise PaveError("merge_method is missing: add, for example, `merge_method: pave_ties`.")
    method = our_method(str(raw["merge_method"]))
    for where, mapping, fields in _sections(raw):
        if not isinstance(mapping, dict):
            yield error(where, "must be a mapping such as `model: NAME`.")
            continue
        yield from _unknown(mapping, fields, where, method)
        if "model" in fields and mapping.get("model") is None:
            yield error(where, "names no model: add `model: NAME_OR_FOLDER`.")
        for key in ("models", "slices", "sources"):
            if key in fields and not isinstance(mapping.get(key) or [], list):
                yield error(_join(where, key), "must be a list, each item on a line with `-`.")
        parameters = mapping.get("parameters")
        if parameters is None or "parameters" not in fields:
            continue
        if isinstance(parameters, dict):
            path = _join(where, "parameters")
            yield from _check_parameters(parameters, path, method, "model" in fields)
        else:
            yield error(
                _join(where, "parameters"), "must be a mapping of parameter names to values."
            )


def _sections(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Every mapping of the configuration: (path, mapping, known keys)."""
    yield "", raw, _TOP
    if raw.get("tokenizer") is not None:
        yield "tokenizer", raw["tokenizer"], tuple(TokenizerConfig.model_fields)
    yield from _parts(raw, "")
    modules = raw.get("modules") or {}
    if not isinstance(modules, dict):
        yield "modules", modules, ()
        return
    for name, module in modules.items():
        path = f"modules.{name}"
        yield path, module, _MODULE
        if isinstance(module, dict):
            yield from _parts(module, path)


def _parts(mapping: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    yield from _items(mapping, _join(where, "models"), _MODEL)
    for path, piece, fields in _items(mapping, _join(where, "slices"), _SLICE):
        yield path, piece, fields
        if isinstance(piece, dict):
            yield from _items(piece, _join(path, "sources"), _SOURCE)


def _items(
    mapping: Mapping[str, Any], path: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    items = mapping.get(path.rpartition(".")[2])
    for i, item in enumerate(items if isinstance(items, list) else []):
        yield f"{path}[{i}]", item, fields


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _unknown(
    mapping: Mapping[str, Any], fields: Collection[str], where: str, method: MergeMethod
) -> Iterator[Finding]:
    parameters = [p.name for p in method.spec.parameters] if "parameters" in fields else []
    for key in mapping:
        if key in fields:
            continue
        meant = nearest(str(key), [*fields, *parameters])
        if key in parameters or (meant in parameters and meant not in fields):
            spelt = "" if key in parameters else f"did you mean {meant}? "
            hint = f"{spelt}it belongs under `{_join(where, 'parameters')}`."
        elif key == "layer_range":
            hint = "it belongs under `slices[].sources[]`."
        else:
            hint = suggestion(str(key), fields)
        yield error(where or "top level", f"unknown key {key!r}; {hint}")


def _check_parameters(
    parameters: Mapping[str, Any], where: str, method: MergeMethod, of_model: bool
) -> Iterator[Finding]:
    specs = {p.name: p for p in method.spec.parameters}
    for key, value in parameters.items():
        path = f"{where}.{key}"
        if key not in specs:
            if value is None and "text_column" in parameters:
                hint = 'between braces YAML ends a value at a comma: write text_column: "a,b".'
            else:
                hint = suggestion(str(key), list(specs))
            yield error(where, f"unknown key {key!r}; {hint}")
        elif of_model and specs[key].scope == ParameterScope.SHARED:
            yield error(
                path, "is one value for the whole merge: move it to the top level `parameters`."
            )
        else:
            yield from _check_value(specs[key], value, path)


def _check_value(spec: ParameterSpec, value: Any, where: str) -> Iterator[Finding]:
    ours = getattr(spec, "parameter", None)
    if isinstance(value, list) and ours and not ours.gradient:
        if ours.per_model or not all(isinstance(v, dict) for v in value):
            if spec.name == "text_column":
                mend = f'to join columns write text_column: "{",".join(map(str, value))}"'
            elif ours.per_model:
                mend = "give each model its own under `models[].parameters`"
            else:
                mend = "give one value, or items with `filter` and `value`"
            yield error(
                where, "must be a single value: mergekit reads a list as a gradient over the "
                f"layers; {mend}."
            )
            return
    if value is None or value == []:
        yield error(where, "has no value: give one, or remove the key.")
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            yield from _check_condition(spec, item, where)
            continue
        try:
            spec.validate(item)
        except PaveError as fault:
            yield error(where, str(fault).removeprefix(f"{spec.name} "))
        except ValueError:
            kind = _KINDS.get(spec.value_type, str(spec.value_type))
            yield error(where, f"must be {kind}; got {item!r}.")


def _check_condition(
    spec: ParameterSpec, condition: Mapping[str, Any], where: str
) -> Iterator[Finding]:
    """`{filter: PART_OF_A_NAME, value: ...}`, mergekit's value for some tensors only."""
    if spec.name in PARAMETERS and PARAMETERS[spec.name].per_model:
        yield error(
            where, "must be a single value, not a mapping: a model is calibrated once, on data "
            "that the keys calibration_dataset, calibration_config, ... name side by side."
        )
        return
    if "value" not in condition:
        yield error(where, "must be a single value, or items with `filter` and `value`.")
        return
    for key in condition:
        if key not in ("filter", "value"):
            # Without its filter the value would hold for every tensor.
            yield error(where, f"unknown key {key!r}; {suggestion(str(key), ['filter', 'value'])}")
    if isinstance(condition["value"], dict):
        yield error(where, "`value` must be a single value.")
    else:
        yield from _check_value(spec, condition["value"], where)
