"""The built wheel in an environment of its own: the stock commands know the methods.

The environment borrows the packages of the one that runs the tests, by a path entry: a plain
entry runs no start-up files, so all that makes mergekit know the methods comes from the wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers import CLASSES, write_images

ROOT = Path(__file__).parents[2]
MERGEKIT_YAML = "from mergekit.scripts.run_yaml import main; main()"
# The same for several merges, one after the other: a start of the process costs seconds.
MERGES = (
    "import json, sys; from mergekit.scripts.run_yaml import main\n"
    "for arguments in json.loads(sys.argv[1]): main(arguments, standalone_mode=False)\n")
ASK = "import mergekit.merge_methods as m; print(m.get('pave_ties').spec.name)"
MERGEKIT_MULTI = "from mergekit.scripts.multimerge import main; main()"


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        # Not the repository: `python -c` would import the source instead of the wheel.
        [str(part) for part in command], capture_output=True, text=True, env=env, timeout=600,
        cwd=Path(sys.executable).parent)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
                "-w", out, ROOT)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with nothing but the wheel installed in it."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps",
                    "--no-index", "-q", wheel)
    assert installed.returncode == 0, installed.stderr
    site = next(home.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def config(tmp_path: Path, paths: dict, data: list[Path], **parameters) -> Path:
    models = []
    for i in range(2):
        own = {"weight": 1.0, "density": 0.5, "calibration_dataset": str(data[i % len(data)])}
        models.append({"model": str(paths[f"expert{i}"]), "parameters": own})
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump({
        "merge_method": "pave_ties", "base_model": str(paths["base"]), "models": models,
        "parameters": {"rank_ratio": 0.9, **parameters}, "dtype": "float32"}))
    return path


def test_the_wheel_carries_the_startup_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mergekit_pave.pth", "mergekit_pave.start", "_mergekit_pave_startup.py"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "examples", "startup"))]


def test_the_environment_runs_the_wheel_and_not_the_source(python):
    shown = run(python, "-c", "import mergekit_pave; print(mergekit_pave.__file__)").stdout
    assert str(python.parent.parent) in shown


KINDS = ["llama", "roberta", "deberta", "bert", "vit", "gpt2"]


@pytest.fixture(scope="module")
def merged(python, families, texts, tmp_path_factory) -> Path:
    """A folder with a merge of every kind, made by the stock command in the environment."""
    folder, images = tmp_path_factory.mktemp("merged"), tmp_path_factory.mktemp("images")
    arguments = []
    for kind in KINDS:
        (folder / kind).mkdir()
        data = [write_images(images / kind)] if kind == "vit" else texts
        path = config(folder / kind, families(kind), data)
        arguments.append([str(path), str(folder / kind / "out")])
    done = run(python, "-c", MERGES, json.dumps(arguments),
               MERGEKIT_PAVE_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("tensors purified") == len(KINDS)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_command_merges_and_transformers_loads(merged, kind):
    out = merged / kind / "out"
    model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
        out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (out / "README.md").read_text().count("arxiv.org/abs/2510.14697") == 1


def test_the_hook_costs_no_import_and_can_be_switched_off(python, families, texts, tmp_path):
    heavy = "('torch', 'mergekit', 'mergekit_pave', 'click')"
    code = f"import sys; print([n for n in {heavy} if n in sys.modules])"
    assert run(python, "-c", code).stdout.strip() == "[]"
    loud = run(python, "-c", "import mergekit_pave, sys; " + code)
    assert "torch" not in loud.stdout, "the package itself is lazy"
    finders = run(python, "-c", "import sys; print(sys.meta_path)").stdout
    assert finders.count("_mergekit_pave_startup") == 1
    path = config(tmp_path, families("llama"), texts)
    off = run(python, "-c", MERGEKIT_YAML, path, tmp_path / "out", MERGEKIT_PAVE_AUTOLOAD="0")
    assert off.returncode != 0 and "Unimplemented merge method pave_ties" in off.stderr


def test_methods_are_there_however_mergekit_is_reached(python):
    twice = "import mergekit_pave; mergekit_pave.register(); mergekit_pave.register(); "
    for first in ("", "import mergekit.merge; ", twice):
        done = run(python, "-W", "error::UserWarning", "-c", first + ASK)
        assert done.stdout.strip() == "pave_ties", first
    done = run(python, "-c", twice + ASK, MERGEKIT_PAVE_AUTOLOAD="0")
    assert done.stdout.strip() == "pave_ties"


def test_a_fault_of_ours_is_one_warning_and_mergekit_lives(python):
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    plugin = site / "mergekit_pave" / "plugin" / "__init__.py"
    content = plugin.read_text()
    plugin.write_text("raise RuntimeError('broken on purpose')\n")
    try:
        done = run(python, "-c", ASK.replace("pave_ties", "ties"))
    finally:
        plugin.write_text(content)
    assert done.stdout.strip() == "ties"
    assert done.stderr.count("could not attach itself to mergekit: broken on purpose") == 1


def test_multimerge_knows_the_methods(python, families, texts, tmp_path):
    first = yaml.safe_load(config(tmp_path, families("llama"), texts).read_text())
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump({**first, "name": "only"}))
    done = run(python, "-c", MERGEKIT_MULTI, path, "--out-path", tmp_path / "out",
               "-I", tmp_path / "steps")
    assert done.returncode == 0, done.stderr[-2000:]
    found = list((tmp_path / "steps" / "only").glob("model*.safetensors"))
    assert found or list((tmp_path / "out").glob("model*.safetensors"))


def test_an_editable_install_knows_them_too(tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    site = next(home.glob("lib/python*/site-packages"))
    # Needed already for the build: pip runs the back end in the environment it installs into.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps",
               "--no-index", "--no-build-isolation", "-q", "-e", ROOT)
    assert done.returncode == 0, done.stderr
    assert run(interpreter, "-c", ASK).stdout.strip() == "pave_ties"
