"""What the methods share that look at every model's covariances."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any

from mergekit.merge_methods import PerInputValues, TensorEntry, TensorGroup
from torch import Tensor

from mergekit_pave.locate import LoaderOptions
from mergekit_pave.merging.planning import PlannedMethod
from mergekit_pave.numeric import finite
from mergekit_pave.statistics import Layer, Statistics


def is_matrix(group: TensorGroup) -> bool:
    """Whether the tensors may be weights of linear layers: 2-D and no vocabulary."""
    return group.entries[0].tensor.ndim == 2 and group.metadata.vocabulary_axis is None


def of_model(values: Mapping[str, Any], model: Hashable) -> dict[str, Any]:
    """One model's parameters out of those of all models."""
    return {
        name: value[model] if isinstance(value, PerInputValues) else value
        for name, value in values.items()
    }


def layer_of(
    statistics: Statistics, group: TensorGroup, entry: TensorEntry, values: Mapping[str, Any]
) -> Layer | None:
    """The linear layer behind one input of a group; `values` as mergekit bound them."""
    name = group.metadata.name
    return statistics.layer(
        entry.id, name, entry.tensor, of_model(values, entry.id), group.base.tensor
    )


class CovarianceMethod(PlannedMethod):
    """A method of the fine-tuned weights *and* their layers' inputs.

    Its specification has the calibration keys. `merge_layers` is what it does, once the layers
    are known; a purified twin knows them already, from the weights before purification.
    """

    treated = "merged by their covariances"

    def __init__(self, statistics: Statistics):
        self.statistics = statistics

    def prepare(self, options: LoaderOptions) -> None:
        self.statistics.prepare(options)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        layers: dict[Hashable, Layer] = {}
        if is_matrix(group):
            for entry in group.non_base:
                layer = layer_of(self.statistics, group, entry, parameters)
                if layer is not None:
                    layers[entry.id] = layer
        self.statistics.count("purified" if layers else "plain", group.metadata.name)
        return finite(self.merge_layers(group, layers, **parameters), group)

    @abstractmethod
    def merge_layers(
        self, group: TensorGroup, layers: Mapping[Hashable, Layer], **parameters: Any
    ) -> Tensor:
        """Merge a group; `layers` holds those of its models that have a covariance here."""
