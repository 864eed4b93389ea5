"""From a compressed fine-tune (`compress`) and its base to an ordinary model folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from mergekit.io import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.check.inputs import model_reference
from mergekit_pave.check.models import read_config
from mergekit_pave.compressed import MODEL, Compressed
from mergekit_pave.errors import PaveError
from mergekit_pave.fingerprint import checksum
from mergekit_pave.locate import LoaderOptions, model_source
from mergekit_pave.model_folder import appearing, companions, refuse_used


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
                    f"{task.base['id']} (first difference: {name}); name that one with --base."
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
    name = base or compressed.base["hub"]
    if name is None:
        raise PaveError(
            f"{task} was compressed against the local base {compressed.base['id']}: name its "
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
        for name, file in companions(compressed.folder / MODEL).items():
            shutil.copyfile(file, folder / name)


@click.command("reconstruct")
@click.argument("compressed", metavar="OUT/TASK",
                type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="The base model, needed where it is not on the Hub.")
@click.option("--lora-merge-cache", help="Folder for the merged copy of a base with an adapter.")
@click.option("--transformers-cache", help="Folder for downloads.")
@click.option("--trust-remote-code", is_flag=True, help="Let the base's repository run code.")
def reconstruct_command(compressed, folder, base, lora_merge_cache, transformers_cache,
                        trust_remote_code) -> None:
    """Write the model folder DIR from a compressed fine-tune and its base.

    OUT/TASK is a task's folder in what `compress` wrote. The base has to be the very one it was
    compressed against, which is checked by its values.

    \b
    Examples:
        mergekit-pave reconstruct compressed/math-expert ./math
        mergekit-pave reconstruct compressed/math-expert ./math --base ./base
    """
    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    reconstruct(compressed, folder, base=base, options=options)
    click.echo(f"{folder}: reconstructed from {compressed}.")
