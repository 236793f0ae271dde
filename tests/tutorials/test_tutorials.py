"""The code of every tutorial runs, with few epochs; its outputs are stored in the notebook."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_cells(name):
    cells = json.loads((FOLDER / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


# Fewer epochs, cells and draws.
SMALLER = {
    r"max_epochs=\d+, ?": "",
    r"(\w+)\.train\(": r"\1.train(max_epochs=2, ",
    r"ModelMethod\(\s*model_class,": "ModelMethod(model_class, train_kwargs={'max_epochs': 2}, "
    "n_samples=100, n_posterior_samples=2,",
    r"n_iwelbo_samples=\d+": "n_iwelbo_samples=1",
    r"papalexi21\(\)": "papalexi21()[::5].copy()",
    r"n_jobs=\d+": "n_jobs=1",
    r"n_controls=\d+": "n_controls=200",
    r"cells_per_(perturbation|combination)=\d+": r"cells_per_\1=20",
    r"n_genes=\d+": "n_genes=50",
    r"N_CALLS = \d+": "N_CALLS = 2",
}


# Responses begin, and features tell, when effects have formed, which two epochs are too short for.
N_EPOCHS = {"responses.ipynb": 20, "unmeasured.ipynb": 40}

# Data that cannot be downloaded, as they are converted in R.
CONVERTED = {"contexts.ipynb": "kang18_subset.h5ad"}


def short(source, n_epochs=2):
    """The same code on a smaller scale."""
    for pattern, replacement in SMALLER.items():
        source = re.sub(pattern, replacement, source)
    return source.replace("max_epochs=2,", f"max_epochs={n_epochs},")


def test_there_are_tutorials():
    assert set(NOTEBOOKS) == {
        "quickstart.ipynb",
        "combinations.ipynb",
        "contexts.ipynb",
        "evaluation.ipynb",
        "extending.ipynb",
        "large_data.ipynb",
        "responses.ipynb",
        "unmeasured.ipynb",
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_tutorial_runs(name, data_dir, converted_file, tmp_path, monkeypatch):
    if name in CONVERTED:
        converted_file(CONVERTED[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names = {"__name__": "tutorial"}
    for cell in code_cells(name):
        source = short("".join(cell["source"]), N_EPOCHS.get(name, 2))
        exec(compile(source, name, "exec"), names)
    if "model" in names:
        assert names["model"].is_trained
    else:
        assert (names["result"].runs["status"] == "ok").all()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_and_are_no_errors(name):
    outputs = [output for cell in code_cells(name) for output in cell["outputs"]]
    assert any(output["output_type"] in ("display_data", "execute_result") for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
