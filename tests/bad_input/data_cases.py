"""The AnnData itself, batches, covariates and size factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

from bad_input.cases import Case, labelled, legal, refused, registered
from bad_input.situation import LABELS, Situation, elbo, screen
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidCovariateError,
    MissingKeyError,
    RegistrationError,
)

COUNTS = screen().X.toarray()


def renamed(axis: str) -> Callable[[], AnnData]:
    def build() -> AnnData:
        adata = screen()
        names = getattr(adata, axis).to_numpy().copy()
        names[1] = names[0]
        setattr(adata, axis, names)
        return adata

    return build


def in_first_cell(value: object, rest: object = 10.0) -> Callable[[], AnnData]:
    return labelled(LABELS, column=pd.Series([value] + [rest] * 23, dtype=object).to_numpy())


def keeps_names(situation: Situation, model: Any) -> None:
    # The random numbers of a cell go by its name; the weights are the same whatever the names.
    assert elbo(model, screen()) == pytest.approx(situation.reference_elbo, rel=1e-5)
    table = model.get_normalized_expression()
    assert list(table.index) == list(situation.adata.obs_names)


by_covariate = registered(continuous_covariate_keys=["column"])
by_size = registered(size_factor_key="column")
by_batch = registered(batch_key="column")

TABLE: list[Case] = [
    *(
        refused(
            f"{what} instead of an AnnData",
            lambda situation, other=other: SAMSVAE.setup_anndata(other),
            RegistrationError,
            "`adata` must be an AnnData",
            type(other).__name__,
        )
        for what, other in (
            ("None", None),
            ("a path", "screen.h5ad"),
            ("a matrix", COUNTS),
            ("a table", screen().obs),
        )
    ),
    refused(
        "a MuData instead of an AnnData",
        lambda situation: SAMSVAE.setup_anndata(
            MuData({"guides": screen(), "rna": screen(n_genes=3)})
        ),
        RegistrationError,
        "MuData of ['guides', 'rna']",
        "adata.mod['rna']",
    ),
    refused(
        "no cells",
        registered(),
        RegistrationError,
        "0 cells and 4 genes",
        data=lambda: screen()[:0].copy(),
    ),
    refused(
        "no genes",
        registered(),
        RegistrationError,
        "24 cells and 0 genes",
        data=lambda: screen()[:, :0].copy(),
    ),
    legal("one gene", registered(), "trains", data=lambda: screen(n_genes=1)),
    refused(
        "two genes with the same name",
        registered(),
        RegistrationError,
        "'g0'",
        "var_names_make_unique",
        data=renamed("var_names"),
    ),
    legal(
        "two cells with the same name",
        registered(),
        "same results, in the order of cells",
        keeps_names,
        data=renamed("obs_names"),
    ),
    refused(
        "a view",
        registered(),
        RegistrationError,
        "view",
        "adata.copy()",
        data=lambda: screen()[:12],
    ),
    refused(
        "the layer does not exist",
        registered(layer="counts"),
        MissingKeyError,
        "'counts'",
    ),
    refused(
        "a list as layer",
        registered(layer=["counts"]),
        InvalidArgumentError,
        "`layer`",
        "['counts']",
    ),
]

COLUMNS: list[Case] = [
    refused(
        "the batch column does not exist",
        registered(batch_key="lane"),
        MissingKeyError,
        "'lane'",
        "'perturbation'",
    ),
    refused(
        "a list as batch column",
        registered(batch_key=["perturbation"]),
        InvalidArgumentError,
        "`batch_key`",
    ),
    refused(
        "a batch is missing",
        by_batch,
        InvalidCovariateError,
        "'c0'",
        "`batch_key`",
        data=in_first_cell(np.nan, "x"),
    ),
    refused(
        "batches are numbers and text",
        by_batch,
        InvalidCovariateError,
        "'column'",
        "astype(str)",
        data=in_first_cell(3, "x"),
    ),
    legal("one batch only", by_batch, "trains", data=in_first_cell("x", "x")),
    legal(
        "a batch column equal to the perturbations",
        registered(batch_key="perturbation"),
        "trains (batch and perturbation are confounded)",
    ),
    refused(
        "a categorical covariate does not exist",
        registered(categorical_covariate_keys=["donor"]),
        MissingKeyError,
        "'donor'",
    ),
    refused(
        "a categorical covariate twice",
        registered(categorical_covariate_keys=["perturbation", "perturbation"]),
        InvalidArgumentError,
        "twice",
        "'perturbation'",
    ),
    refused(
        "covariates that are not column names",
        registered(categorical_covariate_keys=3),
        InvalidArgumentError,
        "`categorical_covariate_keys`",
        "3",
    ),
    refused(
        "a continuous covariate of text",
        registered(continuous_covariate_keys=["perturbation"]),
        InvalidCovariateError,
        "'control'",
        "'c0'",
    ),
    *(
        refused(
            f"{what} value of a continuous covariate",
            by_covariate,
            InvalidCovariateError,
            "'column'",
            "'c0'",
            data=in_first_cell(value),
        )
        for what, value in (
            ("a missing", None),
            ("a NaN", np.nan),
            ("an infinite", np.inf),
            ("a huge (above 1e9)", 1e30),
        )
    ),
    refused(
        "the column of size factors does not exist",
        registered(size_factor_key="size"),
        MissingKeyError,
        "'size'",
    ),
    legal(
        "no size factor, but a column of total counts ten times those of the genes",
        registered(),
        "trains, with a warning (a gene panel)",
        warns=("seem to be a panel", "size_factor_key='nCount_RNA'"),
        data=labelled(LABELS, nCount_RNA=[1000] * 24),
    ),
    refused(
        "a size factor of text",
        by_size,
        InvalidCovariateError,
        "'big'",
        "'c0'",
        data=in_first_cell("big"),
    ),
    *(
        refused(
            f"{what} size factor", by_size, error, "'column'", "'c0'", data=in_first_cell(value)
        )
        for what, value, error in (
            ("a zero", 0.0, InvalidCountsError),
            ("a negative", -1.0, InvalidCountsError),
            ("a NaN", np.nan, InvalidCountsError),
            ("an infinite", np.inf, InvalidCountsError),
            ("a huge (above 1e9)", 1e39, InvalidCovariateError),
            ("a tiny (below 1e-9)", 1e-30, InvalidCovariateError),
        )
    ),
]
