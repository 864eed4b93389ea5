"""The task models of an EMR merge: loaded with transformers, or written as ordinary folders.

A task's weight is computed from the merged one, the base's and one bit per entry (`algebra.emr`),
one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from mergekit_pave.algebra.choices import RESCALERS
from mergekit_pave.algebra.emr import Sums, scale, task_weight
from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions, is_companion
from mergekit_pave.models.headers import check_finished
from mergekit_pave.models.layers import BUILDING, empty_model
from mergekit_pave.models.loaded import refuse_random
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.models.source import LoaderOptions, model_source, on_hub, read_config
from mergekit_pave.recipe.reading import CONFIGURATION, configuration, model_reference, read_yaml
from mergekit_pave.storage.archive import inside
from mergekit_pave.storage.files import appearing, refuse_used
from mergekit_pave.storage.masks import KIND, Masked, TaskMasks, identity


def load_task_model(
    merged: Path | str,
    task: str | int,
    *,
    base: str | None = None,
    rescaler: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    lora_merge_cache: str | None = None,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """The model of one task of an EMR merge.

    Args:
        merged: folder or Hub id of the merged model.
        task: the fine-tune's public name (a Hub id or the last part of a path), or its index.
        base: the base model, `MODEL[@REVISION]`; found by itself where it is on the Hub, or where
            the merge's own `mergekit_config.yml` leads to it.
        rescaler: `tensor_mean` or `global` instead of what the merge was made with.
        trust_remote_code: let the repositories of merge and base run code.
        cache_dir: folder for downloads.
        lora_merge_cache: folder for the merged copy of a base with an adapter.
        kwargs: for `from_pretrained`; with `output_loading_info` the result is a pair, as there.

    Raises:
        PaveError: no masks, no such task, another base, or damaged files.
    """
    options = LoaderOptions(cache_dir, lora_merge_cache, None, trust_remote_code)
    folder = _folder(merged, options)
    config, generation = _own_settings(folder, task, trust_remote_code)
    config = kwargs.pop("config", None) or config
    state = dict(task_tensors(folder, task, base=base, rescaler=rescaler, options=options))
    # An `AutoModel` would look for a repository with the model's code; here is only a state.
    concrete: Any = type(empty_model(config, trust_remote_code))
    wants_info = kwargs.pop("output_loading_info", False)
    with BUILDING:
        model, info = concrete.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **kwargs)
    refuse_random(model, info, f"task {task} of {name_of(str(merged))}")
    if generation:
        model.generation_config = generation
    found: Any = (model, info) if wants_info else model
    return found


def _own_settings(
    folder: Path, task: str | int, trust_remote_code: bool
) -> tuple[transformers.PretrainedConfig, transformers.GenerationConfig | None]:
    """Config and generation config of one task's model."""
    with TemporaryDirectory() as temporary:
        beside = Path(temporary)
        _write_companions(folder, task, beside)
        generation = None
        try:
            config = transformers.AutoConfig.from_pretrained(
                beside, trust_remote_code=trust_remote_code)
            if (beside / "generation_config.json").exists():
                generation = transformers.GenerationConfig.from_pretrained(beside)
        except Exception as error:  # a value that a class does not take may raise anything
            raise PaveError(
                f"The settings of task {task} of {folder} cannot be read "
                f"({' '.join(str(error).split())[:300]}): merge again."
            ) from error
        # transformers looks for a repository's code at the path that the config names.
        config._name_or_path = str(folder)
        return config, generation


def _write_companions(folder: Path, task: str | int, out: Path) -> None:
    """Config, tokenizer and their like of one task's model: its own, or the merged model's."""
    masks = TaskMasks(folder)
    there = companions(folder)
    for name, content in masks.companions(masks.task(task)).items():
        if not is_companion(name) or (content is None and name not in there):
            raise PaveError(f"{folder} has no {name}, which a task's model needs; merge again.")
        with KIND.guard(Path(folder)):
            inside(folder, name)
        (out / name).write_bytes(there[name].read_bytes() if content is None else content)


def task_tensors(
    merged: Path | str,
    task: str | int,
    *,
    base: str | None = None,
    rescaler: str | None = None,
    options: LoaderOptions | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint tensors of one task, in the merged model's dtype, shard by shard.

    A tensor in which only other tasks took part is the base's; one without masks is the merged
    model's. Arguments and errors as in `load_task_model`.
    """
    options = options or LoaderOptions()
    folder = _folder(merged, options)
    masks = TaskMasks(folder)
    index = masks.task(task)
    check_finished(folder)
    shards = ShardedTensorIndex.from_disk(str(folder))
    missing = masks.tensors.keys() - shards.tensor_paths.keys()
    if missing:
        raise PaveError(
            f"{folder} has masks for {min(missing)} and no such weight; merge again."
        )
    found = _Base(_base_folder(folder, masks, base, options), masks)
    factor = _factor(masks, index, rescaler)
    loader = LazyTensorLoader(shards, lazy_unpickle=False)
    for shard in shards.shards:
        for name in sorted(shard.contained_keys):
            tensor = loader.get_tensor(name)
            if name in masks.tensors:
                if masks.tensors[name].shape != tensor.shape:
                    raise PaveError(
                        f"{name} of {folder} has another shape than its task masks; merge again."
                    )
                mask, origin = masks.mask(name, index), found.tensor(name)
                own = origin if mask is None else task_weight(origin, tensor, mask, factor)
                tensor = own.to(tensor.dtype)
            yield name, tensor


def materialize(
    merged: Path | str,
    task: str | int,
    out: Path | str,
    *,
    base: str | None = None,
    rescaler: str | None = None,
    options: LoaderOptions | None = None,
) -> None:
    """Write one task's model as a folder of its own; it appears when it is complete.

    Config and tokenizer are the task's own. Arguments and errors as in `load_task_model`.
    """
    options = options or LoaderOptions()
    refuse_used(Path(out))
    folder = _folder(merged, options)
    with appearing(Path(out)) as temporary:
        writer = TensorWriter(str(temporary))
        tensors = task_tensors(folder, task, base=base, rescaler=rescaler, options=options)
        for name, tensor in tensors:
            writer.save_tensor(name, tensor)
        writer.finalize()
        _write_companions(folder, task, temporary)


def _factor(masks: TaskMasks, task: int, rescaler: str | None) -> float:
    rescaler = rescaler or masks.rescaler
    if rescaler not in RESCALERS:
        raise PaveError(f"rescaler must be one of {', '.join(RESCALERS)}; got {rescaler!r}.")
    rows = [(t, t.tasks.index(task)) for t in masks.tensors.values() if task in t.tasks]
    return scale((Sums(t.own[i], t.unified[i], t.count) for t, i in rows), rescaler)


def _folder(merged: Path | str, options: LoaderOptions) -> Path:
    """The merged model's folder, downloaded if it is on the Hub."""
    if os.path.isdir(merged):
        return Path(merged)
    if is_local(str(merged)):
        raise PaveError(f"There is no model folder {merged}.")
    repo, _, revision = str(merged).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, cache_dir=options.cache_dir))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise PaveError(
            f"{str(merged)!r} is neither a local folder nor a model on the Hub that can be "
            f"reached ({type(error).__name__})."
        ) from error


def _base_folder(
    merged: Path, masks: TaskMasks, given: str | None, options: LoaderOptions
) -> Path:
    name = given or on_hub(masks.base)
    # Masks name no local path, for they may be published; mergekit's own file does.
    reference = model_reference(name) if name else _configured_base(merged)
    if reference is None:
        raise PaveError(
            f"{merged} was merged from the local base {masks.base.id}, which is not found here: "
            "name its folder with --base."
        )
    read_config(reference, options)
    return Path(model_source(reference, options).path)


def _configured_base(merged: Path) -> ModelReference | None:
    """The base in the configuration beside the model, where it still is a folder."""
    try:
        base = configuration(read_yaml((merged / CONFIGURATION).read_text("utf-8"))).base_model
    except (OSError, ValueError, PaveError):
        return None
    return base if base and os.path.isdir(base.model.path) else None


class _Base:
    """The base's tensors as they were merged, whatever its checkpoint calls them."""

    def __init__(self, folder: Path, masks: TaskMasks):
        self._folder = folder
        self._masks = masks
        self._loader = LazyTensorLoader.from_disk(str(folder), lazy_unpickle=False)

    def tensor(self, name: str) -> Tensor:
        """The base's values of a masked tensor.

        Slices rename layers, and checkpoints differ in prefixes and layout: the name is tried
        first, and values decide.
        """
        wanted = self._masks.tensors[name]
        if wanted.keeps_base:
            return self._masks.kept_base(name)
        for candidate in self._candidates(name, wanted):
            for tensor in self._casts(candidate, wanted):
                if identity(tensor) == wanted.base:
                    return tensor
        raise PaveError(
            f"{self._folder} is not the base of this merge, {self._masks.base.id} (first "
            f"difference: {name}); name that one with --base."
        )

    def _candidates(self, name: str, wanted: Masked) -> Iterator[Tensor]:
        paths = self._loader.index.tensor_paths
        if name in paths:
            yield self._loader.get_tensor(name)
        if wanted.base in self._names:
            yield self._loader.get_tensor(self._names[wanted.base])
        sources = {key: partial(self._loader.get_tensor, key) for key in paths}
        config, _ = transformers.PretrainedConfig.get_config_dict(self._folder)
        converted = convert_checkpoint_tensors(config.get("model_type"), sources, name)
        if converted is not None:
            yield converted

    def _casts(self, tensor: Tensor, wanted: Masked) -> Iterator[Tensor]:
        """As mergekit cast it; a purified one has been widened again after that."""
        merged = dtype_from_name(wanted.dtype)
        yield tensor.to(merged)
        if self._masks.dtype:
            yield tensor.to(dtype_from_name(self._masks.dtype)).to(merged)

    @cached_property
    def _names(self) -> dict[str, str]:
        dtype = dtype_from_name(self._masks.dtype)
        names = {}
        for shard in self._loader.index.shards:
            for key in shard.contained_keys:
                tensor = self._loader.get_tensor(key)
                names[identity(tensor.to(dtype or tensor.dtype))] = key
        return names
