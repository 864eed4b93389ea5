"""A plan for mergekit from the names in a checkpoint, where its own definition does not fit.

mergekit's definitions list the tensors of an architecture in its usual form. They miss the biases
of a Llama with `attention_bias`, the experts of layers that only some checkpoints have, and names
of other versions. The checkpoint's own names are complete by definition, and transformers loads
the merge by them as it loads the base.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from mergekit.architecture.base import (
    ModelArchitecture,
    ModuleDefinition,
    WeightInfo,
)
from mergekit.architecture.json_definitions import (
    JsonLayerTemplates,
    JsonModuleArchDef,
    JsonModuleArchitecture,
)
from transformers import PretrainedConfig

from mergekit_pave.models.renaming import ClassNames

# The first number in a name is the layer's.
_NUMBER = re.compile(r"\.(\d+)\.")
_INDEX = ".${layer_index}."


def by_names(
    names: Collection[str],
    others: Sequence[Collection[str]],
    own: ClassNames | None,
    config: PretrainedConfig,
    definition: ModelArchitecture | None,
) -> ModelArchitecture:
    """One module for each stack of layers, and `default` for what stands outside of them.

    Args:
        names: of the base's tensors; each becomes one of the merge.
        others: those of the fine-tunes; what one of them lacks is optional.
        own: the base's class, which knows what is tied and what is indexed by tokens.
        config: the base's.
        definition: mergekit's own, for what it knows beside the names.
    """
    everywhere = set(names).intersection(*others)
    known = {w.name: w for w in definition.all_weights(config)} if definition else {}
    tied = _tied(names, own)

    def info(name: str, template: str, optional: bool) -> WeightInfo:
        axis = known[name].vocabulary_axis if name in known else None
        if axis is None and own is not None:
            axis = own.vocabulary.get(own.one(name) or "")
        return WeightInfo(
            name=template, vocabulary_axis=axis, optional=optional,
            tied_names=tied.get(name) if name == template else None,
            force_dtype=known[name].force_dtype if name in known else None)

    last = {w.name for module in (definition.modules.values() if definition else ())
            for w in module.architecture.post_weights(config)}
    stacks: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    loose = []
    for name in names:
        if number := _NUMBER.search(name):
            template = _NUMBER.sub(lambda _: _INDEX, name, count=1)
            stacks[name[: number.start()]][template].append(name)
        else:
            loose.append(info(name, name, name not in everywhere))
    modules, one = {}, len(stacks) == 1
    for prefix, templates in stacks.items():
        layers = 1 + max(int(_NUMBER.findall(n)[0]) for found in templates.values() for n in found)
        weights = [
            info(found[0], template, len(found) < layers or not everywhere.issuperset(found))
            for template, found in templates.items()
        ]
        modules["default" if one else prefix] = _module(
            loose if one else [], weights, layers, last,
            _layers_key(definition, config) if one else None)
    if not one:
        modules["default"] = _module(loose, [], 0, last, None)
    return ModelArchitecture(
        modules=modules, architectures=[], model_type="",
        tagalong_files=definition.tagalong_files if definition else None,
        vocab_size_config_key=definition.vocab_size_config_key if definition else None,
    )


def _module(
    loose: list[WeightInfo], weights: list[WeightInfo], layers: int, last: Collection[str],
    key: str | None,
) -> ModuleDefinition:
    return ModuleDefinition(architecture=JsonModuleArchitecture(definition=JsonModuleArchDef(
        model_type="", architectures=[],
        pre_weights=[w for w in loose if w.name not in last],
        post_weights=[w for w in loose if w.name in last],
        layer_templates=JsonLayerTemplates(weights=weights),
        num_layers_config_key=key, override_num_layers=layers)))


def _layers_key(definition: ModelArchitecture | None, config: PretrainedConfig) -> str | None:
    """Where the config says how many layers there are; slices change it."""
    if definition and len(definition.modules) == 1:
        return next(iter(definition.modules.values())).architecture.num_layers_config_key()
    return "num_hidden_layers" if hasattr(config, "num_hidden_layers") else None


def _tied(names: Collection[str], own: ClassNames | None) -> Mapping[str, tuple[str, ...]]:
    """Names that may stand for each other, since a checkpoint may leave out one of a tied pair."""
    if own is None:
        return {}
    stored = {own.one(name): name for name in names}
    pairs = [(stored.get(a), stored.get(b)) for a, b in own.tied.items()]
    return {a: (b,) for a, b in pairs if a and b} | {b: (a,) for a, b in pairs if a and b}
