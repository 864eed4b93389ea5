"""The covariance store: a folder of safetensors files and a manifest, safe to publish.

    manifest.json              model, data, sites, weights, reasons for what is missing
    fingerprints.safetensors   one row per weight, see `fingerprint`
    covariance-NNNNN.safetensors   folded second moments, one tensor per site

A *site* is one input tensor of the model; all linear layers that read it share its
covariance. Files appear by rename when they are complete, and the manifest comes last:
a folder with a manifest is whole, one without is a calibration to be resumed.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_pave.algebra.second_moment import SecondMoment, fold, unfold
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.files import write_atomically
from mergekit_pave.storage.identity import fingerprint, same, same_layer

logger = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
FINGERPRINTS = "fingerprints.safetensors"


@dataclass(frozen=True)
class Site:
    """Where one covariance lies: `width` features, mean over `count` rows."""

    width: int
    count: int
    file: str
    crc32: int


@dataclass(frozen=True)
class Weight:
    """One linear layer's weight: its site, and whether it is stored `(in, out)` (Conv1D)."""

    site: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: str


class StoreWriter:
    """Fills a store window by window; a second writer on the same folder resumes it."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PaveError(
                f"Cannot create the covariance store {self.folder}: {error.strerror}; set "
                "MERGEKIT_PAVE_CACHE to a folder that can be written."
            ) from error
        for left in self.folder.glob(".*.tmp"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        self.sites: dict[str, Site] = {}
        self._next = 0
        for file in sorted(self.folder.glob("covariance-*.safetensors")):
            self.sites.update(_finished_sites(file))
            self._next = int(file.stem.rpartition("-")[2]) + 1

    def add(self, covariances: Mapping[str, tuple[Tensor, int]]) -> None:
        """Write one window: site -> (covariance `(width, width)` float32, rows)."""
        self._write({name: fold(c.cpu()) for name, (c, _) in covariances.items()},
                    {name: rows for name, (_, rows) in covariances.items()})

    def take(self, moments: dict[str, SecondMoment]) -> None:
        """Write the window of these sums, and let go of each as soon as it is folded."""
        folded, counts = {}, {}
        while moments:
            name = next(iter(moments))
            moment = moments.pop(name)
            folded[name] = fold(moment.sum.cpu()).div_(moment.count)
            counts[name] = moment.count
        self._write(folded, counts)

    def _write(self, folded: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        file = self.folder / f"covariance-{self._next:05d}.safetensors"
        self._next += 1
        sites = {
            name: Site(matrix.shape[1] - 1, counts[name], file.name, _crc32(matrix))
            for name, matrix in folded.items()
        }
        metadata = {"sites": json.dumps({name: asdict(site) for name, site in sites.items()})}
        write_atomically(file, lambda path: save_file(folded, path, metadata=metadata))
        self.sites.update(sites)

    def finish(
        self,
        weights: Mapping[str, tuple[Weight, Tensor]],
        skipped: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> CovarianceStore:
        """Write fingerprints and manifest, which makes the store complete."""
        prints = {name: values for name, (_, values) in weights.items()}
        write_atomically(self.folder / FINGERPRINTS, lambda path: save_file(prints, path))
        manifest = {
            "kind": "mergekit-pave covariance store",
            "format": FORMAT,
            **about,
            "sites": {name: asdict(site) for name, site in self.sites.items()},
            "weights": {name: asdict(weight) for name, (weight, _) in weights.items()},
            "skipped": dict(skipped),
        }
        text = json.dumps(manifest, indent=1)
        write_atomically(self.folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))
        return CovarianceStore(self.folder)


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
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
            known = manifest["kind"] == "mergekit-pave covariance store"
        except FileNotFoundError:
            raise PaveError(
                f"No covariance store at {folder}: it has no {MANIFEST}. Write one with "
                "`mergekit-pave calibrate MODEL --output DIR`."
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise PaveError(
                f"{path} is not the manifest of a covariance store; recalibrate the model."
            )
        if manifest.get("format") != FORMAT:
            raise PaveError(
                f"The covariance store {folder} has format {manifest.get('format')}, this "
                f"version of mergekit-pave reads format {FORMAT}; recalibrate the model."
            )
        self.manifest: dict[str, Any] = manifest
        self._verified: dict[str, set[torch.dtype]] = {}
        try:
            self.sites = {name: Site(**site) for name, site in manifest["sites"].items()}
            self.weights = {
                name: Weight(**{**weight, "shape": tuple(weight["shape"])})
                for name, weight in manifest["weights"].items()
            }
            self.skipped: dict[str, str] = dict(manifest["skipped"])
            with safe_open(self.folder / FINGERPRINTS, "pt") as file:
                self._fingerprints = {name: file.get_tensor(name) for name in self.weights}
            for file_name in {site.file for site in self.sites.values() if complete}:
                with safe_open(self.folder / file_name, "pt"):
                    pass
        except (KeyError, TypeError, OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> PaveError:
        return PaveError(
            f"The covariance store {self.folder} is damaged ({what}); delete the folder and "
            "recalibrate the model."
        )

    def covariance(self, site: str) -> Tensor:
        """Second moment of a site's inputs, `(width, width)` float32, symmetric."""
        entry = self.sites[site]
        try:
            with safe_open(self.folder / entry.file, "pt") as file:
                folded = file.get_tensor(site)
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{entry.file}: {error}") from error
        if _crc32(folded) != entry.crc32:
            raise self._damaged(f"{entry.file}: wrong checksum of {site}")
        return unfold(folded)

    def find(self, name: str | None, tensor: Tensor) -> str | None:
        """Name of the weight whose values `tensor` has, whatever it is called now.

        The name is only a hint: slices rename layers, and checkpoints and model classes use
        different prefixes. Values decide. `None` when no linear layer's weight matches.
        """
        seen = fingerprint(tensor)
        exact = self.weights.get(name or "")
        if exact and exact.shape == tuple(tensor.shape) and self._is(name, seen, tensor.dtype):
            return name
        for key, weight in self.weights.items():
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


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy())


def _finished_sites(file: Path) -> dict[str, Site]:
    """Sites of one window file of an earlier run; a damaged file is computed again."""
    try:
        with safe_open(file, "pt") as opened:
            sites = json.loads(opened.metadata()["sites"])
            found = {name: Site(**site) for name, site in sites.items()}
            if all(_crc32(opened.get_tensor(name)) == s.crc32 for name, s in found.items()):
                return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    logger.warning("Ignoring the damaged file %s of an interrupted calibration.", file)
    file.unlink(missing_ok=True)
    return {}
