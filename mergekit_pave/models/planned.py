"""What of a checkpoint mergekit would merge, where it plans by the names of a class."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import PretrainedConfig

from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import empty_model, linear_layers, model_class
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.storage.identity import same_layer


def refuse_partial(
    models: Iterable[Hashable], base: Hashable | None, options: LoaderOptions
) -> None:
    """Refuse checkpoints that mergekit would cut down.

    Where it has no definition of an architecture it takes the tensor names of the base's class in
    today's transformers and skips, without a word, those that a checkpoint calls otherwise.

    Raises:
        PaveError: linear layers of a model would be missing from the merge.
    """
    trust = options.trust_remote_code
    named = dict.fromkeys(model for model in models if isinstance(model, ModelReference))
    configs = {model: model.config(trust_remote_code=trust) for model in named}
    if all(arch_info_for_config(config) is not None for config in configs.values()):
        return
    for model, config in configs.items():
        there = LoaderCache().get(model).index.tensor_paths
        missing = [name for name in _layers(config, trust) if name not in there]
        if missing:
            raise PaveError(
                f"mergekit would leave {len(missing)} weights of {model} out of the merge "
                f"(such as {missing[0]}): its checkpoint has the names of an older "
                "transformers; load the model and save it again with "
                "save_pretrained(DIR, save_original_format=False)."
            )
        if base in configs and (fault := named_otherwise(model, config, configs[base], trust)):
            raise PaveError(fault)


def _layers(config: PretrainedConfig, trust_remote_code: bool) -> list[str]:
    """The weights of linear layers that a merge of such a model would treat."""
    return list(linear_layers(empty_model(config, trust_remote_code)).modules)


def named_otherwise(
    model: ModelReference, config: PretrainedConfig, base: PretrainedConfig,
    trust_remote_code: bool,
) -> str | None:
    """What to say of a model whose class has layers of the base's class under other names.

    Only for architectures that mergekit has no definition of.
    """
    if config.architectures == base.architectures:
        return None
    own, theirs = (_layers(c, trust_remote_code) for c in (config, base))
    # One that only the base has, as a pooler, is merged as mergekit merges it.
    missing = [name for name in theirs
               if name not in own and any(same_layer(name, other) for other in own)]
    if not missing:
        return None
    name, of_base = model_class(config).__name__, model_class(base).__name__
    return (
        f"mergekit would leave {len(missing)} weights of {model} out of the merge: what the base, "
        f"a {of_base}, calls {missing[0]} has another name in a {name}; load the base with "
        f"{name}.from_pretrained and save it again with save_pretrained(DIR, "
        "save_original_format=False)."
    )
