"""Making mergekit know the purified methods."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from mergekit_pave.errors import PaveError

# The start-up hook imports this module while mergekit is half imported. Whatever imports mergekit
# itself is therefore imported inside the functions.
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
    # Not `import mergekit.merge`: that may be running, and then its package does not have it yet.
    for name in ("mergekit.plan", "mergekit.merge"):
        attach(importlib.import_module(name))
    return _register_methods()


def _register_methods() -> tuple[str, ...]:
    """Register our own methods, and `pave_<name>` for every one that requires a base model."""
    import mergekit.merge_methods as host

    from mergekit_pave import methods as merging
    from mergekit_pave.methods.pave import PaveMerge, can_wrap
    from mergekit_pave.recipe.parameters import PREFIX

    known = {method.spec.name for method in host.registered_methods()}
    own = merging.methods()
    for method in own:
        if method.spec.name not in known:
            host.register(method)
    for method in host.registered_methods():
        if can_wrap(method) and PREFIX + method.spec.name not in known:
            host.register(PaveMerge(method))
    names = {method.spec.name for method in own}
    return tuple(
        method.spec.name
        for method in host.registered_methods()
        if method.spec.name in names or getattr(method, "purifies", False)
    )


def _require_mergekit() -> None:
    from importlib.metadata import version

    from packaging.version import Version

    found = version("mergekit")
    # Only the numbers count: 0.1.5.dev3 and 0.1.5+g1a2b3c have what 0.1.5 has.
    if Version(found).release < (0, 1, 5):
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
    from mergekit_pave.plugin import mends, run_merge

    if module.__name__ == "mergekit.plan":
        mends.mend_optional_aliases(module)
    elif module.__name__ == "mergekit.merge":
        mends.mend_cards(sys.modules["mergekit.card"])
        mends.mend_dtype(module)
        mends.mend_lone_entries(importlib.import_module("mergekit.sparsify"))
        mends.mend_merged_copies(sys.modules["mergekit.common"])
        mends.mend_lost_results(module.MultiGPUExecutor)
        run_merge.attach(module)
        # It has imported this module as its second step, and reads a configuration later on.
        if script := sys.modules.get("mergekit.scripts.run_yaml"):
            run_merge.read_clearly(script)
