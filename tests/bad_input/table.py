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
    "AnnData": data_cases.TABLE,
    "Batches, covariates and size factors": data_cases.COLUMNS,
    "Expression": expression_cases.CASES,
    "Model settings": argument_cases.SETTINGS,
    "Training": argument_cases.TRAIN,
    "Requested perturbations and doses": method_cases.UNKNOWN,
    "Number of samples and other numbers": method_cases.DRAWS,
    "Requested cells and genes": cell_cases.CELLS,
    "New data": cell_cases.OTHER_DATA,
    "Feature tables": feature_cases.TABLES,
    "Features passed to a model": feature_cases.OF_MODELS,
    "Feature files and matching of perturbations": feature_cases.FILES,
    "Saving and loading": file_cases.CASES,
}
PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
_INTRODUCTION = """# Input validation and errors

Invalid input raises an error before training that names the values and the fix. All errors are in
`scvi_sams.exceptions` and are subclasses of `SAMSError`, which is a `ValueError`. If only the type
is wrong, such as text instead of axes, Python's own error is raised. After an error the AnnData,
the files and the model are unchanged (if training diverges, the model has its last good weights).

Unusual but valid input is accepted, and the tables say what happens. Warnings are logged by the
logger `scvi.sams`.

Each row is a test (`tests/bad_input`), and this page is generated from the tests:
`PYTHONPATH=tests python -m bad_input.table`.
"""


def page() -> str:
    """Return the page, as it must be in the repository."""
    sections = [
        f"## {title}\n\n| input | what happens | named in the message |\n|---|---|---|\n"
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
