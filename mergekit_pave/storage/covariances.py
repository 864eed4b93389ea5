"""The covariance store: an `archive` of second moments, safe to publish.

    manifest.json              model, data, sites, weights, reasons for what is missing
    fingerprints.safetensors   one row per weight, `(weights, 512)`, see `fingerprint`
    covariance-NNNNN.safetensors   folded second moments, one tensor per site

A *site* is one input tensor of the model; all linear layers that read it share its covariance. A
folder without a manifest is a calibration to be resumed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_pave.algebra.second_moment import SecondMoment, fold, unfold
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.archive import (
    MANIFEST,
    Archive,
    Count,
    Dtype,
    Entry,
    Kind,
    parsed,
    read_header,
    read_manifest,
    write_manifest,
    write_tensors,
)
from mergekit_pave.storage.files import make_folder
from mergekit_pave.storage.identity import LENGTH, fingerprint, same, same_layer

logger = logging.getLogger(__name__)
FORMAT = 2
KIND = Kind(
    "mergekit-pave covariance store", FORMAT, "The covariance store {} is",
    "delete the folder and recalibrate the model with `mergekit-pave calibrate`",
)
FINGERPRINTS = "fingerprints.safetensors"
_PRINTS = "::fingerprints"
_WINDOW = re.compile(r"covariance-\d{5,9}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Site:
    """One covariance: `width` features, mean over `count` rows."""

    width: Annotated[int, Field(gt=0)]
    count: Count


@dataclass(frozen=True)
class Weight:
    """One linear layer's weight: its site, and whether it is stored `(in, out)` (Conv1D)."""

    site: str
    shape: tuple[Count, ...]
    transposed: bool
    dtype: Dtype


@dataclass(frozen=True)
class _Model:
    id: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class _Data:
    dataset: str
    local: bool
    tokens: Count


@dataclass(frozen=True)
class _About:
    """What the manifest says beside its entries."""

    sites: dict[str, Site]
    weights: dict[str, Weight]
    skipped: dict[str, str]
    model: _Model
    data: _Data


class StoreWriter:
    """Fills a store window by window; a second writer of the same run resumes it.

    Args:
        folder: where the store goes; files in it that this run has not written stay as they are.
        run: names the run, by everything that its covariances depend on.

    Raises:
        PaveError: the folder cannot be written.
    """

    def __init__(self, folder: Path, run: str):
        self.folder, self.run = Path(folder), run
        make_folder(self.folder)
        self.sites: dict[str, Site] = {}
        self._entries: dict[str, Entry] = {}
        self._next = 0
        for file in windows_in(self.folder):
            self._next = int(file.stem.rpartition("-")[2]) + 1
            self._resume(file)

    def _resume(self, file: Path) -> None:
        header = read_header(file, KIND) or {}
        try:
            archive = Archive(self.folder, KIND, header["entries"])
            sites = parsed(dict[str, Site], header["sites"])
            for name, site in sites.items():
                _expect(archive, name, site)
                archive.tensor(name)
            whole = header["run"] == self.run and archive.files == [file.name]
        except (PaveError, LookupError, ValueError):
            whole = False
        if whole:
            self.sites |= sites
            self._entries |= archive.entries
        else:
            logger.warning(
                "%s is damaged or of another calibration: it stays, and is not used.", file)

    def take(self, moments: dict[str, SecondMoment]) -> None:
        """Write these sums to a file; each is freed as soon as it is folded."""
        folded, sites = {}, {}
        if not moments:
            return
        while moments:
            name = next(iter(moments))
            moment = moments.pop(name)
            folded[name] = fold(moment.total.cpu()).div_(moment.count)
            sites[name] = Site(folded[name].shape[1] - 1, moment.count)
        file = self.folder / f"covariance-{self._next:05d}.safetensors"
        self._next += 1
        about = {name: asdict(site) for name, site in sites.items()}
        self._entries |= write_tensors(file, KIND, folded, run=self.run, sites=about)
        self.sites |= sites

    def finish(
        self,
        weights: Mapping[str, tuple[Weight, Tensor]],
        skipped: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> CovarianceStore:
        """Write fingerprints and manifest, which makes the store complete.

        Args:
            weights: of the linear layers, with the fingerprint of each.
            skipped: layers without a covariance, and why.
            about: `model`, `data` and `versions`, as JSON.
        """
        prints = torch.stack([values for _, values in weights.values()])
        entries = write_tensors(self.folder / FINGERPRINTS, KIND, {_PRINTS: prints})
        write_manifest(
            self.folder, KIND, self._entries | entries, **about,
            sites={name: asdict(site) for name, site in self.sites.items()},
            weights={name: asdict(weight) for name, (weight, _) in weights.items()},
            skipped=dict(skipped),
        )
        return CovarianceStore(self.folder)


def _expect(archive: Archive, name: str, site: Site) -> None:
    archive.expect(name, ((site.width + 1) // 2, site.width + 1), "float32")


def windows_in(folder: Path) -> list[Path]:
    """The files in a folder that are called like those of a store, in their order."""
    return sorted(file for file in folder.iterdir() if _WINDOW.fullmatch(file.name))


class CovarianceStore:
    """A finished store, read lazily: one covariance at a time.

    Args:
        folder: where it lies.
        complete: False for one of which only the manifest and the fingerprints are there.

    Raises:
        PaveError: the folder holds no complete store, or a file of it is damaged.
    """

    def __init__(self, folder: Path | str, complete: bool = True):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder, KIND)
        if manifest is None:
            raise PaveError(
                f"No covariance store at {folder}: it has no {MANIFEST}. Write one with "
                "`mergekit-pave calibrate MODEL --output DIR`."
            )
        self.manifest: dict[str, Any] = manifest
        self._verified: dict[str, set[torch.dtype]] = {}
        with KIND.guard(self.folder, f"{MANIFEST}: "):
            about = parsed(_About, manifest)
        self._archive = archive = Archive(self.folder, KIND, manifest.get("entries"))
        self.sites, self.weights, self.skipped = about.sites, about.weights, about.skipped
        with archive.guard(f"{MANIFEST}: "):
            self._check()
        archive.check(None if complete else [FINGERPRINTS])
        self._fingerprints = dict(zip(self.weights, archive.tensor(_PRINTS), strict=True))

    def _check(self) -> None:
        """Raise `ValueError` unless all covariances and fingerprints are among the entries."""
        for name, site in self.sites.items():
            _expect(self._archive, name, site)
        self._archive.expect(_PRINTS, (len(self.weights), LENGTH), "float32")
        for name, weight in self.weights.items():
            width = self.sites[weight.site].width
            if len(weight.shape) != 2 or weight.shape[0 if weight.transposed else 1] != width:
                raise ValueError(f"{name} does not fit its covariance")

    @property
    def files(self) -> list[str]:
        """Names of its files, the manifest first."""
        return [MANIFEST, *self._archive.files]

    def covariance(self, site: str) -> Tensor:
        """Second moment of a site's inputs, `(width, width)` float32, symmetric."""
        return unfold(self._archive.tensor(site))

    def identity(self, site: str) -> str:
        """sha256 of the covariance. `covariance` refuses to give any other content for it."""
        return self._archive.entries[site].sha256

    def find(self, name: str | None, tensor: Tensor) -> str | None:
        """Name of the weight whose values `tensor` has, whatever it is called now.

        The name is only a hint: slices rename layers, and checkpoints and model classes use
        different prefixes. Values decide. `None` when no linear layer's weight matches.
        """
        seen = fingerprint(tensor)
        named = {name: self.weights[name]} if name in self.weights else {}
        for key, weight in (named | self.weights).items():
            if weight.shape == tuple(tensor.shape) and self._is(key, seen, tensor.dtype):
                return key
        return None

    def _is(self, key: str, seen: Tensor, dtype: torch.dtype) -> bool:
        lived_in = (getattr(torch, self.weights[key].dtype), *self._verified.get(key, ()), dtype)
        return bool(same(seen, self._fingerprints[key], *lived_in))

    def namesake(self, name: str, shape: tuple[int, ...]) -> str | None:
        """A weight of this store with that name, up to a prefix, and that shape."""
        for key, weight in self.weights.items():
            if weight.shape == shape and same_layer(key, name):
                return key
        return None

    def verify(self, tensors: Iterator[tuple[str, Tensor]], model: str) -> None:
        """Raise `PaveError` unless the store was computed for this checkpoint's weights.

        From now on `find` also knows weights that were rounded to the checkpoint's dtype and
        widened again, as a merge does with a bfloat16 copy of a float32 model.
        """
        anything = False
        for name, tensor in tensors:
            if tensor.ndim != 2:
                continue
            if found := self.find(name, tensor):
                anything = True
                self._verified.setdefault(found, set()).add(tensor.dtype)
            elif self.namesake(name, tuple(tensor.shape)):
                raise PaveError(
                    f"The covariance store {self.folder} was computed for other weights than "
                    f"those of {model} (first difference: {name}); recalibrate the model, or "
                    "give the store that belongs to it under `covariance`."
                )
        if not anything:
            raise PaveError(
                f"The covariance store {self.folder} has no weight in common with {model}; "
                "recalibrate the model, or give the store that belongs to it under `covariance`."
            )
