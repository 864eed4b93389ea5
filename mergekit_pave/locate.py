"""From what the YAML names to local folders: models (with LoRA), and published stores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_pave.calibration.model import ModelSource
from mergekit_pave.errors import PaveError
from mergekit_pave.public import name_of
from mergekit_pave.store import FINGERPRINTS, MANIFEST, CovarianceStore

# On the Hub, or in its cache while that cannot be reached.
_NOT_THERE = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)


@dataclass(frozen=True)
class LoaderOptions:
    """mergekit's own loading options: caches and whether remote code may run."""

    cache_dir: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of_this_thread(cls) -> LoaderOptions:
        loaders = LoaderCache()
        return cls(
            loaders.hf_cache_dir,
            loaders.lora_cache_dir,
            loaders.lora_merge_dtype,
            loaders.trust_remote_code,
        )


def model_source(model: ModelReference, options: LoaderOptions) -> ModelSource:
    """Download or find a model's weights, a LoRA merged into them as mergekit does it.

    Raises:
        PaveError: an adapter without a place for the merged copy.
    """
    if model.lora and not options.lora_merge_cache:
        raise PaveError(
            f"{model} names an adapter: give mergekit a folder for the merged copy with "
            "--lora-merge-cache DIR."
        )
    merged = model.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    label = name_of(model.model.path)
    if model.lora:
        label += "+" + name_of(model.lora.path)
    tokenizer = tokenizer_of(model, options)
    return ModelSource(
        path=merged.local_path(cache_dir=options.cache_dir),
        label=label,
        tokenizer=tokenizer.path,
        revision=tokenizer.revision,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
    )


def tokenizer_of(model: ModelReference, options: LoaderOptions) -> ModelPath:
    """An adapter's own tokenizer when it ships one, else the model's."""
    return model.lora if model.lora and _has_tokenizer(model.lora, options) else model.model


def _has_tokenizer(adapter: ModelPath, options: LoaderOptions) -> bool:
    name = "tokenizer_config.json"
    if Path(adapter.path).exists():
        return (Path(adapter.path) / name).exists()
    try:
        hf_hub_download(
            adapter.path, name, revision=adapter.revision, cache_dir=options.cache_dir)
    except _NOT_THERE:
        return False
    return True


def tokenizer_folder(source: ModelSource) -> Path | None:
    """Where the tokenizer of a model lies on this machine; `None` where it cannot be had."""
    path = ModelPath(path=source.tokenizer, revision=source.revision)
    try:
        return Path(ModelReference(model=path).local_path(source.cache_dir))
    except _NOT_THERE:
        return None


def fetch_store(
    where: str, options: LoaderOptions, covariances: bool = True
) -> CovarianceStore:
    """Open the store at a local folder, or download it from the Hub (data set or model).

    Args:
        where: folder or Hub id, perhaps `ID@REVISION`.
        options: the Hub's cache.
        covariances: False to download only what tells whose they are.

    Raises:
        PaveError: there is no complete store.
    """
    if os.path.exists(where) or where.startswith((".", "/", "~")):
        return CovarianceStore(Path(os.path.expanduser(where)))
    repo, _, revision = where.partition("@")
    error: Exception | None = None
    for repo_type in ("dataset", "model"):
        try:
            folder = snapshot_download(
                repo,
                repo_type=repo_type,
                revision=revision or None,
                cache_dir=options.cache_dir,
                allow_patterns=[MANIFEST, "*.safetensors" if covariances else FINGERPRINTS],
            )
            return CovarianceStore(folder, complete=covariances)
        except _NOT_THERE as failure:
            error = failure
    raise PaveError(
        f"covariance: {where!r} is neither a local folder nor a covariance store on the Hub "
        f"that can be reached ({type(error).__name__})."
    ) from error
