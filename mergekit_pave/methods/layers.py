"""The layers of one merge: which layer a tensor belongs to, and the covariance of its inputs."""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_pave.algebra.numeric import wide
from mergekit_pave.errors import PaveError
from mergekit_pave.models.tables import LayerTable
from mergekit_pave.recipe.parameters import CovarianceSource
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.identity import same_layer
from mergekit_pave.storage.masks import Recorder

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
        estimated_from: the weight whose task vector stands in for inputs, where no data does.
    """

    name: str
    transposed: bool
    covariance: Callable[[], Tensor]
    identity: str | None = None
    estimated_from: Tensor | None = field(default=None, compare=False)

    @property
    def seed(self) -> int:
        """Seed of the random ablation: it differs between layers, not between runs."""
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


class MergeState:
    """What one merge holds while it runs: open stores, known layers, masks, and its counts.

    Every merge has one of its own. Any number of threads may share it.

    Args:
        stores: open covariance stores, by model and where they come from.
        tables: of models whose layers no store tells: `linear_layers` by name and shape.
        masks: takes the task masks of a merge to disk.
        reasons: why matrices of the base are no weights of linear layers to treat, by name.
    """

    def __init__(
        self,
        stores: Mapping[tuple[Hashable, CovarianceSource], CovarianceStore] | None = None,
        tables: Mapping[Hashable, LayerTable] | None = None,
        masks: Recorder | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._stores = dict(stores or {})
        self._tables = dict(tables or {})
        self.masks = masks
        self._reasons = dict(reasons or {})
        self.counts: dict[str, set[str | None]] = {"purified": set(), "plain": set()}
        self.cuts: dict[Hashable, dict[str, Cut]] = {}
        self.data_free: set[Hashable] = set()

    def count(self, what: str, name: str | None) -> None:
        with self._lock:
            self.counts[what].add(name)

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
        text += self._left_out()
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

    def _left_out(self) -> str:
        """Matrices merged plainly that a user may expect to be purified, by reason."""
        by_reason: dict[str, list[str]] = {}
        for name in sorted(filter(None, self.counts["plain"])):
            if name in self._reasons:
                by_reason.setdefault(self._reasons[name], []).append(name)
        parts = [f"{len(names)} {why}, such as {names[0]}" for why, names in by_reason.items()]
        return f" Of these matrices are: {'; '.join(parts)}." if parts else ""

    def layer(
        self,
        model: Hashable,
        name: str | None,
        tensor: Tensor,
        base: Tensor,
        source: CovarianceSource,
        subspace: str = "covariance",
    ) -> Layer | None:
        """The linear layer whose weight `tensor` is; `None` for any other tensor.

        Args:
            model: mergekit's id of the input, a `ModelReference` in a YAML merge.
            name: of the output tensor, `None` in memory.
            tensor: the weight as mergekit loaded it.
            base: the base's tensor, for an estimated covariance.
            source: where this model's covariances come from.
            subspace: `svd` and `random` look at no covariance.

        Raises:
            PaveError: no calibration data, or statistics of other weights.
        """
        if subspace != "covariance":
            return self._layer_by_name(model, name, tensor)
        if source.estimated:
            with self._lock:
                self.data_free.add(model)
            layer = self._layer_by_name(model, name, tensor)
            return layer and _estimated(layer, tensor, base)
        store = self._store(model, source)
        found = store.find(name, tensor)
        if found is not None:
            weight = store.weights[found]
            return Layer(
                found,
                weight.transposed,
                partial(store.covariance, weight.site),
                store.identity(weight.site),
            )
        if name and store.namesake(name, tuple(tensor.shape)):
            raise PaveError(
                f"{name} of {model} is not the weight that the covariance store "
                f"{store.folder} was computed for; recalibrate the model."
            )
        return None

    def _store(self, model: Hashable, source: CovarianceSource) -> CovarianceStore:
        with self._lock:
            if (model, source) not in self._stores:
                self._stores[model, source] = _local_store(model, source)
            return self._stores[model, source]

    def _layer_by_name(self, model: Hashable, name: str | None, tensor: Tensor) -> Layer | None:
        """The layer of that name in the model's class, for models without a covariance store."""
        if not isinstance(model, ModelReference) or name is None:
            return Layer(name or "", False, _no_covariance)
        if model not in self._tables:
            raise PaveError(
                f"Nothing tells which tensors of {model} are weights of linear layers: name model "
                "folders to mergekit-yaml, or give covariance (a store)."
            )
        table = self._tables[model]
        if (name, tuple(tensor.shape)) in table:
            return Layer(name, table[name, tuple(tensor.shape)], _no_covariance)
        fitting = {k: t for (k, s), t in table.items() if s == tuple(tensor.shape)}
        for key, transposed in fitting.items():
            if same_layer(key, name):
                return Layer(key, transposed, _no_covariance)
        # Slices may make more layers than the model has.
        for key, transposed in fitting.items():
            if same_layer(_NUMBER.sub("*", key), _NUMBER.sub("*", name)):
                return Layer(name, transposed, _no_covariance)
        return None


def _local_store(model: Hashable, source: CovarianceSource) -> CovarianceStore:
    """A store that was not opened before the merge: one on this machine, for tensors in memory.

    Raises:
        PaveError: none is named, or it is not here.
    """
    if source.store:
        return CovarianceStore(Path(os.path.expanduser(source.store)))
    raise PaveError(
        f"Input {str(model)!r} has no covariances: merge model folders with mergekit-yaml, which "
        "calibrates them, or write a store with `mergekit-pave calibrate` and give its folder as "
        "covariance."
    )


def _estimated(layer: Layer, tensor: Tensor, base: Tensor) -> Layer:
    """The layer with a covariance from its task vector `D` (out, in): `D^T D / out`.

    Gradient descent changes a weight by sums of (output gradient) x (input): the rows of `D`
    are weighted sums of inputs, and their second moment stands in for that of the inputs
    (ACTMat, arXiv 2604.01329; ACE-Merging, arXiv 2603.02945).
    """

    def covariance() -> Tensor:
        delta = wide(tensor) - wide(base)
        delta = delta.T if layer.transposed else delta
        # Scaled before the product, which may be a much larger matrix.
        delta = delta * len(delta) ** -0.5
        return (delta.T @ delta).to(torch.float32)

    return replace(layer, covariance=covariance, estimated_from=tensor)


def _no_covariance() -> Tensor:
    raise AssertionError("the ablations use no covariance")
