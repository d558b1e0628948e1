"""The notebook: its cells work, on the miniature; those for real weights have real options."""

import os
import re
import sys

import nbformat
import pytest
from conftest import RANDOM_CONFIG, ROOT
from nbclient import NotebookClient
from test_recipes import calls

from dopsd_jax.config import schema
from dopsd_jax.config.loading import load

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
NOT_HERE = "skip-execution"  # the tag of cells that need the network or real weights
# What is put in place of the cell of settings: as for `random_run`, so that little is compiled.
STEPS = "4"
SMALL = {
    "CONFIG": "zimage:random",
    "MODEL": "runs/dax/random_model",
    "STEPS": STEPS,
    "MORE": " ".join(o for o in RANDOM_CONFIG[1:] if not o.startswith("--config.steps")),
}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", ())


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_its_cells_work(notebook, tmp_path, monkeypatch):
    (settings,) = (cell for cell in notebook.cells if tagged(cell, "parameters"))
    assert set(re.findall(r'^    "(\w+)":', settings.source, flags=re.M)) == SMALL.keys()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    settings.source += f"\nos.environ |= {SMALL}"
    done = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [cell for cell in done.cells if cell.cell_type == "code" and cell.execution_count]
    assert len(shown) >= 6 and not any(tagged(cell, NOT_HERE) for cell in shown)
    pictures = [
        output for cell in shown for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3  # the grid, and two drawn with the LoRA
    assert (tmp_path / f"runs/dax/lora/step_{STEPS}.safetensors").is_file()


def test_what_it_says_for_real_weights_can_be_said(notebook):
    scripts = [cell.source for cell in notebook.cells if tagged(cell, NOT_HERE)]
    found = [call for script in scripts for call in calls(script)]
    assert [name for name, _ in found] == ["caption", "check", "train", "sample"]
    for _, arguments in found[1:3]:
        fields = dict(a[9:].split("=", 1) for a in arguments if a.startswith("--config."))
        schema.check(load(arguments[arguments.index("--config") + 1], fields), fields)
