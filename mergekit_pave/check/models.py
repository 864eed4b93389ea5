"""The models' configs, and the data and stores that go with them; no weights are downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.tokenizer.config import ModelTokenEmbedding
from transformers import PretrainedConfig

from mergekit_pave.calibration.limits import refuse_unless_causal
from mergekit_pave.calibration.rows import open_rows
from mergekit_pave.calibration.samples import load_tokenizer, refuse_unusable
from mergekit_pave.calibration.stores import fetch_store
from mergekit_pave.check.finding import Finding, error
from mergekit_pave.errors import PaveError
from mergekit_pave.models.adapted import only_by_peft
from mergekit_pave.models.layers import class_name
from mergekit_pave.models.merged_copies import refuse_two
from mergekit_pave.models.source import LoaderOptions, ModelSource, read_config, tokenizer_of
from mergekit_pave.recipe.inputs import Input, calibration_spec
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.covariances import CovarianceStore

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
           "n_embd", "n_head", "d_model", "d_ff")
# Enough tensors to notice a store of other weights without reading the checkpoint.
_LOOK_AT = 4


@dataclass(frozen=True)
class Allowances:
    """mergekit's flags that make it accept what it otherwise refuses."""

    crimes: bool = False
    truncated_embeddings: bool = False


def check_models(
    recipe: Recipe, options: LoaderOptions, allowed: Allowances
) -> Iterator[Finding]:
    """Whether the fine-tunes have the base's architecture and shapes, from configs alone."""
    config = recipe.config
    for entry in recipe.inputs:
        base = _mergeable(entry.base, options, "base_model")
        own = _mergeable(entry.model, options, entry.where)
        if entry.model.lora:
            _check_adapter(entry)
            if options.lora_merge_cache:
                refuse_two(entry.model)
            if not options.lora_merge_cache and (why := only_by_peft(entry.model, options)):
                yield error(entry.where, why)
        where, model = entry.where, entry.model
        if not allowed.crimes and _different(own, base):
            yield error(
                where, f"{model} is a {class_name(own)} and the base a {class_name(base)}; "
                "merging needs one architecture."
            )
            continue
        sliced = config.slices or any(m.slices for m in (config.modules or {}).values())
        yield from _check_layers(config, entry, own)
        for key in _WIDTHS if sliced else _LAYERS + _WIDTHS:
            ours, theirs = _get(own, key), _get(base, key)
            if None not in (ours, theirs) and ours != theirs:
                yield error(
                    where, f"{model} has {key} {ours}, the base {theirs}; merge fine-tunes of "
                    "this base only."
                )
        if "Classification" in class_name(own) and own.architectures == base.architectures:
            if own.num_labels != base.num_labels:
                yield error(
                    where, f"{model} classifies into {own.num_labels} labels, the base into "
                    f"{base.num_labels}: their heads cannot be merged; give the base a head of "
                    "the same size."
                )
        aligned = config.tokenizer or config.tokenizer_source or allowed.truncated_embeddings
        ours, theirs = _get(own, "vocab_size"), _get(base, "vocab_size")
        if ours != theirs and not aligned:
            yield error(
                where, f"{model} has {ours} tokens, the base {theirs}; add "
                "`tokenizer: {source: base}` to the configuration."
            )


def _check_layers(
    config: MergeConfiguration, entry: Input, own: PretrainedConfig
) -> Iterator[Finding]:
    """Slices of layers that a model of one stack of layers does not have."""
    there = next((n for key in _LAYERS if (n := _get(own, key)) is not None), None)
    for i, piece in enumerate(config.slices or []):
        for source in piece.sources:
            end = source.layer_range[1]
            if source.model == entry.model and there is not None and end > there:
                yield error(
                    f"slices[{i}]", f"layer_range ends at {end}, and {entry.model} has {there} "
                    f"layers; end it at {there} at most."
                )


def _get(config: PretrainedConfig, key: str) -> Any:
    try:
        config = config.get_text_config()
    except ValueError:  # it has several
        pass
    return getattr(config, key, None)


def _different(a: PretrainedConfig, b: PretrainedConfig) -> bool:
    """Whether two architectures differ, by mergekit's definitions or else by the model type."""
    known = arch_info_for_config(a), arch_info_for_config(b)
    if None not in known:
        return known[0] != known[1]
    return a.model_type != b.model_type


def _mergeable(
    model: ModelReference, options: LoaderOptions, where: str
) -> PretrainedConfig:
    try:
        config = read_config(model, options)
    except PaveError as fault:
        raise PaveError(f"{where}: {fault}") from fault
    names = config.architectures
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise PaveError(
            f"{where}: config.json of {model} must name one class under `architectures`, such "
            f"as LlamaForCausalLM; got {config.architectures}."
        )
    return config


def _check_adapter(entry: Input) -> None:
    path = Path(entry.model.lora.path)
    looks_local = str(path).startswith(("/", ".", "~"))
    if (looks_local or path.exists()) and not (path / "adapter_config.json").is_file():
        raise PaveError(
            f"{entry.where}: there is no adapter in {path} (no adapter_config.json); correct "
            "the path (what follows a `+` is read as an adapter)."
        )


def check_tokenizer(recipe: Recipe, options: LoaderOptions) -> Iterator[Finding]:
    """Whether mergekit can align the vocabularies, where the configuration asks for it.

    mergekit takes a fine-tune whose tokenizer does not load to have the base's.
    """
    config = recipe.config
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return
    where = "tokenizer" if config.tokenizer else "tokenizer_source"
    merged = [recipe.base, *sorted(config.referenced_models(), key=str)]
    named = [source] if isinstance(source, ModelReference) else []
    for part in dict.fromkeys(model.model for model in [*merged, *named]):
        try:
            load_tokenizer(part.path, _loading(part, options))
        except PaveError as fault:
            yield error(where, str(fault))
    for token, setting in ((config.tokenizer and config.tokenizer.tokens) or {}).items():
        of = setting.source
        of = of.model if isinstance(of, ModelTokenEmbedding) else of
        if isinstance(of, ModelReference) and of not in merged:
            yield error(
                f"tokenizer.tokens.{token}", f"{of} is none of the merged models, whose embedding "
                "the token could have; name one of them.")


def check_data(recipe: Recipe, options: LoaderOptions) -> Iterator[Finding]:
    """Whether every model's calibration data or store can be opened and fits."""
    for entry in recipe.inputs:
        if not entry.calibrated:
            continue
        try:
            if store := entry.get("covariance"):
                _check_owner(fetch_store(store, options, covariances=False), entry)
            elif entry.get("calibration_dataset"):
                yield from _check_rows(entry, options)
        except PaveError as fault:
            yield error(entry.where, str(fault))
        if entry.get("covariance") and entry.get("calibration_dataset"):
            yield Finding(
                "warning", entry.where, "covariance is used, the calibration keys are not."
            )


def _check_rows(entry: Input, options: LoaderOptions) -> Iterator[Finding]:
    spec = calibration_spec(entry)
    if spec.generated:
        refuse_unless_causal(read_config(entry.model, options), str(entry.model))
        return
    rows = open_rows(spec)
    tokenizer = tokenizer_of(entry.model, options)
    refuse_unusable(
        rows, tokenizer.path, read_config(entry.model, options), _loading(tokenizer, options))
    there = rows.count
    if there is not None and there < spec.num_samples:
        yield Finding(
            "warning", entry.where, f"{spec.dataset} has {there} of the {spec.num_samples} rows of "
            "num_calibration_samples; more give better covariances.", said_again=True
        )


def _loading(part: ModelPath, options: LoaderOptions) -> dict[str, Any]:
    return {"revision": part.revision or "main", "cache_dir": options.cache_dir,
            "trust_remote_code": options.trust_remote_code}


def _check_owner(store: CovarianceStore, entry: Input) -> None:
    """Refuse another model's store early; the merge itself looks at every weight."""
    folder = Path(entry.model.model.path)
    if entry.model.lora or not folder.is_dir():
        return
    tensors = ModelSource(str(folder), folder.name, str(folder)).tensors()
    known = ((n, t) for n, t in tensors if t.ndim == 2 and store.namesake(n, tuple(t.shape)))
    first = list(islice(known, _LOOK_AT))
    # Without a common name all values would have to be compared, which the merge does.
    if first:
        store.verify(iter(first), folder.name)


