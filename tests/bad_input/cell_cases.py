"""What a trained model is asked for about cells, and other data that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
from anndata import AnnData

from bad_input.cases import Case, legal, refused
from bad_input.method_cases import READ_CELLS, SCORE, asked, no_rows, wrong
from bad_input.situation import Situation, elbo, full_screen
from scvi_sams import SAMSVAE
from scvi_sams.counts._validation import validate_expression
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidCovariateError,
    InvalidDosageError,
    MissingKeyError,
    RegistrationError,
    UnknownPerturbationError,
)

CELLS: list[Case] = [
    *(
        wrong(method, "batch_size", value, "at least 1")
        for method in READ_CELLS
        for value in (0, 2.5)
    ),
    *(
        refused(
            f"`{method}`: a position out of range",
            asked(method, indices=[99]),
            InvalidArgumentError,
            "`indices`",
            "99",
            "24 cells",
        )
        for method in READ_CELLS
    ),
    refused(
        "fractional positions",
        asked("get_elbo", indices=[0.5]),
        InvalidArgumentError,
        "`indices`",
        "0.5",
    ),
    refused(
        "names of cells as positions",
        asked("get_elbo", indices=["c1"]),
        InvalidArgumentError,
        "'c1'",
        "get_indexer",
    ),
    refused(
        "a mask with another length",
        asked("get_elbo", indices=[True, False]),
        InvalidArgumentError,
        "2 booleans for 24 cells",
    ),
    refused(
        "one position, not in a list",
        asked("get_elbo", indices=3),
        InvalidArgumentError,
        "`indices`",
    ),
    *(
        refused(
            f"`{method}`: no cells",
            asked(method, indices=[]),
            InvalidArgumentError,
            "There are no cells to score",
        )
        for method in SCORE
    ),
    legal(
        "`get_latent_representation`: no cells",
        asked("get_latent_representation", indices=[], key_added=None),
        "an empty array",
        no_rows,
    ),
    refused(
        "`differential_expression`: a position out of range",
        asked("differential_expression", idx1=[99]),
        InvalidArgumentError,
        "`idx1`",
        "99",
    ),
    *(
        refused(
            f"genes unknown to the model ({what})",
            asked("get_normalized_expression", gene_list=genes),
            error,
            shown,
        )
        for what, genes, error, shown in (
            ("a list", ["g0", "STAT1"], MissingKeyError, "['STAT1']"),
            ("one name", "STAT1", MissingKeyError, "['STAT1']"),
            ("a number", 3, InvalidArgumentError, "`gene_list`"),
        )
    ),
    refused(
        "a batch unknown to the model",
        asked("get_normalized_expression", transform_batch="z"),
        MissingKeyError,
        "'z'",
        "'x', 'y'",
    ),
]


def scored(situation: Situation) -> Any:
    return elbo(situation.shared, situation.adata)


def other(change: Callable[[AnnData], Any]) -> Callable[[], AnnData]:
    def build() -> AnnData:
        adata = full_screen()
        changed = change(adata)
        return adata if changed is None else changed

    return build


def column(name: str, value: Any) -> Callable[[], AnnData]:
    def change(adata: AnnData) -> None:
        adata.obs[name] = [value, *adata.obs[name].iloc[1:]]

    return other(change)


def as_trained(situation: Situation, found: float) -> None:
    np.testing.assert_allclose(found, elbo(situation.shared), rtol=1e-5)


def finite(situation: Situation, found: float) -> None:
    assert np.isfinite(found)


def of_file(act: Callable[[Situation, AnnData], Any]) -> Callable[[Situation], Any]:
    """Act on the data in a file that anndata keeps open."""

    def opened(situation: Situation) -> Any:
        path = situation.folder / "screen.h5ad"
        full_screen().write_h5ad(path)
        backed = anndata.read_h5ad(path, backed="r")
        try:
            return act(situation, backed)
        finally:
            backed.file.close()

    return opened


def scored_view(situation: Situation, backed: AnnData) -> float:
    return elbo(situation.shared, backed[:12])


def as_half(situation: Situation, found: float) -> None:
    np.testing.assert_allclose(found, elbo(situation.shared, full_screen()[:12].copy()), rtol=1e-5)


class Lazy:
    """Stands for arrays that are computed later, such as those of dask."""

    shape = (24, 4)
    dtype = np.dtype("float32")


OTHER_DATA: list[Case] = [
    refused(
        "new data that are not an AnnData",
        asked("get_elbo", "screen.h5ad"),
        RegistrationError,
        "`adata` must be an AnnData",
        "str",
    ),
    refused(
        "genes are missing",
        scored,
        MissingKeyError,
        "1 are missing",
        "'g3'",
        data=other(lambda adata: adata[:, :3].copy()),
    ),
    refused(
        "a gene has another name",
        scored,
        MissingKeyError,
        "1 are missing",
        "'g0'",
        data=other(lambda adata: setattr(adata, "var_names", ["X", "g1", "g2", "g3"])),
    ),
    refused(
        "genes are in another order",
        scored,
        MissingKeyError,
        "their order differs",
        "adata[:, model.adata.var_names].copy()",
        data=other(lambda adata: adata[:, ::-1].copy()),
    ),
    refused(
        "the label column is missing",
        scored,
        MissingKeyError,
        "'perturbation'",
        data=other(lambda adata: adata.obs.pop("perturbation") is None or None),
    ),
    refused(
        "a perturbation unknown to the model",
        scored,
        UnknownPerturbationError,
        "'Q'",
        "'A', 'B'",
        data=column("perturbation", "Q"),
    ),
    refused(
        "a batch unknown to the model",
        scored,
        InvalidCovariateError,
        "'z'",
        "'x', 'y'",
        data=column("batch", "z"),
    ),
    refused(
        "a category unknown to the model",
        scored,
        InvalidCovariateError,
        "'z'",
        "'p', 'q', 'r'",
        data=column("donor", "z"),
    ),
    refused(
        "a missing category",
        scored,
        InvalidCovariateError,
        "'c0'",
        "`categorical_covariate_keys`",
        data=column("donor", None),
    ),
    refused(
        "a negative dose",
        scored,
        InvalidDosageError,
        "-1",
        data=other(lambda adata: adata.obs.__setitem__("dose", [0.0, -1.0] * 12)),
    ),
    refused(
        "a size factor of zero",
        scored,
        InvalidCountsError,
        "'size'",
        data=column("size", 0.0),
    ),
    refused(
        "fractional counts",
        scored,
        InvalidCountsError,
        "adata.X",
        data=other(lambda adata: setattr(adata, "X", adata.X / 2)),
    ),
    legal(
        "a view of the same cells",
        scored,
        "copied; same results",
        as_trained,
        data=other(lambda adata: adata[:]),
    ),
    legal(
        "a view of a backed file",
        of_file(scored_view),
        "read into memory; same results",
        as_half,
    ),
    refused(
        "registering a view of a backed file",
        of_file(lambda situation, backed: SAMSVAE.setup_anndata(backed[:12])),
        RegistrationError,
        "adata.to_memory()",
    ),
    refused(
        "cells without labels",
        scored,
        MissingKeyError,
        "'perturbation'",
        "adata.obs['perturbation'] = 'control'",
        data=other(lambda adata: adata.obs.drop(columns="perturbation", inplace=True)),
    ),
    refused(
        "control cells with another label",
        scored,
        UnknownPerturbationError,
        "'DMSO'",
        "adata.obs['perturbation'].astype(str).replace('DMSO', 'control')",
        data=column("perturbation", "DMSO"),
    ),
    legal(
        "no control cells",
        scored,
        "scored",
        finite,
        data=other(lambda adata: adata[adata.obs["perturbation"] == "A"].copy()),
    ),
    refused(
        "a lazy (dask) matrix",
        lambda situation: validate_expression(Lazy(), counts=True, location="adata.X"),
        InvalidCountsError,
        "Lazy",
        "to_memory",
    ),
]
