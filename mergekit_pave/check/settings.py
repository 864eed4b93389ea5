"""Settings outside of the weights that differ between the base and the fine-tunes.

A merge has the base's config and tokenizer: rope and activation, end token and chat template. A
fine-tune that was trained with other settings does not work the same with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod
from transformers import PretrainedConfig
from transformers.utils import cached_file

from mergekit_pave.check.finding import Finding
from mergekit_pave.models.layers import class_name
from mergekit_pave.models.source import INCIDENTAL, LoaderOptions, read_config, tokenizer_of
from mergekit_pave.recipe.inputs import unwrapped
from mergekit_pave.recipe.recipe import Recipe

# Settings that change no output of a trained model, are refused elsewhere (shapes), or are
# compared below.
_NO_MATTER = {
    *INCIDENTAL, "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "initializer_factor", "initializer_range", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id", "cls_token_id",
    "task_specific_params", "tokenizer_class", "vocab_size"}
_MISSING = object()
# Keys of generation_config.json that name who wrote it.
_ABOUT_FILE = {"_from_model_config", "transformers_version"}


def check_settings(recipe: Recipe, options: LoaderOptions) -> Iterator[Finding]:
    """Warnings about settings and habits of the fine-tunes that the merge will not have."""
    config, entries = recipe.config, {entry.model: entry for entry in recipe.inputs}
    for model, entry in entries.items():
        keeps_own = _keeps_own(entry.method)
        own, base = (read_config(m, options) for m in (model, entry.base))
        settings = list(_differing(own, base, labels=not keeps_own))
        if settings:
            fate = "only this task's model keeps them" if keeps_own else "the merge has the base's"
            yield Finding(
                "warning", entry.where, f"{model} was trained with other settings than the base: "
                f"{'; '.join(settings)}; {fate}."
            )
        if keeps_own and not (config.tokenizer or config.tokenizer_source):
            continue
        donor = _donor(recipe)
        if model != donor and (habits := list(_habits(model, donor, config, options))):
            yield Finding(
                "warning", entry.where, f"{model} has beside its weights what the merge does not "
                f"get from {donor}: {'; '.join(habits)}; set `tokenizer: {{source: ...}}` or "
                "`chat_template`, or copy the files of the one that is meant into the output."
            )


def _keeps_own(method: MergeMethod) -> bool:
    return getattr(unwrapped(method), "masks", False)


def _differing(
    own: PretrainedConfig, base: PretrainedConfig, labels: bool
) -> Iterator[str]:
    """`rope_parameters.rope_theta 1000000.0, the base 10000.0` for each setting."""
    ours, theirs = own.to_dict(), base.to_dict()
    known = _known(base)
    for name in sorted(ours.keys() | theirs.keys()):
        if name in known or not known:
            yield from _differences(ours.get(name, _MISSING), theirs.get(name, _MISSING), name)
    if labels and own.num_labels == base.num_labels and _is_classifier(own):
        if own.id2label != base.id2label:
            yield f"id2label {_short(own.id2label)}, the base {_short(base.id2label)}"


def _known(config: PretrainedConfig) -> set[str]:
    """Settings that the class of a config reads; trainers leave others there."""
    try:
        return set(type(config)().to_dict())
    except Exception:  # remote code with arguments of its own
        return set()


def _is_classifier(config: PretrainedConfig) -> bool:
    return "Classification" in class_name(config)


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[str]:
    if name.rpartition(".")[2] in _NO_MATTER or "drop" in name:
        return
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(ours.keys() | theirs.keys(), key=str):
            pair = (ours.get(key, _MISSING), theirs.get(key, _MISSING))
            yield from _differences(*pair, f"{name}.{key}")
    elif ours != theirs:
        yield f"{name} {_short(ours)}, the base {_short(theirs)}"


def _short(value: Any) -> str:
    text = "none" if value is _MISSING else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _donor(recipe: Recipe) -> ModelReference:
    """Whose tokenizer and companions mergekit takes for the output."""
    config = recipe.config
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if isinstance(source, ModelReference):
        return source
    return recipe.base


def _habits(
    model: ModelReference, donor: ModelReference, config: MergeConfiguration,
    options: LoaderOptions,
) -> Iterator[str]:
    """How a model ends, samples, and is addressed, where the merge differs."""
    own, other = (tokenizer_of(m, options) for m in (model, donor))
    end, there = (_end_token(part, options) for part in (own, other))
    if None not in (end, there) and end != there:
        yield f"eos_token {end!r}, there {there!r}"
    template, there = (_template(part, options) for part in (own, other))
    if not config.chat_template and template and template != there:
        yield f"a chat template, there {'another' if there else 'none'}"
    ours, theirs = (_generation(m, options) for m in (model, donor))
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if keys and not (config.tokenizer or config.tokenizer_source):
        yield "generation settings " + ", ".join(
            f"{key} {_short(ours.get(key, _MISSING))}, there {_short(theirs.get(key, _MISSING))}"
            for key in keys)


def _end_token(part: ModelPath, options: LoaderOptions) -> str | None:
    token = _json(part, "tokenizer_config.json", options).get("eos_token")
    return token.get("content") if isinstance(token, Mapping) else token


def _template(part: ModelPath, options: LoaderOptions) -> str | None:
    if text := _read(part, "chat_template.jinja", options):
        return text.strip()
    template = _json(part, "tokenizer_config.json", options).get("chat_template")
    return template.strip() if isinstance(template, str) else template and json.dumps(template)


def _generation(model: ModelReference, options: LoaderOptions) -> dict[str, Any]:
    settings = _json(model.model, "generation_config.json", options)
    return {key: value for key, value in settings.items() if key not in _ABOUT_FILE}


def _json(part: ModelPath, name: str, options: LoaderOptions) -> dict[str, Any]:
    try:
        values = json.loads(_read(part, name, options) or "{}")
    except ValueError:  # whoever needs the damaged file will say so
        return {}
    return values if isinstance(values, dict) else {}


def _read(part: ModelPath, name: str, options: LoaderOptions) -> str | None:
    """A small file of a model; `None` where it is missing or cannot be downloaded."""
    try:
        if os.path.isdir(part.path):
            return (Path(part.path) / name).read_text("utf-8")
        path = cached_file(
            part.path, name, revision=part.revision, cache_dir=options.cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False)
        return Path(path).read_text("utf-8") if path else None
    except (OSError, ValueError):
        return None
