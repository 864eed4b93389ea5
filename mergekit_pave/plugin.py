"""Making mergekit know the purified methods."""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType

from mergekit_pave import compat
from mergekit_pave.errors import PaveError

logger = logging.getLogger(__name__)

_ATTACHED = "_mergekit_pave_attached"


def register() -> tuple[str, ...]:
    """Do by hand what the start-up hook does: methods registered, merges checked first.

    Idempotent; methods registered by others since the last call are picked up.

    Returns:
        The names of all our methods: those that mergekit lacks, and all purified ones.

    Raises:
        PaveError: the installed mergekit is older than 0.1.5.
    """
    _require_mergekit()
    import mergekit.merge
    import mergekit.plan

    for module in (mergekit.plan, mergekit.merge):
        attach(module)
    return _register_methods()


def _register_methods() -> tuple[str, ...]:
    """Register our own methods, and `pave_<name>` for every one that requires a base model."""
    import mergekit.merge_methods as host

    from mergekit_pave import merging
    from mergekit_pave.method import PREFIX, PaveMerge, can_wrap

    known = {method.spec.name for method in host.registered_methods()}
    own = merging.methods(shared_statistics())
    for method in own:
        if method.spec.name not in known:
            host.register(method)
    for method in host.registered_methods():
        if can_wrap(method) and PREFIX + method.spec.name not in known:
            host.register(PaveMerge(method, shared_statistics()))
    names = {method.spec.name for method in own}
    return tuple(
        method.spec.name
        for method in host.registered_methods()
        if method.spec.name in names or isinstance(method, PaveMerge)
    )


@functools.cache
def shared_statistics():
    from mergekit_pave.statistics import Statistics

    return Statistics()


def _require_mergekit() -> None:
    from importlib.metadata import version

    found = version("mergekit")
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < (0, 1, 5):
        raise PaveError(
            f"mergekit-pave needs mergekit 0.1.5 or newer, found {found}: "
            "pip install --upgrade 'mergekit>=0.1.5'."
        )


def attach(module: ModuleType) -> None:
    """What the start-up hook calls when one of mergekit's modules has been imported.

    Raises:
        PaveError: the installed mergekit is older than 0.1.5.
    """
    _require_mergekit()
    if module.__name__ == "mergekit.merge_methods":
        _register_methods()
        return
    if getattr(module, _ATTACHED, False):
        return
    setattr(module, _ATTACHED, True)
    if module.__name__ == "mergekit.plan":
        compat.mend_optional_aliases(module)
    elif module.__name__ == "mergekit.merge":
        compat.mend_cards(sys.modules["mergekit.card"])
        _guard(module)


def _guard(module: ModuleType) -> None:
    """Check purified merges before `run_merge` downloads anything, and report afterwards.

    mergekit has no place for a method to see the whole configuration. The methods do not
    depend on this: without it the same mistakes are met later, or, for keys that mergekit
    drops, not at all.
    """
    original = _with_what_lies_beside(module.run_merge)

    @functools.wraps(original)
    def run_merge(merge_config, out_path, options, config_source=None):
        from mergekit import merge_methods

        from mergekit_pave import check, earlier, record
        from mergekit_pave.locate import LoaderOptions

        name = merge_config.merge_method
        if not check.is_ours(name) and not check.looks_like_ours(name):
            if warning := check.ignored(merge_config):
                logger.warning("%s", warning)
            return original(merge_config, out_path, options, config_source)
        loading = LoaderOptions(
            options.transformers_cache,
            options.lora_merge_cache,
            options.lora_merge_dtype,
            options.trust_remote_code,
        )
        allowed = check.Allowances(options.allow_crimes, options.unsafe_truncate_embeddings)
        earlier.refuse_inputs(out_path, merge_config.referenced_models())
        warnings = check.preflight(merge_config, config_source, loading, allowed)
        for warning in warnings:
            logger.warning("%s", warning)
        statistics = shared_statistics()
        statistics.reset()
        with earlier.replaced(out_path):
            result = original(merge_config, out_path, options, config_source)
        if options.write_model_card:
            record.write(out_path, record.of_merge(merge_config, statistics))
        # A method that looks at no covariance counts nothing.
        if any(statistics.counts.values()) and not options.quiet:
            treated = merge_methods.get(name).treated
            print(statistics.coverage(treated), file=sys.stderr)  # noqa: T201
        return result

    module.run_merge = run_merge


def _with_what_lies_beside(run_merge):
    """Take away what an earlier merge left beside its model; let this one write its task masks."""

    @functools.wraps(run_merge)
    def merge(merge_config, out_path, options, config_source=None):
        from mergekit_pave import earlier, task_masks

        beside = task_masks.beside(out_path, merge_config, options)
        with earlier.gives_way(out_path), beside:
            return run_merge(merge_config, out_path, options, config_source)

    return merge
