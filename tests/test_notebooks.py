"""The notebooks run where no model is installed, and were saved with what they show."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_CELLS, MOST_LINES = 12, 10

# As Jupyter does it: all cells in one namespace, in the notebook's own folder.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin), 1):
    exec(compile(source, f"code cell {number}", "exec"), names)
"""


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_without_a_model(path, tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "MODEL"}
    variables |= {"MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path)}
    variables |= {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([source(cell) for cell in code_cells(path)]),
        env=variables,
        cwd=FOLDER,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert ": False" not in done.stdout, "a cell that compares found a difference"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_was_saved_with_what_it_shows(path):
    for cell in code_cells(path):
        assert cell["outputs"], source(cell)
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    text = path.read_text(encoding="utf-8")
    pictures = re.compile(r'"image/png": "[^"]*"')  # base64 has slashes of its own
    assert not re.search(r"/(tmp|work|root|home)/", pictures.sub("", text))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_few_and_short(path):
    cells = [source(cell) for cell in code_cells(path)]
    assert len(cells) <= MOST_CELLS
    for cell in cells:
        assert len(cell.splitlines()) <= MOST_LINES, cell
        names = {type(node) for node in ast.walk(ast.parse(cell))}
        assert not names & {ast.FunctionDef, ast.ClassDef}, "what deserves a name goes elsewhere"
