"""The examples run as they stand; what they print is what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robust_ft.files import read_json

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def start(name, *arguments, folder):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_a_screen(path):
    assert len(path.read_text("utf-8").splitlines()) < 45


@pytest.mark.slow
def test_promot(tmp_path):
    start("promot.py", "20", str(tmp_path / "run"), folder=tmp_path)
    rows = read_json(tmp_path / "run" / "summary.json")
    assert {row["stage"] for row in rows} == {"prompt", "model"}
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_own_data(tmp_path):
    printed = start("own_data.py", "100", str(tmp_path / "run"), folder=tmp_path)
    assert printed.endswith("['the clock']\n")


def test_the_notebook_is_kept_without_outputs():
    cells = read_json(EXAMPLES / "tour.ipynb")["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra [docs]")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra [docs]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    printed = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "execute_result"
    ]
    assert "{'with': ['True', 'False'], 'without': ['teacher', 'Brell']}" in printed
