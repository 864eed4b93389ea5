"""The patch for mergekit in docs/upstream: without the start-up hook it makes the methods known."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mergekit
import pytest
import torch
import yaml
from helpers import merge, tensors_of

PATCH = Path(__file__).parents[2] / "docs" / "upstream" / "entry-points.patch"


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A copy of the installed mergekit with the patch applied."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(Path(mergekit.__file__).parent, folder / "mergekit")
    subprocess.run(["patch", "-p1", "-i", PATCH], cwd=folder, check=True, capture_output=True)
    return folder


def run(patched: Path, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(patched), "MERGEKIT_PAVE_AUTOLOAD": "0"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=patched)


@pytest.mark.slow
def test_its_own_test_passes(patched):
    done = run(patched, "-m", "pytest", "-q", "tests/test_method_plugins.py")
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tsv_m", "tsv_regmean", "pave_ties"])
def test_a_merge_without_the_hook_is_the_merge_with_it(patched, method, families, tmp_path):
    paths = families("llama")
    config = {"merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
              "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)]}
    if method != "tsv_m":
        config["parameters"] = {"calibration_dataset": "none"}
    if method == "pave_ties":
        config["parameters"] |= {"density": 0.5, "weight": 1.0}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    done = run(patched, "-c", "from mergekit.scripts.run_yaml import main; main()",
               tmp_path / "merge.yml", tmp_path / "out", "--random-seed", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    with_hook = merge(config, tmp_path / "with-hook")
    without = tensors_of(tmp_path / "out")
    assert all(torch.equal(without[name], tensor) for name, tensor in with_hook.items())
