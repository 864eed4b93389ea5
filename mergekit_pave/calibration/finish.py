"""The end of a calibration: fingerprints and manifest of a store whose covariances are there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from accelerate.utils import align_module_device
from torch import Tensor

from mergekit_pave.calibration.collect import SitePlan
from mergekit_pave.calibration.samples import Samples
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import LinearLayer, LinearLayers, is_transposed, warn_of_unseen
from mergekit_pave.models.source import ModelSource
from mergekit_pave.storage.covariances import CovarianceStore, StoreWriter, Weight
from mergekit_pave.storage.identity import fingerprint

Entry = tuple[Weight, Tensor]
logger = logging.getLogger(__name__)


def finish(
    writer: StoreWriter,
    source: ModelSource,
    samples: Samples,
    layers: LinearLayers,
    sites: Sequence[SitePlan],
    entries: Mapping[str, Entry],
    identity: str,
) -> CovarianceStore:
    """Write fingerprints and manifest of a store whose covariances are all there.

    `entries` are those of layers whose weights were held before; the others are read now.

    Raises:
        PaveError: no layer saw an input.
    """
    weights, skipped = {}, dict(layers.skipped)
    for site in sites:
        for name in site.weights:
            if site.name in writer.sites:
                weights[name] = entries.get(name) or _entry(site.name, layers.modules[name])
            else:
                what = "zero throughout" if site.calls else "never seen in"
                skipped[name] = f"its input was {what} the forward passes"
    if not weights:
        raise PaveError(
            f"No linear layer of {source.label} saw an input other than zero during "
            "calibration: it overflows, or its architecture cannot be purified."
        )
    _warn_about(source, writer, skipped)
    about = {
        "model": {"id": source.label, "revision": source.revision, "digest": identity},
        "data": samples.about,
        "versions": {
            name: version(name) for name in ("mergekit-pave", "torch", "transformers", "accelerate")
        },
    }
    return writer.finish(weights, skipped, about)


def entries_within(
    sites: Sequence[SitePlan], layers: LinearLayers, within: str
) -> dict[str, Entry]:
    """What the manifest says of the layers whose names begin with `within`."""
    return {
        name: _entry(site.name, layers.modules[name])
        for site in sites for name in site.weights if name.startswith(within)}


def _entry(site: str, module: LinearLayer) -> Entry:
    """What a manifest says of one layer, and its fingerprint; reads an offloaded weight."""
    with align_module_device(module):
        weight = module.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return Weight(site, tuple(weight.shape), is_transposed(module), dtype), fingerprint(weight)


def _warn_about(source: ModelSource, writer: StoreWriter, skipped: dict[str, str]) -> None:
    warn_of_unseen(source.label, skipped)
    short = [(s.count / s.width, name) for name, s in writer.sites.items() if s.count < s.width]
    if short:
        ratio, name = min(short)
        logger.warning(
            "%s: %d of %d covariances come from fewer tokens than features (least: %s, %.2f tokens "
            "per feature); about %.0f times as many samples would fill them.",
            source.label, len(short), len(writer.sites), name, ratio, 1 / ratio,
        )
