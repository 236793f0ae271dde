"""Doses in obs, dosage matrices in obsm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from bad_input.cases import Case, labelled, legal, refused, registered
from bad_input.situation import LABELS, Situation, screen, trains, trains_alike
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidDosageError,
    InvalidPerturbationLabelError,
    MissingControlError,
    MissingKeyError,
)

ONES = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]] * 6)


def dosed(dose: object) -> Callable[[], AnnData]:
    """The dose of every 'A' is this one."""
    return labelled(LABELS, dose=pd.Series([0, dose, 1, 1] * 6, dtype=object).to_numpy())


def with_matrix(matrix: Any) -> Callable[[], AnnData]:
    def build() -> AnnData:
        adata = screen(["x"] * 24)
        adata.obsm["doses"] = matrix
        return adata

    return build


def with_entry(value: float) -> np.ndarray:
    matrix = ONES.copy()
    matrix[1, 0] = value
    return matrix


def table(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns, index=[f"c{i}" for i in range(24)])


def matrix(names: Any = ("A", "B"), **setup: Any) -> Callable[[Situation], Any]:
    return registered(dosage_obsm_key="doses", perturbation_names=names, **setup)


def same_sizes_after(situation: Situation, model: Any) -> None:
    counts = model.module.cells_per_perturbation.tolist()
    assert counts == [6, 12]  # A is given in the combination only
    trains(situation, model)


by_column = registered(dosage_key="dose")
NOT_A_NUMBER = "is not a number"
COLUMN = [
    refused(
        "the column of doses does not exist",
        by_column,
        MissingKeyError,
        "'dose'",
        "'perturbation'",
    ),
    *(
        refused(f"{what} dose", by_column, InvalidDosageError, "'c1'", shown, data=dosed(dose))
        for what, dose, shown in (
            ("a negative", -1.0, "-1.0"),
            ("a NaN", np.nan, "nan"),
            ("a missing", None, "None"),
            ("an infinite", np.inf, "inf"),
            ("a huge (above 1e9)", 1e30, "1e+30"),
            ("an empty", "", NOT_A_NUMBER),
            ("a textual", "high", "'high'"),
            ("a complex", 1 + 2j, NOT_A_NUMBER),
            ("a date as", pd.Timestamp("2020-01-01"), "2020-01-01"),
        )
    ),
    refused(
        "lists as doses",
        by_column,
        InvalidDosageError,
        "[1]",
        data=dosed([1]),
    ),
    refused(
        "two doses for a label with one perturbation",
        by_column,
        InvalidDosageError,
        "'1+2'",
        "2 values for the 1 name of",
        data=dosed("1+2"),
    ),
    refused(
        "doses with another delimiter than labels",
        by_column,
        InvalidDosageError,
        "'1;2'",
        "'+'",
        data=dosed("1;2"),
    ),
    refused(
        "all doses are 0",
        by_column,
        InvalidPerturbationLabelError,
        "not all doses are 0",
        data=labelled(LABELS, dose=[0.0] * 24),
    ),
    legal(
        "dose 0 of a perturbation",
        by_column,
        "the perturbation counts as not given",
        same_sizes_after,
        data=labelled(LABELS, dose=["0", "0", "1", "1+1"] * 6),
    ),
    legal(
        "a dose above 100",
        by_column,
        "trains, with a warning",
        warns=("Doses are as large as 150", "logarithm"),
        data=dosed(150.0),
    ),
    legal(
        "doses of control cells",
        by_column,
        "ignored",
        trains_alike,
        data=labelled(LABELS, dose=["none", 1, 1, 1] * 6),
    ),
    legal(
        "doses that are all 1, as numbers, text or categories",
        by_column,
        "same results as without doses",
        trains_alike,
        data=labelled(LABELS, dose=pd.Categorical(["1", "1.0", "1", "1+1"] * 6)),
    ),
]

GIVEN = [
    refused(
        "the dosage matrix does not exist",
        matrix(),
        MissingKeyError,
        "'doses'",
    ),
    *(
        refused(
            f"a {what} entry in a dosage matrix",
            matrix(),
            InvalidDosageError,
            f"contains {shown}",
            data=with_matrix(with_entry(value)),
        )
        for what, value, shown in (
            ("negative", -1.0, "-1"),
            ("NaN", np.nan, "nan"),
            ("infinite", np.inf, "inf"),
            ("huge (above 1e9)", 1e39, "1e+39"),
        )
    ),
    refused(
        "fewer names than columns of a dosage matrix",
        matrix(["A"]),
        InvalidDosageError,
        "1 perturbation name was",
        "2 columns",
        data=with_matrix(ONES),
    ),
    refused(
        "a dosage matrix without names",
        matrix(None),
        InvalidDosageError,
        "`perturbation_names`",
        data=with_matrix(ONES),
    ),
    refused(
        "names in a key of uns that does not exist",
        matrix("guides"),
        MissingKeyError,
        "'guides'",
        data=with_matrix(ONES),
    ),
    refused(
        "names that are not a list",
        matrix(3),
        InvalidArgumentError,
        "`perturbation_names`",
        "3",
        data=with_matrix(ONES),
    ),
    refused(
        "two columns with the same name",
        matrix(["A", "A "]),
        InvalidDosageError,
        "'A'",
        data=with_matrix(ONES),
    ),
    *(
        refused(
            f"{what} column name",
            matrix(["A", name]),
            InvalidPerturbationLabelError,
            shown,
            "Rename",
            data=with_matrix(ONES),
        )
        for what, name, shown in (
            ("a NaN", np.nan, "nan"),
            ("an empty", "", "''"),
            ("the delimiter in a", "B+C", "'B+C'"),
        )
    ),
    refused(
        "names that are not the columns of a table",
        matrix(["C", "D"]),
        InvalidDosageError,
        "'C', 'D'",
        "'A', 'B'",
        data=with_matrix(table(A=ONES[:, 0], B=ONES[:, 1])),
    ),
    refused(
        "names without a dosage matrix",
        registered(perturbation_names=["A", "B"]),
        InvalidArgumentError,
        "`perturbation_names`",
        "`dosage_obsm_key`",
    ),
    refused(
        "a dosage matrix without control rows",
        matrix(),
        MissingControlError,
        "adata.obsm['doses']",
        "row of zeros",
        data=with_matrix(ONES + 1),
    ),
    refused(
        "a dosage matrix of zeros",
        matrix(),
        InvalidPerturbationLabelError,
        "Every cell is a control cell",
        data=with_matrix(0 * ONES),
    ),
    refused(
        "a dosage matrix of three dimensions",
        matrix(),
        InvalidDosageError,
        "3 dimensions",
        data=with_matrix(ONES[:, :, None]),
    ),
    refused(
        "complex numbers in a dosage matrix",
        matrix(),
        InvalidDosageError,
        "complex128",
        data=with_matrix(ONES + 0j),
    ),
    refused(
        "text in a dosage table",
        matrix(None),
        InvalidDosageError,
        "'high'",
        data=with_matrix(table(A=["high"] * 24)),
    ),
    refused(
        "dates in a dosage table",
        matrix(None),
        InvalidDosageError,
        "datetime64",
        data=with_matrix(table(A=pd.to_datetime(range(24)))),
    ),
    refused(
        "a dosage matrix and a column of doses",
        matrix(dosage_key="dose"),
        InvalidDosageError,
        "'dose'",
        "'doses'",
        data=with_matrix(ONES),
    ),
    *(
        legal(
            f"a dosage matrix as {what}",
            matrix(names),
            "same results as with labels",
            trains_alike,
            data=with_matrix(values),
        )
        for what, names, values in (
            ("floats", ("A", "B"), ONES),
            ("booleans", ("A", "B"), ONES > 0),
            ("csr", ("A", "B"), sparse.csr_matrix(ONES)),
            ("csc", ("A", "B"), sparse.csc_matrix(ONES)),
            ("a table of numbers in text", None, table(A=ONES[:, 0], B=ONES[:, 1]).astype(str)),
        )
    ),
]
CASES: list[Case] = [*COLUMN, *GIVEN]
