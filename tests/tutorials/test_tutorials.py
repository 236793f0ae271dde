"""The code of every tutorial runs, with few epochs; its outputs are stored in the notebook."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_cells(name):
    cells = json.loads((FOLDER / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def short(source):
    """The same code with two epochs of each training."""
    return re.sub(r"model\.train\(", "model.train(max_epochs=2, ", source)


def test_there_are_tutorials():
    assert {"quickstart.ipynb", "combinations.ipynb", "extending.ipynb"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_tutorial_runs(name, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names = {"__name__": "tutorial"}
    for cell in code_cells(name):
        exec(compile(short("".join(cell["source"])), name, "exec"), names)
    assert names["model"].is_trained


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_and_are_no_errors(name):
    outputs = [output for cell in code_cells(name) for output in cell["outputs"]]
    assert any(output["output_type"] in ("display_data", "execute_result") for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
