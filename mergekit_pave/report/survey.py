"""What a merge would purify: every layer with its place, its settings and a sample of them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.parameter_resolver import resolve_parameter
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.calibration.stores import open_store
from mergekit_pave.check import preflight
from mergekit_pave.check.models import Allowances
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions, model_source, read_config
from mergekit_pave.recipe.inputs import Input, covariance_source, purifies
from mergekit_pave.recipe.parameters import PREFIX, PURIFICATION, Purification
from mergekit_pave.recipe.recipe import Recipe, read_raw
from mergekit_pave.report.facts import Settings
from mergekit_pave.report.merge import Checkpoint, Layer, Merge, Model, logger
from mergekit_pave.storage.identity import same_layer

_SWITCHED_OFF = "rank_ratio is 1.0 here"
# The first number in a name counts layers.
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.(.+)")


def open_merge(
    path: Path, options: LoaderOptions, device: torch.device, allow_crimes: bool = False
) -> Merge:
    """Check a configuration, open its models and stores (calibrating what is absent).

    Raises:
        PaveError: what `mergekit-pave check` finds, or a store that cannot be opened or computed.
    """
    recipe = Recipe.of(read_raw(path))
    config = recipe.config
    for warning in preflight(recipe, options, Allowances(allow_crimes)):
        logger.warning("%s", warning)
    entries = recipe.inputs
    if not purifies(entries[0].method):
        raise PaveError(
            f"merge_method: {config.merge_method} purifies nothing; this looks at what "
            f"{PREFIX + config.merge_method} would do: name that one in a copy of the "
            "configuration, with its calibration data."
        )
    if entries[0].can_be("purify") != {"weight"}:
        raise PaveError(
            "This looks at what `purify: weight` would do: take `purify` (and `separation`, and a "
            "rank_ratio meant for it) out of a copy of the configuration."
        )
    _refuse_parts(config, entries[0].base, options)
    sources = [model_source(entry.model, options) for entry in entries]
    models = [
        Model(label, entry, source, Checkpoint(source),
              open_store(source, covariance_source(entry), options, device))
        for label, entry, source in zip(
            _distinct([source.label for source in sources]), entries, sources, strict=True)
    ]
    base = model_source(entries[0].base, options)
    merge = Merge(config.merge_method, base.label, Checkpoint(base), models, [], [])
    _survey(merge)
    if not merge.layers:
        reasons = merge.coverage[0]["plain"].most_common(3)
        raise PaveError("This merge purifies nothing: " + ", ".join(
            f"{count} tensors are merged plainly ({why})" for why, count in reasons) + ".")
    return merge


def _refuse_parts(
    config: MergeConfiguration, base: ModelReference, options: LoaderOptions
) -> None:
    """Raise `PaveError` unless whole models are merged, all their layers in one way.

    Slices and modules can each have parameters, models and layers of their own, and leave out
    or repeat layers of the base.
    """
    # "default" is mergekit's name for a model's only module.
    modules = config.modules or {"default": config}
    simple = list(modules) == ["default"]
    if simple and _is_whole(modules["default"].slices or [], base, options):
        return
    part = "slice" if simple else "module"
    raise PaveError(
        f"{part}s: this looks at whole models whose layers are all merged in one way: in a copy "
        f"of the configuration name the models under `models`, with the parameters of one {part}, "
        "and read what is said of its layers."
    )


def _is_whole(
    slices: Sequence[OutputSliceDefinition], base: ModelReference, options: LoaderOptions
) -> bool:
    if not slices:
        return True
    layers = getattr(read_config(base, options), "num_hidden_layers", None)
    ranges = [tuple(source.layer_range) for source in slices[0].sources]
    return len(slices) == 1 and all(found == (0, layers) for found in ranges)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Distinct labels: folders of the same name in different places get a number."""
    seen: Counter[str] = Counter()
    result = []
    for label in labels:
        seen[label] += 1
        result.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return result


def place(name: str) -> tuple[int | None, str]:
    """`(12, "self_attn.q_proj")` for `model.layers.12.self_attn.q_proj.weight`.

    The first number counts layers; later ones (experts, sublayers) become `*`. Encoder and
    decoder layers of the same kind get different names.
    """
    stem = name.removesuffix(".weight")
    found = _NUMBERED.search(stem)
    if not found:
        return None, stem
    kind = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", found[2])
    side = next((p for p in ("decoder", "encoder") if p in stem[: found.start()].split(".")), "")
    # Most models call their only stack "encoder"; that says nothing.
    return int(found[1]), f"decoder {kind}" if side == "decoder" else kind


def depths(names: Sequence[str]) -> dict[str, float]:
    """Where mergekit reads a gradient, from 0 to 1 over the layers of each stack.

    It takes the start of a gradient outside of them, and the end where there is one layer only.
    """
    stacks: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in names:
        if match := _NUMBERED.search(name.removesuffix(".weight")):
            stack, number = stacks[name] = name[: match.start()], int(match[1])
            last[stack] = max(last.get(stack, 0), number)
    inside = {name: number / last[stack] if last[stack] else 1.0
              for name, (stack, number) in stacks.items()}
    return {name: inside.get(name, 0.0) for name in names}


def _survey(merge: Merge) -> None:
    """Fill in `layers`, `coverage` and `switched_off` from names, shapes and values."""
    names = merge.base_tensors.names
    depth = depths(names)
    merge.coverage = [
        {what: Counter() for what in ("purified", "plain", "skipped")} for _ in merge.models
    ]
    for name in tqdm(names, desc="Reading weights", unit="tensor", leave=False):
        base = merge.base_tensors.get(name)
        # Shared parameters have the same value in the scopes of every model.
        settings = _settings(merge.models[0].entry, name, depth[name])
        layer = Layer(name, *place(name), tuple(base.shape), settings)
        reasons = set()
        for number, model in enumerate(merge.models):
            what, reason = _place_in(layer, number, model, base, depth[name])
            merge.coverage[number][what][reason] += 1
            reasons.add(reason)
        if _SWITCHED_OFF in reasons:
            merge.switched_off.append(name)
        if layer.own:
            if merge.transposed(layer):
                layer.shape = layer.shape[::-1]
            merge.layers.append(layer)


def _place_in(
    layer: Layer, number: int, model: Model, base: Tensor, t: float
) -> tuple[str, str]:
    """What happens to this tensor of one model and why; notes it in `layer` if purified."""
    own = model.tensors.find(layer.name)
    if own is None:
        return "skipped", "not in this checkpoint"
    if base.ndim != 2:
        return "plain", "not a matrix (norm, bias, convolution)"
    tensor = model.tensors.get(own)
    if tensor.shape != base.shape:
        return "skipped", "another shape than the base's"
    found = model.store.find(own, tensor)
    if found is None:
        reasons = [why for key, why in model.store.skipped.items() if same_layer(key, own)]
        return "plain", reasons[0] if reasons else "not a linear layer (embedding, position)"
    if torch.equal(tensor, base):
        return "plain", "equals the base"
    if layer.settings.off:
        return "plain", _SWITCHED_OFF
    if _resolve(model.entry, "weight", layer.name, t) == 0:
        return "plain", "weight is 0 here"
    layer.own[number] = (own, found)
    return "purified", "linear layer with its own covariance"


def _settings(entry: Input, tensor: str, t: float) -> Purification:
    return Purification.of({p.name: _resolve(entry, p.name, tensor, t) for p in PURIFICATION})


def _resolve(entry: Input, key: str, tensor: str, t: float) -> Any:
    """mergekit's reading of scopes, filters and gradients; None for a key the method lacks."""
    spec = next((p for p in entry.method.spec.parameters if p.name == key), None)
    if spec is None:
        return None
    try:
        return resolve_parameter(spec, entry.scopes, tensor_name=tensor, t=t, model=entry.model)
    except RuntimeError as error:
        raise PaveError(
            f"{entry.where}: {key} has no value for {tensor}, which no filter matches; add an "
            "item without a filter."
        ) from error


def settings_summary(layers: Sequence[Layer]) -> Settings:
    """The settings that occur, for the page: `rank_ratio` as a range, the rest as names."""
    ratios = [layer.settings.kept_share for layer in layers]
    first = layers[0].settings
    return Settings([min(ratios), max(ratios)], first.rank_allocation, first.subspace,
                    **first.damping)


# Seconds that looking at every layer may take before layers are left out.
PATIENCE = 300.0
FEWEST = 3
# One layer of one model costs about this many multiply-adds per entry of out * in * R, found by
# timing: two spectra, two tails, two decompositions of task vectors.
WORK = 30.0
_PROBE = 384


@dataclass(frozen=True)
class Sample:
    """The layers that are looked at.

    Attributes:
        layers: the weights of the chosen blocks, and all outside the numbered blocks.
        blocks: numbers of the chosen blocks.
        of: how many blocks there are.
    """

    layers: list[Layer]
    blocks: list[int]
    of: int


def choose(layers: Sequence[Layer], wanted: int | None, device: torch.device) -> Sample:
    """`wanted` evenly spaced blocks, by default as many as fit `PATIENCE` (`FEWEST` at least)."""
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    if wanted is None:
        total = WORK * sum(layer.cost for layer in layers) / _speed(device)
        affordable = int(len(blocks) * PATIENCE / max(total, 1e-9))
        wanted = min(len(blocks), max(FEWEST, affordable))
    chosen = spread(blocks, wanted)
    kept = [layer for layer in layers if layer.block is None or layer.block in chosen]
    return Sample(kept, chosen, len(blocks))


def spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of `items`, evenly spaced with the first and the last among them."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _speed(device: torch.device) -> float:
    """Multiply-adds per second of a decomposition on this machine, in `WORK`'s units."""
    probe = torch.randn(_PROBE, _PROBE, device=device, dtype=torch.float64)
    torch.linalg.svdvals(probe)
    # The fastest of three runs counts: other processes only slow a run down.
    return 3 * _PROBE**3 / min(_timed(probe) for _ in range(3))


def _timed(probe: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.linalg.svdvals(probe).sum().item()
    return time.perf_counter() - start
