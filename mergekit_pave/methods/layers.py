"""Which layer a tensor is and what its inputs look like: the method's view of the stores.

One `Statistics` serves all methods of a process. It finds or computes each model's
covariance store once, under a lock, however many threads merge.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_pave.algebra.numeric import wide
from mergekit_pave.calibration.stores import fetch_store, open_store
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import (
    empty_model,
    is_transposed,
    linear_layers,
    refuse_quantised,
    warn_of_unseen,
)
from mergekit_pave.models.names import name_of
from mergekit_pave.models.source import LoaderOptions, model_source
from mergekit_pave.recipe.parameters import CALIBRATION, DATA_FREE
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.identity import same_layer

logger = logging.getLogger(__name__)
# Of a layer, within a tensor's name.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Layer:
    """One linear layer of one model.

    Attributes:
        name: its weight in the model's own checkpoint or class.
        transposed: the weight is stored `(in, out)`.
        covariance: reads the second moment of its inputs, `(in, in)` float32.
        identity: names that covariance by its content; `None` when there is none.
    """

    name: str
    transposed: bool
    covariance: Callable[[], Tensor]
    identity: str | None = None

    @property
    def seed(self) -> int:
        """For the random ablation: differs between layers, not between runs."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Cut:
    """What one model lost at one tensor.

    Attributes:
        full: the rank of its weight, `min(out, in)`.
        dropped: components removed.
        removed: norm of what was removed over the norm of the task vector; above 1 the merge
            sees more of the base taken away than of the fine-tuning.
    """

    full: int
    dropped: int
    removed: float


class Statistics:
    """Finds the layer behind a tensor, and keeps count of what was purified."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[tuple, CovarianceStore] = {}
        self._plain: dict[Hashable, dict[tuple[str, tuple], bool]] = {}
        self._options = LoaderOptions()
        self.counts: dict[str, set[str | None]] = {"purified": set(), "plain": set()}
        self.cuts: dict[Hashable, dict[str, Cut]] = {}
        self.data_free: set[Hashable] = set()

    def prepare(self, options: LoaderOptions) -> None:
        """Load with these options from now on."""
        self._options = options

    def count(self, what: str, name: str | None) -> None:
        self.counts[what].add(name)

    def reset(self) -> None:
        """Begin another merge: between two, models and data may have changed on disk."""
        with self._lock:
            self._stores.clear()
            self._plain.clear()
            self.cuts.clear()
            self.data_free.clear()
        for names in self.counts.values():
            names.clear()

    @property
    def used(self) -> dict[Hashable, CovarianceStore]:
        """The store of each model of this merge."""
        return {key[0]: store for key, store in self._stores.items()}

    @property
    def ranks(self) -> dict[Hashable, dict[str, tuple[int, int]]]:
        """Per model and tensor: full rank, and how many components it lost."""
        return {
            model: {name: (cut.full, cut.dropped) for name, cut in named.items()}
            for model, named in self.cuts.items()
        }

    def record_cut(self, name: str | None, model: Hashable, cut: Cut) -> None:
        with self._lock:
            self.cuts.setdefault(model, {})[name or ""] = cut

    def coverage(self, treated: str = "purified") -> str:
        """The end of a merge: what was purified, and a warning where that went too far.

        Args:
            treated: what the method does to the weights of linear layers.
        """
        purified, plain = len(self.counts["purified"]), len(self.counts["plain"])
        text = (
            f"mergekit-pave: {purified} tensors {treated}, {plain} merged plainly (vocabulary, "
            "heads, norms, biases and what no model changed)."
        )
        cuts = [(c.removed, n, m) for m, named in self.cuts.items() for n, c in named.items()]
        outweighed = [cut for cut in cuts if cut[0] > 1]
        if outweighed:
            removed, name, model = max(outweighed, key=lambda cut: cut[0])
            text += (
                f"\nWarning: in {len(outweighed)} of {len(cuts)} weights more was removed than "
                f"the fine-tuning had changed ({name} of {model}: {removed:.1f} times), so the "
                "merge loses parts of the base; raise rank_ratio, or set it to 1.0 there with a "
                "filter."
            )
        return text

    def layer(
        self,
        model: Hashable,
        name: str | None,
        tensor: Tensor,
        values: Mapping[str, Any],
        base: Tensor,
    ) -> Layer | None:
        """The linear layer whose weight `tensor` is; `None` when it is none to purify.

        Args:
            model: mergekit's id of the input, a `ModelReference` in a YAML merge.
            name: of the output tensor, `None` in memory.
            tensor: the weight as mergekit loaded it.
            values: this model's parameters by name.
            base: the base's tensor, for `calibration_dataset: none`.

        Raises:
            PaveError: no calibration data, or statistics of other weights.
        """
        if values.get("subspace", "covariance") != "covariance":
            return self._layer_by_name(model, name, tensor)
        if values["calibration_dataset"] == DATA_FREE and not values["covariance"]:
            self.data_free.add(model)
            layer = self._layer_by_name(model, name, tensor)
            return layer and _estimated(layer, tensor, base)
        store = self._store(model, values, tensor.device)
        found = store.find(name, tensor)
        if found is not None:
            weight = store.weights[found]
            site = store.sites[weight.site]
            return Layer(
                found,
                weight.transposed,
                partial(store.covariance, weight.site),
                f"{site.width}|{site.count}|{site.crc32}",
            )
        if name and store.namesake(name, tuple(tensor.shape)):
            raise PaveError(
                f"{name} of {model} is not the weight that the covariance store "
                f"{store.folder} was computed for; recalibrate the model."
            )
        return None

    def _store(
        self, model: Hashable, values: Mapping[str, Any], device: torch.device
    ) -> CovarianceStore:
        wanted = ("covariance", *(parameter.name for parameter in CALIBRATION))
        key = (model, *(values[name] for name in wanted))
        with self._lock:
            if key not in self._stores:
                self._stores[key] = self._open(model, values, device)
            return self._stores[key]

    def _open(
        self, model: Hashable, values: Mapping[str, Any], device: torch.device
    ) -> CovarianceStore:
        if not isinstance(model, ModelReference) or _is_file(model):
            if values["covariance"]:
                return fetch_store(values["covariance"], self._options)
            raise PaveError(
                f"Input {str(model)!r} is tensors without a config, which cannot be calibrated: "
                "write a store with `mergekit-pave calibrate` and give it as covariance."
            )
        if not (values["covariance"] or values["calibration_dataset"]):
            raise PaveError(
                f"{model} has no calibration data: set calibration_dataset (its own task data) "
                "or covariance (a store) under its parameters, or rank_ratio: 1.0."
            )
        source = model_source(model, self._options)
        with torch.device("cpu"):
            return open_store(source, values, self._options, device)

    def _layer_by_name(self, model: Hashable, name: str | None, tensor: Tensor) -> Layer | None:
        """Where no data tells them apart: the layers of the model's class, by name."""
        if not isinstance(model, ModelReference) or name is None:
            return Layer(name or "", False, _no_covariance)
        if _is_file(model):
            raise PaveError(
                f"Nothing tells which tensors of {model} are weights of linear layers: name model "
                "folders to mergekit-yaml, or give covariance (a store)."
            )
        with self._lock:
            if model not in self._plain:
                config = model.config(trust_remote_code=self._options.trust_remote_code)
                refuse_quantised(config, str(model))
                layers = linear_layers(empty_model(config, self._options.trust_remote_code))
                warn_of_unseen(name_of(str(model)), layers.skipped)
                self._plain[model] = {
                    (key, tuple(module.weight.shape)): is_transposed(module)
                    for key, module in layers.modules.items()
                }
        fitting = {k: t for (k, s), t in self._plain[model].items() if s == tuple(tensor.shape)}
        for key, transposed in fitting.items():
            if same_layer(key, name):
                return Layer(key, transposed, _no_covariance)
        # Slices may make more layers than the model has.
        for key, transposed in fitting.items():
            if same_layer(_NUMBER.sub("*", key), _NUMBER.sub("*", name)):
                return Layer(name, transposed, _no_covariance)
        return None


def _estimated(layer: Layer, tensor: Tensor, base: Tensor) -> Layer:
    """The layer with a covariance from its task vector `D` (out, in): `D^T D / out`.

    Gradient descent changes a weight by sums of (output gradient) x (input): the rows of `D`
    are weighted sums of inputs, and their second moment stands in for that of the inputs
    (ACTMat, arXiv 2604.01329; ACE-Merging, arXiv 2603.02945).
    """

    def covariance() -> Tensor:
        delta = wide(tensor) - wide(base)
        delta = delta.T if layer.transposed else delta
        return (delta.T @ delta / len(delta)).to(torch.float32)

    return replace(layer, covariance=covariance)


def _is_file(model: ModelReference) -> bool:
    """Tensors without a config, as `mergekit-pytorch` reads them."""
    return os.path.isfile(model.model.path)


def _no_covariance() -> Tensor:
    raise AssertionError("the ablations use no covariance")


@functools.cache
def shared_statistics():
    from mergekit_pave.methods.layers import Statistics

    return Statistics()
