"""Everything that can be known about a merge before a download or a forward pass.

`mergekit-pave check` prints the findings; the stock command stops at the first error.
mergekit itself ignores unknown keys and reads lists as gradients over the layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods import MergeMethod, ParameterScope

from mergekit_pave.calibration.data import CalibrationSpec, open_rows
from mergekit_pave.calibration.model import refuse_quantised
from mergekit_pave.errors import PaveError
from mergekit_pave.method import PREFIX, PaveMerge
from mergekit_pave.parameters import CALIBRATION, PARAMETERS
from mergekit_pave.sources import LoaderOptions, fetch_store

# Names of the same thing in neighbouring tools, for suggestions only.
_ELSEWHERE = {
    "nsamples": "num_calibration_samples",
    "n_samples": "num_calibration_samples",
    "num_samples": "num_calibration_samples",
    "num_ada_examples": "num_calibration_samples",
    "seqlen": "max_seq_length",
    "max_length": "max_seq_length",
    "batch_size": "calibration_batch_size",
    "dataset": "calibration_dataset",
    "split": "calibration_split",
    "seed": "calibration_seed",
    "percdamp": "dampening_frac",
    "damp_percent": "dampening_frac",
    "rank_scale": "rank_ratio",
    "rank_ratios": "rank_ratio",
}
_SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
               "num_key_value_heads", "n_layer", "n_embd", "n_head", "d_model", "num_layers")


@dataclass(frozen=True)
class Finding:
    """One thing to know: `level` is `error` or `warning`, `where` a path into the YAML."""

    level: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


def check(raw: Any, options: LoaderOptions, *, allow_crimes: bool = False) -> list[Finding]:
    """All findings for a parsed YAML file; a later stage only runs when the earlier are clean."""
    findings: list[Finding] = []
    for stage in (_check_keys, _check_inputs, _check_models, _check_data):
        try:
            findings += stage(raw, options, allow_crimes)
        except PaveError as error:
            findings.append(Finding("error", "", str(error)))
        if any(f.level == "error" for f in findings):
            break
    return findings


def preflight(
    config: MergeConfiguration, source: str | None, options: LoaderOptions, allow_crimes: bool
) -> list[str]:
    """Refuse a merge that cannot work; return the warnings.

    Raises:
        PaveError: the first error found.
    """
    raw = yaml.safe_load(source) if source else config.model_dump(mode="json", exclude_none=True)
    findings = check(raw, options, allow_crimes=allow_crimes)
    errors = [str(f) for f in findings if f.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: run `mergekit-pave check`)" if errors[1:] else ""
        raise PaveError(errors[0] + more)
    return [str(f) for f in findings]


def purified_method(name: str) -> PaveMerge:
    """The registered purified method of that name, or `PaveError` with the nearest ones."""
    ours = [m.spec.name for m in merge_methods.registered_methods() if isinstance(m, PaveMerge)]
    if name in ours:
        return merge_methods.get(name)
    if PREFIX + name in ours:
        hint = f"its purified form is {PREFIX + name}"
    else:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), ours, 1)
        hint = f"did you mean {near[0]}?" if near else "the purified ones: " + ", ".join(ours)
    raise PaveError(f"merge_method: {name!r} is not a purified merge method; {hint}.")


def looks_like_ours(name: str) -> bool:
    """Whether an unknown method name was meant to be one of ours (`pave-ties`, `pave_tie`)."""
    known = {method.spec.name for method in merge_methods.registered_methods()}
    return name not in known and name.lower().replace("-", "_").startswith(("pave", "pav_"))


# --- keys and values -----------------------------------------------------------------------


def _check_keys(raw: Any, options: LoaderOptions, allow_crimes: bool) -> Iterator[Finding]:
    del options, allow_crimes
    if not isinstance(raw, dict):
        raise PaveError("The configuration is not a YAML mapping with merge_method and models.")
    if "merge_method" not in raw:
        raise PaveError("merge_method is missing: add, for example, `merge_method: pave_ties`.")
    method = purified_method(str(raw["merge_method"]))
    yield from _unknown(raw, MergeConfiguration.model_fields, "", method)
    for where, mapping, fields in _sections(raw):
        if not isinstance(mapping, dict):
            yield Finding("error", where, "must be a mapping such as `model: NAME`.")
            continue
        if fields:
            yield from _unknown(mapping, fields, where, method)
        if (parameters := mapping.get("parameters")) is not None:
            path = f"{where}.parameters".lstrip(".")
            if isinstance(parameters, dict):
                yield from _check_parameters(parameters, path, method, "model" in mapping)
            else:
                yield Finding("error", path, "must be a mapping of parameter names to values.")


def _sections(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """Every mapping that can hold `parameters`: (path, mapping, known keys)."""
    yield "", raw, ()
    yield from _models(raw, "models")
    yield from _slices(raw, "slices")
    for name, module in (raw.get("modules") or {}).items():
        path = f"modules.{name}"
        yield path, module, ("slices", "models", "parameters", "name")
        if isinstance(module, dict):
            yield from _models(module, "models", path + ".")
            yield from _slices(module, "slices", path + ".")


def _models(raw: Mapping[str, Any], key: str, prefix: str = "") -> Iterator[tuple]:
    fields = {*InputModelDefinition.model_fields, "layer_range"}
    for i, model in enumerate(raw.get(key) or []):
        yield f"{prefix}{key}[{i}]", model, fields


def _slices(raw: Mapping[str, Any], key: str, prefix: str = "") -> Iterator[tuple]:
    for i, piece in enumerate(raw.get(key) or []):
        path = f"{prefix}{key}[{i}]"
        yield path, piece, OutputSliceDefinition.model_fields
        if isinstance(piece, dict):
            yield from _models(piece, "sources", path + ".")


def _unknown(
    mapping: Mapping[str, Any], fields: Iterable[str], where: str, method: PaveMerge
) -> Iterator[Finding]:
    fields = list(fields)
    parameters = [p.name for p in method.spec.parameters]
    for key in mapping:
        if key in fields:
            continue
        if key in parameters:
            hint = f"it belongs under `{where + '.' if where else ''}parameters`"
        else:
            hint = _suggest(str(key), fields + parameters)
        yield Finding("error", where or "top level", f"unknown key {key!r}; {hint}.")


def _suggest(key: str, known: list[str]) -> str:
    near = [_ELSEWHERE[key]] if _ELSEWHERE.get(key) in known else []
    near = near or difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else "known: " + ", ".join(sorted(known))


def _check_parameters(
    parameters: Mapping[str, Any], where: str, method: MergeMethod, of_model: bool
) -> Iterator[Finding]:
    specs = {p.name: p for p in method.spec.parameters}
    for key, value in parameters.items():
        path = f"{where}.{key}"
        if key not in specs:
            hint = _suggest(str(key), list(specs))
            yield Finding("error", where, f"unknown key {key!r}; {hint}.")
            continue
        if of_model and specs[key].scope == ParameterScope.SHARED:
            yield Finding("error", path, "is one value for the whole merge: move it to the top "
                                         "level `parameters`.")
            continue
        yield from _check_value(specs[key], value, path)


def _check_value(spec: Any, value: Any, where: str) -> Iterator[Finding]:
    ours = PARAMETERS.get(spec.name)
    if isinstance(value, list) and ours and not ours.gradient:
        if ours.per_model or not all(isinstance(v, dict) for v in value):
            yield Finding("error", where, "must be a single value: mergekit reads a list as a "
                          "gradient over the layers; give each model its own under "
                          "`models[].parameters`.")
            return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            if "value" not in item:
                yield Finding("error", where, "must be a scalar, or items with `filter` and "
                              "`value`.")
                continue
            if ours and ours.per_model:
                yield Finding("error", where, "cannot be filtered by tensor name: a model is "
                              "calibrated once.")
                continue
            yield from _check_value(spec, item["value"], where)
            continue
        if item is None:
            yield Finding("error", where, "has no value.")
            continue
        try:
            spec.validate(item)
        except PaveError as error:
            yield Finding("error", where, str(error))
        except ValueError:
            kind = getattr(spec.value_type, "__name__", str(spec.value_type))
            yield Finding("error", where, f"{spec.name} must be a {kind}; got {item!r}.")


# --- inputs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """One non-base model with its parameters, the nearest scope first."""

    model: ModelReference
    where: str
    scopes: tuple[Mapping[str, Any], ...]

    def get(self, name: str) -> Any:
        for scope in self.scopes:
            if scope and name in scope:
                return scope[name]
        return PARAMETERS[name].default


def configuration(raw: Any) -> MergeConfiguration:
    """mergekit's own reading of the YAML, its complaints as one sentence."""
    try:
        return MergeConfiguration.model_validate(raw)
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()
        raise PaveError(f"mergekit cannot read the configuration: {' '.join(first[:3])}") from error


def inputs(config: MergeConfiguration) -> list[Input]:
    """The fine-tuned models of a configuration, once each."""
    found: dict[ModelReference, Input] = {}

    def add(items: Iterable[Any], where: str, *outer: Mapping[str, Any] | None) -> None:
        for i, item in enumerate(items):
            if item.model == config.base_model or item.model in found:
                continue
            scopes = (item.parameters or {}, *(o or {} for o in outer))
            found[item.model] = Input(item.model, f"{where}[{i}]", scopes)

    top = config.parameters
    add(config.models or [], "models", top)
    for i, piece in enumerate(config.slices or []):
        add(piece.sources, f"slices[{i}].sources", piece.parameters, top)
    for name, module in (config.modules or {}).items():
        add(module.models or [], f"modules.{name}.models", module.parameters, top)
        for i, piece in enumerate(module.slices or []):
            add(piece.sources, f"modules.{name}.slices[{i}].sources", piece.parameters,
                module.parameters, top)
    return list(found.values())


def _check_inputs(raw: Any, options: LoaderOptions, allow_crimes: bool) -> Iterator[Finding]:
    del allow_crimes
    config = configuration(raw)
    if config.base_model is None:
        yield Finding("error", "base_model", "is missing: task vectors are differences from it; "
                      "add `base_model: NAME`.")
    models = inputs(config)
    if not models:
        yield Finding("error", "models", "holds no fine-tuned model beside the base.")
    shared = config.parameters or {}
    if "dampening_frac" in shared and "regularization" in shared:
        yield Finding("error", "parameters", "dampening_frac and regularization exclude each "
                      "other: keep one of them.")
    by_covariance = shared.get("subspace", "covariance") == "covariance"
    purifies = by_covariance and shared.get("rank_ratio") != 1
    for entry in models:
        if entry.model.lora and not options.lora_merge_cache:
            yield Finding("error", entry.where, f"{entry.model} names an adapter: add "
                          "--lora-merge-cache DIR to the command (a path with a `+` is read as "
                          "model plus adapter).")
        if purifies and not (entry.get("covariance") or entry.get("calibration_dataset")):
            yield Finding("error", entry.where, f"{entry.model} has no calibration data: add "
                          "`calibration_dataset: NAME_OR_FILE` (its own task data) or "
                          "`covariance: STORE` to its parameters.")
    yield from _check_slices(config)


def _check_slices(config: MergeConfiguration) -> Iterator[Finding]:
    groups = [("slices", config.slices or [])]
    groups += [(f"modules.{n}.slices", m.slices or []) for n, m in (config.modules or {}).items()]
    for where, pieces in groups:
        for i, piece in enumerate(pieces):
            if len({tuple(source.layer_range) for source in piece.sources}) > 1:
                yield Finding("error", f"{where}[{i}]", "its sources have different layer_range: "
                              "a task vector needs the same layer of model and base; make the "
                              "ranges equal.")


# --- models --------------------------------------------------------------------------------


def _check_models(raw: Any, options: LoaderOptions, allow_crimes: bool) -> Iterator[Finding]:
    config = configuration(raw)
    base = config.base_model
    base_config = read_config(base, options)
    for entry in inputs(config):
        own = read_config(entry.model, options)
        where = entry.where
        if own.architectures != base_config.architectures and not allow_crimes:
            yield Finding("error", where, f"{entry.model} is a {own.architectures} and the base a "
                          f"{base_config.architectures}; merging needs one architecture.")
            continue
        for key in _SHAPE_KEYS:
            ours, theirs = _get(own, key), _get(base_config, key)
            if ours != theirs and not (config.slices and "layer" in key):
                yield Finding("error", where, f"{entry.model} has {key} {ours}, the base "
                              f"{theirs}; merge fine-tunes of this base only.")
        sizes = _get(own, "vocab_size"), _get(base_config, "vocab_size")
        if sizes[0] != sizes[1] and not (config.tokenizer or config.tokenizer_source):
            yield Finding("error", where, f"{entry.model} has {sizes[0]} tokens, the base "
                          f"{sizes[1]}; add `tokenizer: {{source: base}}` to the configuration.")


def _get(config: Any, key: str) -> Any:
    return getattr(config.get_text_config(), key, None)


def read_config(model: ModelReference, options: LoaderOptions) -> transformers.PretrainedConfig:
    """A model's config; raises `PaveError` when it is missing, unreadable or quantised."""
    path = model.model.path
    if path.lower().endswith(".gguf"):
        raise PaveError(f"{path} is a quantised GGUF file: name the full-precision checkpoint.")
    if path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise PaveError(f"There is no model folder {path}.")
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(
            f"Cannot read the config of {path} ({reason}): check the name, the network and, for "
            "a gated model, `hf auth login`."
        ) from error
    refuse_quantised(config, path)
    return config


# --- data ----------------------------------------------------------------------------------


def _check_data(raw: Any, options: LoaderOptions, allow_crimes: bool) -> Iterator[Finding]:
    del allow_crimes
    config = configuration(raw)
    for entry in inputs(config):
        if store := entry.get("covariance"):
            fetch_store(store, options)
            if entry.get("calibration_dataset"):
                yield Finding("warning", entry.where, "covariance is used, its calibration keys "
                              "are not.")
        elif entry.get("calibration_dataset"):
            spec = calibration_spec(entry)
            try:
                open_rows(spec)
            except PaveError as error:
                yield Finding("error", entry.where, str(error))


def calibration_spec(entry: Input) -> CalibrationSpec:
    """The calibration data of one input, as the method would read it."""
    values = {p.name: p.validate(entry.get(p.name)) for p in CALIBRATION}
    return CalibrationSpec.from_parameters(values)
