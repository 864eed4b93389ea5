"""Opening all that a merge looks at, before its first tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_pave.calibration.stores import open_store
from mergekit_pave.methods.layers import MergeState
from mergekit_pave.models.names import name_of
from mergekit_pave.models.own_files import CONFIG, own_files
from mergekit_pave.models.source import (
    LoaderOptions,
    model_source,
    public_reference,
    read_config,
)
from mergekit_pave.models.tables import LayerTable, layer_table, unpurified
from mergekit_pave.recipe.inputs import Input, covariance_source, unwrapped
from mergekit_pave.recipe.parameters import CovarianceSource
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.masks import FOLDER, Recorder


def open_state(
    recipe: Recipe, out: Path, options: MergeOptions, loading: LoaderOptions
) -> MergeState:
    """The state of one merge: every covariance store opened or computed, every layer known.

    Args:
        recipe: what is merged.
        out: the folder that task masks go below.
        options: mergekit's, for the device of forward passes and whether to show progress.
        loading: how models are loaded.

    Raises:
        PaveError: a model without data, or statistics of other weights.
    """
    stores: dict[tuple[Hashable, CovarianceSource], CovarianceStore] = {}
    config, entries = recipe.config, recipe.inputs
    needed = [entry for entry in entries if entry.calibrated]
    device = torch.device(options.device or "cpu")
    silent = options.quiet or not needed
    for entry in (bar := tqdm(needed, desc="Covariances", unit="model", disable=silent)):
        bar.set_postfix_str(name_of(entry.model.model.path))
        source = covariance_source(entry)
        model = model_source(entry.model, loading)
        stores[entry.model, source] = open_store(model, source, loading, device)
    tables: dict[Hashable, LayerTable] = {}
    for entry in entries:
        if entry.found_by_name and entry.model not in tables:
            trust = loading.trust_remote_code
            settings = entry.model.config(trust_remote_code=trust)
            tables[entry.model] = layer_table(
                settings, trust, name_of(str(entry.model)),
                model_source(entry.model, loading, unmerged=True).path)
    return MergeState(
        stores, tables, _masks(config, entries, out, options), _reasons(config, loading))


def _reasons(config: MergeConfiguration, loading: LoaderOptions) -> dict[str, str]:
    if not config.base_model:
        return {}
    trust = loading.trust_remote_code
    folder = model_source(config.base_model, loading).path
    return unpurified(config.base_model.config(trust), trust, folder)


def writes_masks(entries: Sequence[Input]) -> bool:
    """Whether a merge of these inputs leaves task masks."""
    return bool(entries) and getattr(unwrapped(entries[0].method), "masks", False)


def _masks(
    config: MergeConfiguration, entries: Sequence[Input], out: Path, options: MergeOptions
) -> Recorder | None:
    if not writes_masks(entries):
        return None
    rearranges = config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings
    return Recorder(
        out / FOLDER,
        {entry.model: public_reference(entry.model).id for entry in entries},
        config.base_model,
        public_reference(config.base_model),
        config.dtype,
        bool(rearranges),
    )


def keep_own_files(
    masks: Recorder, entries: Sequence[Input], out: Path, loading: LoaderOptions
) -> None:
    """Keep each fine-tune's config, tokenizer and the like, once the merge is written to `out`.

    A merge without masks or config gives no fine-tune back, and keeps nothing.
    """
    if not masks.tensors or not (out / CONFIG).is_file():
        return
    for entry in {entry.model: entry for entry in entries}.values():
        base = read_config(entry.base, loading)
        source = model_source(entry.model, loading, unmerged=True)
        masks.keep(entry.model, own_files(source, base, out, masks.rearranges))
