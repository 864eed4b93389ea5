"""How our code reaches into mergekit: whatever is imported first, whatever mergekit passes on."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_pave.plugin import run_merge


@pytest.mark.parametrize("first", [
    "mergekit_pave.methods.pave", "mergekit_pave.methods.base", "mergekit_pave.recipe.inputs",
    "mergekit_pave.plugin.run_merge"])
def test_all_methods_are_there_whatever_is_imported_first(first):
    code = (
        f"import warnings; warnings.simplefilter('error', UserWarning); import {first}\n"
        "import mergekit.merge_methods as host\n"
        "print(sum(m.spec.name.startswith('pave_') for m in host.registered_methods()))\n")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout.splitlines()[-1]) > 10


def _host(function) -> ModuleType:
    module = ModuleType("mergekit.merge")
    module.run_merge = function
    module.MergePlanner = type("MergePlanner", (), {"__init__": lambda self, *args: None})
    run_merge.attach(module)
    return module


STOCK = MergeConfiguration.model_validate({
    "merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1.0}}]})


def test_arguments_that_a_later_mergekit_has_more_are_passed_on(tmp_path):
    seen = {}

    def later(merge_config, out_path, options, config_source=None, *, extra=None, **more):
        seen.update(config=merge_config, out=out_path, extra=extra, more=more)
        return "done"

    options = MergeOptions(quiet=True)
    done = _host(later).run_merge(STOCK, str(tmp_path / "out"), options, extra=1, again=2)
    assert done == "done" and seen["config"] is STOCK and seen["out"] == str(tmp_path / "out")
    assert seen["extra"] == 1 and seen["more"] == {"again": 2}


def test_a_mergekit_that_names_its_arguments_otherwise_runs_without_ours(tmp_path):
    calls = []
    module = _host(lambda recipe, folder: calls.append((recipe, folder)))
    module.run_merge(STOCK, folder=tmp_path)
    assert calls == [(STOCK, tmp_path)]
