"""Writes docs/bad_input.md from the rows: ``PYTHONPATH=tests python -m bad_input.table``."""

from __future__ import annotations

from pathlib import Path

from bad_input import (
    argument_cases,
    cell_cases,
    context_cases,
    data_cases,
    dose_cases,
    expression_cases,
    feature_cases,
    file_cases,
    guide_cases,
    label_cases,
    method_cases,
)
from bad_input.cases import Case

SECTIONS: dict[str, list[Case]] = {
    "Labels and control": label_cases.CASES,
    "Doses in a column": dose_cases.COLUMN,
    "Dosage matrices": dose_cases.GIVEN,
    "Guides": guide_cases.CASES,
    "Contexts": context_cases.CASES,
    "The AnnData": data_cases.TABLE,
    "Batches, covariates and size factors": data_cases.COLUMNS,
    "Expression": expression_cases.CASES,
    "Settings of models": argument_cases.SETTINGS,
    "Training": argument_cases.TRAIN,
    "Perturbations and doses that are asked for": method_cases.UNKNOWN,
    "Draws and other numbers": method_cases.DRAWS,
    "Cells and genes that are asked for": cell_cases.CELLS,
    "Other data": cell_cases.OTHER_DATA,
    "Tables of features": feature_cases.TABLES,
    "Features that a model is given": feature_cases.OF_MODELS,
    "Files of features, and their perturbations": feature_cases.FILES,
    "Saving and loading": file_cases.CASES,
}
PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
_INTRODUCTION = """# Bad input, and what comes of it

What is wrong is refused before training, with an error that names the offending values and what to
do. All errors are of `scvi_sams.exceptions` and subclasses of `SAMSError`, which is a `ValueError`.
Where only the type is wrong, such as text in place of axes, Python's own error says so.
After an error the AnnData, the files and the model are as they were (where training diverges the
model has its last good weights). Unusual but legal input is said to be so, and what happens is
told; warnings are logged by the logger `scvi.sams`.

Each row is a test (`tests/bad_input`), from which this page is written:
`PYTHONPATH=tests python -m bad_input.table`.
"""


def page() -> str:
    """Return the page, as it must be in the repository."""
    sections = [
        f"## {title}\n\n| Input | What happens | Named in the message |\n|---|---|---|\n"
        + "".join(map(_row, cases))
        for title, cases in SECTIONS.items()
    ]
    return "\n".join([_INTRODUCTION, *sections])


def _row(case: Case) -> str:
    outcome = f"`{case.error.__name__}`" if case.error else case.result
    named = ", ".join(f"`` {part} ``" if "`" in part else f"`{part}`" for part in case.names)
    cells = [case.what, outcome, named]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
