"""How our code reaches into mergekit: whatever is imported first, whatever mergekit passes on."""

from __future__ import annotations

import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from tqdm import tqdm

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


CPU = torch.device("cpu")
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


class _Number(Task[int]):
    value: int

    def arguments(self):
        return {}

    def execute(self, **_):
        return self.value


def test_a_slow_terminal_loses_no_result_of_several_workers(monkeypatch):
    """mergekit's own code but for the GPU: four workers, and a bar that takes its time."""

    def worker(self, task_list, cached_values, device, quiet):
        own = Executor(task_list, math_device=CPU, storage_device=CPU)
        for handle, result in own._run(quiet=True):
            self.task_completion_queue.put((handle._index, result))

    monkeypatch.setattr(MultiGPUExecutor, "_device_worker", worker)
    monkeypatch.setattr("mergekit.multigpu_executor.get_torch_accelerator_type", lambda: "cuda")
    monkeypatch.setattr(tqdm, "update", lambda *_: time.sleep(0.01))
    targets = [_Number(value=i) for i in range(40)]
    found = {result for _, result in MultiGPUExecutor(targets, num_gpus=4).run(quiet=True)}
    assert found == set(range(40))
