"""Which weights a merge would purify, and their tensors, read one at a time from the shards.

Nothing is merged: the models, their covariance stores and the settings come from the same
configuration as the merge's, and the stores through the same cache.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor

from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.inputs import Input
from mergekit_pave.recipe.parameters import Purification
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.identity import same_layer

logger = logging.getLogger(__name__)


class Checkpoint:
    """A model's tensors by name, each read when it is asked for."""

    def __init__(self, source: ModelSource):
        index = ShardedTensorIndex.from_disk(source.path)
        self.names: list[str] = sorted(index.tensor_paths)
        self._loader = LazyTensorLoader(index, lazy_unpickle=False)

    def get(self, name: str) -> Tensor:
        return self._loader.get_tensor(name)

    def find(self, name: str) -> str | None:
        """This checkpoint's name for `name` of another one, which may have a prefix more."""
        if name in self.names:
            return name
        return next((own for own in self.names if same_layer(own, name)), None)


@dataclass(frozen=True)
class Model:
    """One fine-tuned model: a public label, its tensors and its covariances."""

    label: str
    entry: Input
    source: ModelSource
    tensors: Checkpoint
    store: CovarianceStore


@dataclass
class Layer:
    """One linear weight of all models.

    Attributes:
        name: the weight in the base's checkpoint.
        block: number of the layer it belongs to, None outside the numbered layers.
        kind: what it is within its layer, such as `self_attn.q_proj`.
        shape: (out, in), whichever way round it is stored.
        own: number of each model that purifies it -> name in its checkpoint and in its store.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    settings: Purification
    own: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def cost(self) -> float:
        """Multiplications of one decomposition, up to a constant, times the models."""
        return float(self.shape[0] * self.shape[1] * self.rank * len(self.own))


@dataclass
class Merge:
    """A configuration with everything open.

    Attributes:
        layers: every weight that at least one model would have purified.
        coverage: per model, `purified`, `plain` and `skipped`: reason -> tensors.
        switched_off: weights that only `rank_ratio: 1.0` keeps from being purified.
    """

    method: str
    base: str
    base_tensors: Checkpoint
    models: list[Model]
    layers: list[Layer]
    coverage: list[dict[str, Counter[str]]]
    switched_off: list[str] = field(default_factory=list)

    def weight(self, layer: Layer, model: int) -> Tensor:
        """(out, in), as it is stored but for Conv1D's transposition."""
        tensor = self.models[model].tensors.get(layer.own[model][0])
        return tensor.T if self.transposed(layer) else tensor

    def base_weight(self, layer: Layer) -> Tensor:
        tensor = self.base_tensors.get(layer.name)
        return tensor.T if self.transposed(layer) else tensor

    def site(self, layer: Layer, model: int) -> str:
        """The name under which this model's store has the layer's covariance."""
        return self.models[model].store.weights[layer.own[model][1]].site

    def covariance(self, layer: Layer, model: int) -> Tensor:
        """(in, in) float32."""
        return self.models[model].store.covariance(self.site(layer, model))

    def transposed(self, layer: Layer) -> bool:
        model, (_, name) = next(iter(layer.own.items()))
        return self.models[model].store.weights[name].transposed


@contextmanager
def explained(layer: Layer) -> Iterator[None]:
    """Turn what the algebra says of unusable numbers into a `PaveError` that names the layer."""
    try:
        yield
    except ValueError as error:
        raise PaveError(f"{layer.name} cannot be looked at: {error}; check that checkpoint, or "
                        "recalibrate the model.") from error
