"""From what the YAML names to local folders: models (with LoRA), and published stores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from mergekit.common import ModelPath, ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import PretrainedConfig

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import refuse_pointers
from mergekit_pave.models.layers import refuse_quantised
from mergekit_pave.models.merged_copies import NOT_THERE, merged_copy
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.storage.archive import Reference
from mergekit_pave.storage.identity import digest


@dataclass(frozen=True)
class LoaderOptions:
    """mergekit's own loading options: caches and whether remote code may run."""

    cache_dir: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, options: MergeOptions) -> LoaderOptions:
        """The loading options of a merge."""
        return cls(
            options.transformers_cache,
            options.lora_merge_cache,
            options.lora_merge_dtype,
            options.trust_remote_code,
        )


def paths_of(model: ModelReference) -> list[str]:
    """Paths or Hub ids of a model and, where it has one, of its adapter."""
    return [part.path for part in (model.model, model.lora) if part]


def public_reference(model: ModelReference) -> Reference:
    """The model's public name, and the whole reference where it can be loaded from the Hub."""
    paths = paths_of(model)
    hub = None if any(map(is_local, paths)) else str(model)
    return Reference("+".join(map(name_of, paths)), hub)


_ON_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[^@]+)?")


def on_hub(base: Reference) -> str | None:
    """Where a base can be loaded from; `None` for a local one.

    A manifest may come from a stranger, and leads to no other path of this machine.
    """
    parts = (base.hub or "").split("+")
    return base.hub if all(map(_ON_HUB.fullmatch, parts)) else None


def model_source(
    model: ModelReference, options: LoaderOptions, unmerged: bool = False
) -> ModelSource:
    """Download or find a model's weights, a LoRA merged into them as mergekit does it.

    Args:
        model: what the YAML names.
        options: where downloads and merged copies are kept.
        unmerged: without a place for merged copies, take the model without its adapter, whose
            tensors `models.adapted` gives.

    Raises:
        PaveError: an adapter without a place for the merged copy.
    """
    merged = model
    if model.lora and unmerged and not options.lora_merge_cache:
        merged = ModelReference(model=model.model)
    elif model.lora:
        merged = _merged(model, options)
    tokenizer = tokenizer_of(model, options)
    return ModelSource(
        path=merged.local_path(cache_dir=options.cache_dir),
        label=public_reference(model).id,
        tokenizer=tokenizer.path,
        revision=tokenizer.revision,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
    )


def _merged(model: ModelReference, options: LoaderOptions) -> ModelReference:
    if not options.lora_merge_cache:
        raise PaveError(
            f"{model} names an adapter: give mergekit a folder for the merged copy with "
            "--lora-merge-cache DIR."
        )
    own = ModelReference.merged
    own = getattr(own, "__wrapped__", own)  # mergekit's, mended or not

    def make(folder: str) -> ModelReference:
        return own(
            model,
            cache_dir=folder,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )

    return merged_copy(model, options.lora_merge_cache, options.lora_merge_dtype, make)


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
    except NOT_THERE:
        return False
    return True


def tokenizer_folder(source: ModelSource) -> Path | None:
    """Where the tokenizer of a model lies on this machine; `None` where it cannot be downloaded."""
    path = ModelPath(path=source.tokenizer, revision=source.revision)
    try:
        return Path(ModelReference(model=path).local_path(source.cache_dir))
    except NOT_THERE:
        return None


def culprit(source: ModelSource) -> str | None:
    """The sentence about a checkpoint that is broken itself."""
    for name, tensor in source.tensors():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return (
                f"{name} of {source.label} holds NaN or Inf; download or save that checkpoint "
                "again."
            )
    return None


INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
               "id2label", "label2id"}


@dataclass(frozen=True)
class ModelSource:
    """Where one model's weights and its tokenizer come from.

    Attributes:
        path: local folder with the weights (a LoRA is already merged into them).
        label: name for messages and manifests: a Hub id, or a folder's own name.
        tokenizer: folder or Hub id of its tokenizer or processor.
        revision: of the tokenizer, when it comes from the Hub.
        trust_remote_code: only what the user's own flag said.
    """

    path: str
    label: str
    tokenizer: str
    revision: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """How transformers finds the tokenizer or processor."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code,
                "cache_dir": self.cache_dir}

    def config(self) -> PretrainedConfig:
        return transformers.AutoConfig.from_pretrained(
            self.path, trust_remote_code=self.trust_remote_code
        )

    def identity(self) -> str:
        """sha256 of what a forward pass depends on: weights, the config's settings, and code."""
        settings = json.dumps(_settings(self.config().to_diff_dict()), sort_keys=True, default=str)
        # Format 2: format 1 kept the covariances of MODEL+ADAPTER under the name of MODEL.
        text = f"2|{digest(self.tensors())}|{settings}|{self._code()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _code(self) -> str:
        """sha256 of the folder's own Python files, where they may run."""
        files = sorted(Path(self.path).rglob("*.py")) if self.trust_remote_code else []
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every checkpoint tensor, shard by shard, without loading the model."""
        index = ShardedTensorIndex.from_disk(self.path)
        loader = LazyTensorLoader(index, lazy_unpickle=False)
        for shard in index.shards:
            for name in sorted(shard.contained_keys):
                yield name, loader.get_tensor(name)

    def stored_bytes(self) -> int:
        """Bytes of the weights' files."""
        return sum(file.stat().st_size for file in self._weights())

    def _weights(self) -> list[Path]:
        index = ShardedTensorIndex.from_disk(self.path)
        return [Path(self.path) / shard.filename for shard in index.shards]

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        """What changes when a file of the weights is written anew, without reading it."""
        seen = (file.stat() for file in (*self._weights(), Path(self.path) / "config.json"))
        # ctime is new for a copy; mtime may have been copied along.
        return tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in seen)

    def refuse_changed(self, stamp: tuple[tuple[int, ...], ...]) -> None:
        """Raise `PaveError` where the files are not those that had this `stamp`."""
        if self.stamp() != stamp:
            raise PaveError(
                f"The files of {self.label} were written anew while they were read: wait until "
                "they are complete, and run it again."
            )


def _settings(value: Any) -> Any:
    """A config, or one inside it, without what changes no number."""
    if not isinstance(value, dict):
        return value
    return {key: _settings(item) for key, item in value.items() if key not in INCIDENTAL}


def read_config(model: ModelReference, options: LoaderOptions) -> PretrainedConfig:
    """A model's config; raises `PaveError` when it is missing, unreadable or quantised."""
    path = model.model.path
    if path.lower().endswith(".gguf"):
        raise PaveError(f"{path} is a quantised GGUF file: name the full-precision checkpoint.")
    folder = Path(path)
    if path.startswith(("/", ".", "~")) and not folder.exists():
        more = model.lora is not None or model.model.revision is not None
        meant = " (what follows a `+` or `@` is read as an adapter or a revision)" if more else ""
        raise PaveError(f"There is no model folder {path}: correct the path{meant}.")
    if folder.exists() and not (folder / "config.json").is_file():
        raise PaveError(_no_config(folder))
    if folder.exists():
        refuse_pointers(folder)
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as fault:  # a class raises anything for a value that it does not take
        lines = str(fault).strip().splitlines() or [type(fault).__name__]
        # A validation's first line names the key, and its second what is wrong.
        reason = " ".join(" ".join(lines[: 1 + lines[0].endswith(":")]).split()).rstrip(".:")
        if "trust_remote_code" in str(fault):
            reason = "it needs Python code of its own repository"
            mend = "read that code, and add --trust-remote-code if you trust it"
        elif folder.exists():
            mend = "repair its config.json, or upgrade transformers for a new architecture"
        else:
            mend = "check the name, the network and, for a gated model, `hf auth login`"
        raise PaveError(f"Cannot read the config of {path} ({reason}): {mend}.") from fault
    refuse_quantised(config, path)
    return config


def _no_config(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file: name the folder of a Hugging Face checkpoint."
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter: name it behind its model, as `MODEL+{folder}`."
    if any(folder.glob("*.gguf")):
        return f"{folder} holds a quantised GGUF file: name the full-precision checkpoint."
    return f"The folder {folder} has no config.json: name the folder of a whole checkpoint."
