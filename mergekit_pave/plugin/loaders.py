"""mergekit's open model files: each merge opens them anew, and reads adapters without a copy."""

from __future__ import annotations

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_pave.models.adapted import adapted_loader
from mergekit_pave.models.source import LoaderOptions


def close_earlier(config: MergeConfiguration) -> None:
    """Close the files of these models that an earlier merge of this process has opened.

    mergekit keeps loaders by the models' names as long as the process lives: a fine-tune that was
    trained further and saved into its folder would be merged as it was before.
    """
    loaders = LoaderCache.loaders
    for model in {config.base_model, *config.referenced_models()}:
        loaders.pop(model, None)


def open_adapted(config: MergeConfiguration, options: MergeOptions) -> None:
    """Let mergekit read every `MODEL+ADAPTER` without a merged copy, if it has no place for one.

    Raises:
        PaveError: an adapter that only peft can apply, or one of another model.
    """
    if options.lora_merge_cache:
        return
    for model in config.referenced_models():
        if model.lora:
            LoaderCache.loaders[model] = adapted_loader(
                model, LoaderOptions.of(options), config.dtype, options.lazy_unpickle)
