"""TSV-Compress (arXiv 2412.00081, section 4.1): fine-tunes as low-rank differences from their base.

Each becomes a folder of its own (`compressed`). Tensors are read one at a time from the shards;
only the adapter, which has to be one file, is held in memory. A task's folder appears by rename
when it is complete.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.calibration.model import ModelSource, empty_model
from mergekit_pave.check.inputs import configuration
from mergekit_pave.check.keys import read_yaml
from mergekit_pave.check.models import read_config
from mergekit_pave.compressed import DTYPES, FORMAT, KIND, LORA, MODEL, Kept, pack
from mergekit_pave.disk import to_disk
from mergekit_pave.errors import PaveError
from mergekit_pave.fingerprint import digest
from mergekit_pave.locate import LoaderOptions, model_source
from mergekit_pave.merging.tsv import RANK_FRACTION, kept_rank
from mergekit_pave.model_folder import appearing, copy_companions
from mergekit_pave.public import is_local, name_of
from mergekit_pave.store import MANIFEST, write_atomically

# Bytes held in memory before they are written.
WINDOW = 2**30


# --- one task ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What `compress` was told; `dtype` None keeps the fine-tune's own."""

    tasks: int
    rank_fraction: float | None = None
    dtype: str | None = None
    lora: bool = False


@dataclass(frozen=True)
class Summary:
    """What compression did to one task.

    Attributes:
        task: name of its folder.
        stored: bytes of its safetensors files, without the adapter.
        model: bytes of the fine-tune's tensors.
        share: numbers kept of those in the matrices that became factors.
        energy: `sum s_i^2` kept, of all those matrices together.
        worst: the matrix that keeps the least of it, and how much; None without one.
        ways: number of tensors kept in each way.
        adapter: weights in the LoRA adapter, None without one.
        left_out: changed tensors that are not in it.
    """

    task: str
    stored: int
    model: int
    share: float
    energy: float
    worst: tuple[str, float] | None
    ways: dict[str, int]
    adapter: int | None
    left_out: int

    def __str__(self) -> str:
        text = (
            f"{self.task}: {self.stored:,} bytes, {self.stored / max(self.model, 1):.1%} of the "
            f"model's {self.model:,}; "
        )
        if self.worst:
            text += (
                f"{self.ways['factors']} matrices as factors, {self.share:.1%} of their numbers "
                f"with {self.energy:.1%} of the energy of their change (least: "
                f"{self.worst[1]:.1%} of {self.worst[0]}); "
            )
        text += f"{self.ways['whole']} tensors whole, {self.ways['rows']} by their changed rows, "
        text += f"{self.ways['base']} as in the base."
        if self.adapter is not None:
            text += (
                f" The LoRA adapter has {self.adapter} linear weights; {self.left_out} changed "
                "tensors are not in it (norms, biases, embeddings, what is kept whole)."
            )
        return text


class _Writer:
    """Fills a task's folder, a file at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Kept] = {}
        self.bytes = 0
        self._held: dict[str, Tensor] = {}
        self._files = 0

    def add(self, name: str, stored: Mapping[str, Tensor], kept: Mapping[str, Any]) -> None:
        file = f"tensors-{self._files:05d}.safetensors" if stored else None
        self.tensors[name] = Kept(file=file, **kept)
        self._held |= {name + suffix: tensor for suffix, tensor in stored.items()}
        if sum(tensor.nbytes for tensor in self._held.values()) >= WINDOW:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        path = self.folder / f"tensors-{self._files:05d}.safetensors"
        write_atomically(path, lambda temporary: save_file(self._held, temporary))
        self.bytes += path.stat().st_size
        self._files += 1
        self._held = {}


def _compress_task(
    tuned: ModelSource, base: ModelSource, folder: Path, header: Mapping[str, Any],
    settings: Settings, device: torch.device,
) -> None:
    """Fill `folder`, the manifest last."""
    writer, adapter = _Writer(folder), {}
    linear = _linear_weights(tuned) if settings.lora else set()
    origin = ShardedTensorIndex.from_disk(base.path)
    loader, size = LazyTensorLoader(origin, lazy_unpickle=False), 0
    total = len(ShardedTensorIndex.from_disk(tuned.path).tensor_paths)
    for name, tensor in tqdm(tuned.tensors(), header["task"], total, unit="tensor", leave=False):
        there = loader.get_tensor(name) if name in origin.tensor_paths else None
        if there is not None and there.shape != tensor.shape:
            raise PaveError(
                f"{name} of {tuned.label} is {tuple(tensor.shape)} and {tuple(there.shape)} in the "
                f"base {base.label}: compress needs fine-tunes of that base, of the same size."
            )
        size += tensor.nbytes
        rank = kept_rank(tensor.shape, settings.tasks, settings.rank_fraction) if (
            tensor.ndim == 2) else 0
        dtype = dtype_from_name(settings.dtype) or tensor.dtype
        try:
            here = None if there is None else there.to(device)
            how, stored, energy = pack(tensor.to(device), here, rank, dtype)
        except ValueError as error:
            raise PaveError(
                f"{name} of {tuned.label} or of its base {error}; download or save that "
                "checkpoint again."
            ) from error
        # Copies: tensors of a pickled checkpoint may share their memory.
        stored = {key: value.to("cpu", copy=True).contiguous() for key, value in stored.items()}
        writer.add(name, stored, {
            "how": how, "shape": tuple(tensor.shape), "dtype": _name(tensor.dtype),
            "base": None if how == "whole" else digest([(name, there)]), "energy": energy,
            "rank": len(stored["::s"]) if how == "factors" else None,
        })
        if how == "factors" and name in linear:
            adapter[name.removesuffix(".weight")] = stored
    writer.flush()
    if all(kept.how == "whole" for kept in writer.tensors.values()):
        raise PaveError(
            f"{tuned.label} shares no tensor with the base {base.label}: name the model that it "
            "was fine-tuned from."
        )
    files = copy_companions(Path(tuned.path), Path(base.path), folder / MODEL)
    if settings.lora:
        _write_adapter(folder / LORA, adapter, tuned.label, header["base"])
    summary = _summary(header["task"], writer, size, len(adapter) if settings.lora else None)
    manifest = {
        "kind": KIND, "format": FORMAT, "version": version("mergekit-pave"), **header,
        "summary": asdict(summary), "files": files,
        "tensors": {name: asdict(kept) for name, kept in writer.tensors.items()},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(task: str, writer: _Writer, size: int, adapter: int | None) -> Summary:
    ways = Counter(kept.how for kept in writer.tensors.values())
    parts = {n: kept for n, kept in writer.tensors.items() if kept.how == "factors"}
    shares = {n: kept.energy[0] / kept.energy[1] for n, kept in parts.items()}
    worst = min(shares, key=shares.get) if shares else None
    numbers = sum(prod(kept.shape) for kept in parts.values())
    left, total = (sum(kept.energy[i] for kept in parts.values()) for i in range(2))
    return Summary(
        task=task, stored=writer.bytes, model=size,
        share=sum(k.rank * (sum(k.shape) + 1) for k in parts.values()) / max(numbers, 1),
        energy=left / total if parts else 1.0,
        worst=(worst, shares[worst]) if worst else None,
        ways={way: ways[way] for way in ("base", "rows", "factors", "whole")},
        adapter=adapter,
        left_out=len(writer.tensors) - ways["base"] - (adapter or 0),
    )


def _linear_weights(model: ModelSource) -> set[str]:
    """Checkpoint names of the weights of `nn.Linear` modules."""
    modules = empty_model(model.config(), model.trust_remote_code).named_modules()
    return {f"{name}.weight" for name, m in modules if isinstance(m, torch.nn.Linear)}


def _write_adapter(
    folder: Path, parts: Mapping[str, Mapping[str, Tensor]], model: str, base: Mapping[str, Any]
) -> None:
    """`W + B A` with `A = sqrt(S) V^T` and `B = U sqrt(S)`, at scale 1 whatever the rank."""
    from peft import LoraConfig

    if not parts:
        raise PaveError(
            f"{model} has no changed nn.Linear weight that is kept as factors, so there is no LoRA "
            "adapter to write: leave --lora out."
        )
    ranks = {name: len(part["::s"]) for name, part in parts.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    special = {name: rank for name, rank in ranks.items() if rank != common}
    tensors = {}
    for name, part in parts.items():
        root = part["::s"].sqrt()
        a, b = part["::v"].float() * root, part["::u"].float() * root
        key, dtype = f"base_model.model.{name}", part["::u"].dtype
        tensors[f"{key}.lora_A.weight"] = a.mT.to(dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = b.to(dtype).contiguous()
    folder.mkdir()
    write_atomically(
        folder / "adapter_model.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    LoraConfig(
        r=common, lora_alpha=common, target_modules=sorted(ranks), rank_pattern=special,
        alpha_pattern=special, base_model_name_or_path=base["hub"] or base["id"],
        inference_mode=True,
    ).save_pretrained(folder)
    to_disk(folder / "adapter_config.json")


# --- all of them ---------------------------------------------------------------------------


@torch.no_grad()
def compress(
    raw: Any, out: Path | str, *, rank_fraction: float | None = None, dtype: str | None = None,
    lora: bool = False, device: torch.device | None = None, options: LoaderOptions | None = None,
) -> list[Summary]:
    """Write every fine-tune of a merge configuration to a folder of its own in `out`.

    Tasks that an interrupted run with the same arguments has finished are left as they are.

    Args:
        raw: the parsed YAML; only `base_model` and `models` are looked at.
        out: a new or empty folder, or that of the interrupted run.
        rank_fraction: of each matrix's rank; one over the number of fine-tunes without it.
        dtype: of the singular vectors; each matrix's own without it.
        lora: write an adapter of the linear weights, too.
        device: where to decompose.
        options: caches, and whether remote code may run.

    Raises:
        PaveError: a bad configuration, models that do not fit, or a folder in use.
    """
    options, out = options or LoaderOptions(), Path(out)
    rank_fraction = RANK_FRACTION.validate(rank_fraction)
    base, models = _models(raw)
    for model in (base, *models):
        read_config(model, options)
    settings = Settings(len(models), rank_fraction, dtype, lora)
    names = _folders(models)
    _check_output(out, names)
    source = model_source(base, options)
    base_weights = digest(source.tensors())
    summaries = []
    for model, name in zip(models, names, strict=True):
        tuned = model_source(model, options)
        header = {
            "task": name, "model": tuned.label, "base": _reference(base, source.label),
            **asdict(settings), "weights": digest(tuned.tensors()), "base_weights": base_weights,
        }
        if not _is_finished(out / name, header):
            with appearing(out / name) as folder:
                _compress_task(tuned, source, folder, header, settings,
                               device or torch.device("cpu"))
        summaries.append(Summary(**_manifest(out / name)["summary"]))
    return summaries


def _models(raw: Any) -> tuple[ModelReference, list[ModelReference]]:
    """The base and the fine-tunes of a parsed YAML file."""
    if not isinstance(raw, dict):
        raise PaveError("The configuration is not a YAML mapping with base_model and models.")
    for key, mend in (("base_model", "`base_model: NAME`"), ("models", "a list of fine-tunes")):
        if not raw.get(key):
            raise PaveError(f"{key} is missing: compress needs {mend} at the top level.")
    config = configuration({"merge_method": "tsv_m", **raw})
    models = [item.model for item in config.models if item.model != config.base_model]
    twice = [model for model, times in Counter(models).items() if times > 1]
    if twice:
        raise PaveError(f"models: {twice[0]} is listed twice; remove one.")
    if not models:
        raise PaveError("models: holds no fine-tuned model beside the base; add one.")
    return config.base_model, models


def _reference(model: ModelReference, label: str) -> dict[str, str | None]:
    """`id`, for people; `hub`, the whole reference, where it can be loaded from the Hub."""
    paths = [part.path for part in (model.model, model.lora) if part]
    return {"id": label, "hub": None if any(map(is_local, paths)) else str(model)}


def _folders(models: Sequence[ModelReference]) -> list[str]:
    """A folder name for each: the last part of its path, numbered where that is not enough."""
    names: list[str] = []
    for model in models:
        parts = [name_of(p.path).split("/")[-1] for p in (model.model, model.lora) if p]
        # A `+` or `@` in a path has a meaning to mergekit.
        name = re.sub(r"[^\w.-]+", "-", "-".join(parts)).lstrip(".") or "model"
        numbered = (f"{name}-{i}" for i in count(2))
        names.append(name if name not in names else next(n for n in numbered if n not in names))
    return names


def _check_output(out: Path, names: Iterable[str]) -> None:
    """Only finished tasks of an earlier run, and not all of them, may be there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PaveError(f"{out} is a file; choose a folder.")
    present = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")}
    if present - set(names) or present == set(names):
        raise PaveError(f"{out} already holds {min(present)}; choose another folder.")


def _is_finished(folder: Path, header: Mapping[str, Any]) -> bool:
    if not folder.exists():
        return False
    manifest = _manifest(folder)
    if manifest.get("format") == FORMAT and all(manifest.get(k) == v for k, v in header.items()):
        return True
    raise PaveError(
        f"{folder} is not from an interrupted run with these models and options; choose another "
        "folder."
    )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


# --- command -------------------------------------------------------------------------------


@click.command("compress")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank-fraction", type=click.FloatRange(0, 1, min_open=True), metavar="FRACTION",
              help="Share of every matrix's rank to keep, above 0 and at most 1; one over the "
              "number of fine-tunes when not given.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Precision of the singular vectors; each "
              "matrix's own when not given.")
@click.option("--lora", is_flag=True, help="Also write OUT/TASK/lora, an adapter for peft. It has "
              "the changes of nn.Linear weights only.")
@click.option("--device", default="cpu", show_default=True, help="Where to decompose: cpu, cuda, "
              "..., or auto for the accelerator that is there.")
@click.option("--lora-merge-cache", help="Folder for the merged copy of MODEL+ADAPTER.")
@click.option("--transformers-cache", help="Folder for downloads.")
@click.option("--trust-remote-code", is_flag=True, help="Let the models' repositories run code.")
def compress_command(config, out, rank_fraction, dtype, lora, device, lora_merge_cache,
                     transformers_cache, trust_remote_code) -> None:
    """Store the fine-tunes of CONFIG as low-rank differences from their base (TSV-Compress).

    CONFIG is a merge configuration; only its base_model and models matter. OUT/TASK gets the
    leading singular triples of every changed matrix. Tensors that are no matrices, and matrices
    that are smaller that way, are stored exactly: whole, or the rows that changed. `reconstruct`
    turns OUT/TASK and the base into a model again. An interrupted run with the same arguments
    goes on with the tasks it has not finished.

    With 8 fine-tunes the factors are 25% of a square matrix and 15.6% of a 3072 x 768 one. What is
    printed is counted: bytes on disk, and the energy (squared singular values) that is kept.

    \b
    Examples:
        mergekit-pave compress merge.yml compressed
        mergekit-pave compress merge.yml compressed --rank-fraction 0.05 --lora
    """
    from mergekit_pave.cli import device_of

    options = LoaderOptions(transformers_cache, lora_merge_cache, None, trust_remote_code)
    where = device_of(device)
    try:
        text = config.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PaveError(f"{config} is not text in UTF-8: {error.reason}.") from error
    for summary in compress(read_yaml(text, str(config)), out, rank_fraction=rank_fraction,
                            dtype=dtype, lora=lora, device=where, options=options):
        click.echo(str(summary))
