"""From a compressed fine-tune (`compress`) and its base to an ordinary model folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from mergekit.io import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions
from mergekit_pave.models.source import LoaderOptions, model_source, on_hub, read_config
from mergekit_pave.recipe.reading import model_reference
from mergekit_pave.storage.archive import inside
from mergekit_pave.storage.files import appearing, refuse_used
from mergekit_pave.storage.identity import checksum
from mergekit_pave.storage.low_rank import KIND, MODEL, Compressed


def tensors(task: Compressed, base: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the fine-tune, one at a time, on the base in the folder `base`."""
    loader = LazyTensorLoader.from_disk(str(base), lazy_unpickle=False)
    for name, kept in task.tensors.items():
        there = None
        if kept.base is not None:
            known = name in loader.index.tensor_paths
            there = loader.get_tensor(name) if known else None
            if there is None or checksum(there) != kept.base:
                raise PaveError(
                    f"{base} is not the base that {task.folder} was compressed against, "
                    f"{task.base.id} (first difference: {name}); name that one with --base."
                )
        yield name, task.tensor(name, there)


@torch.no_grad()
def reconstruct(
    task: Path | str, out: Path | str, *, base: str | None = None,
    options: LoaderOptions | None = None,
) -> None:
    """Write a compressed fine-tune as a model folder; it appears when it is complete.

    Args:
        task: its folder.
        out: a new or empty folder.
        base: the base model; found by itself where it is on the Hub.
        options: caches, and whether remote code may run.

    Raises:
        PaveError: no compressed model, another base, or a folder in use.
    """
    options, out = options or LoaderOptions(), Path(out)
    refuse_used(out)
    compressed = Compressed(Path(task))
    with KIND.guard(compressed.folder):
        beside = [inside(compressed.folder, f"{MODEL}/{name}")
                  for name in companions(compressed.folder / MODEL)]
    name = base or on_hub(compressed.base)
    if name is None:
        raise PaveError(
            f"{task} was compressed against the local base {compressed.base.id}: name its "
            "folder with --base."
        )
    reference = model_reference(name)
    read_config(reference, options)
    origin = Path(model_source(reference, options).path)
    with appearing(out) as folder:
        writer = TensorWriter(str(folder))
        progress = tqdm(tensors(compressed, origin), "Reconstructing", len(compressed.tensors),
                        unit="tensor", leave=False)
        for key, tensor in progress:
            writer.save_tensor(key, tensor)
        writer.finalize()
        for file in beside:
            shutil.copyfile(file, folder / file.name)
