"""The notebooks run from top to bottom."""

from __future__ import annotations

import json

import pytest
from helpers.data import ROOT

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs(path, tmp_path):
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1500, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error"]
    saved = nbformat.read(path, as_version=4)
    empty = [c.id for c in saved.cells if c.cell_type == "code" and c.execution_count is None]
    assert not empty, f"saved without outputs: {empty}"


def test_notebooks_are_small_and_name_no_machine():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 400_000
        folders = ("/home/", "/tmp/", "/root/", "/work/", "site-packages")
        assert not [folder for folder in folders if folder in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_study_of_one_model(path):
    """One path changes the model, and the end says what was learnt."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert code[0] == 'MODEL = CALIBRATION = TEST = "demo"'
    assert "Study(" in "".join(code[1:]) and "demo" not in "".join(code[1:])
    assert "".join(cells[-1]["source"]).startswith("## What was learnt")
