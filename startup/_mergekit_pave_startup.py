"""Lets the stock `mergekit-yaml` see mergekit-pave's merge methods.

Runs at every interpreter start of the environment, so it imports nothing (`os` and `sys`
are loaded already): it leaves one finder that waits until somebody imports mergekit.
`MERGEKIT_PAVE_AUTOLOAD=0` switches it off; `mergekit_pave.register()` is the explicit way.
"""

import os
import sys

_HOSTS = ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge")


class _Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in _HOSTS:
            return None
        for finder in sys.meta_path:
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _run_after(spec.loader)
                return spec
        return None


def _run_after(loader):
    """Call `mergekit_pave.plugin.attach(module)` once the loader has run its module."""
    original = loader.exec_module

    def exec_module(module):
        # Restored first: a loader object may be shared between modules.
        try:
            del loader.exec_module
        except AttributeError:
            pass
        original(module)
        try:
            from mergekit_pave.plugin import attach

            attach(module)
        except Exception as error:  # a fault of ours must not take mergekit down
            import warnings

            warnings.warn(
                f"mergekit-pave could not attach itself to mergekit: {error}", stacklevel=2
            )

    try:
        loader.exec_module = exec_module
    except AttributeError:
        pass


def install():
    """Put the finder first on `sys.meta_path`, once (`.pth` lines run twice in a venv)."""
    if os.environ.get("MERGEKIT_PAVE_AUTOLOAD", "1") == "0":
        return
    if not any(getattr(f, "__module__", None) == __name__ for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder)
