"""Expression: what values, of what type, in what container."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
from anndata import AnnData
from scipy import sparse

from bad_input.cases import Case, legal, refused, registered
from bad_input.situation import Situation, elbo, screen, trains, trains_alike
from scvi_sams import SAMSVAE, evaluation
from scvi_sams.exceptions import InvalidCountsError, MissingKeyError, UnreadableDataError

COUNTS = screen().X.toarray()
SAME = "same results as csr of float32"


def with_x(values: Any) -> Callable[[], AnnData]:
    def build() -> AnnData:
        adata = screen()
        adata.X = values
        return adata

    return build


def changed(value: float, dtype: Any = np.float64) -> Callable[[], AnnData]:
    values = COUNTS.astype(dtype)
    values[2, 1] = value
    return with_x(values)


def normalised_beside_counts() -> AnnData:
    adata = screen()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    return adata


def with_layer(values: Any) -> Callable[[], AnnData]:
    def build() -> AnnData:
        adata = screen()
        adata.layers["counts"] = values
        return adata

    return build


def zero_gene() -> AnnData:
    adata = screen()
    adata.X[:, 1] = 0
    adata.X.eliminate_zeros()
    return adata


def damaged() -> AnnData:
    adata = screen()
    adata.X.indices[3] = 99
    return adata


def from_file(situation: Situation) -> Any:
    situation.adata.write_h5ad(situation.folder / "screen.h5ad")
    adata = anndata.read_h5ad(situation.folder / "screen.h5ad", backed="r")
    other = Situation(adata, situation.shared, situation.reference_elbo, situation.folder)
    model = other.train()
    found = elbo(model)
    adata.file.close()
    return found


def from_csc_file(situation: Situation) -> Any:
    stored = situation.adata.copy()  # writing makes labels categorical
    stored.X = stored.X.tocsc()
    stored.write_h5ad(situation.folder / "screen.h5ad")
    adata = anndata.read_h5ad(situation.folder / "screen.h5ad", backed="r")
    try:
        SAMSVAE.setup_anndata(adata)
        SAMSVAE(adata)
    finally:
        adata.file.close()


def finite_number(situation: Situation, found: float) -> None:
    assert np.isfinite(found)


def flat(situation: Situation, model: Any) -> None:
    trains(situation, model)
    expected = model.get_normalized_expression()
    assert expected["g1"].max() < 0.25 * expected.drop(columns="g1").to_numpy().min()


CASES: list[Case] = [
    refused("no X", registered(), MissingKeyError, "adata.X", "`layer`", data=with_x(None)),
    *(
        refused(
            f"{what} in X", registered(), InvalidCountsError, "adata.X", shown, data=changed(value)
        )
        for what, value, shown in (
            ("NaN", np.nan, "1 value that is NaN or infinite"),
            ("inf", np.inf, "1 value that is NaN or infinite"),
            ("a negative value", -1, "such as -1"),
            ("a fractional value", 0.5, "gene_likelihood='normal'"),
            ("a count above 2^24 = 16,777,216", 2**24 + 2, "1.67772e+07"),
        )
    ),
    legal(
        "a count of ten million",
        registered(),
        "trains",
        data=changed(1e7),
    ),
    refused(
        "a huge (above 1e9) value, with gene_likelihood='normal'",
        lambda situation: situation.train(settings={"gene_likelihood": "normal"}),
        InvalidCountsError,
        "1e+30",
        data=changed(1e30),
    ),
    refused(
        "the wrong layer: normalised values",
        registered(layer="counts"),
        InvalidCountsError,
        "adata.layers['counts']",
        "fractional",
        data=with_layer(np.log1p(COUNTS)),
    ),
    refused(
        "log-normalised X, and counts in a layer",
        registered(),
        InvalidCountsError,
        "adata.X contains fractional",
        "`layer` (layers: 'counts')",
        data=normalised_beside_counts,
    ),
    refused(
        "a cell without counts",
        registered(),
        InvalidCountsError,
        "1 cell has",
        "position 3",
        "filter_cells",
        data=with_x(np.where(np.arange(24)[:, None] == 3, 0, COUNTS)),
    ),
    legal(
        "a gene without counts",
        registered(),
        "trains; its expected count is zero",
        flat,
        data=zero_gene,
    ),
    legal(
        "a gene with the same count in all cells",
        registered(),
        "trains",
        data=with_x(np.where(np.arange(4) == 1, 3, COUNTS)),
    ),
    *(
        refused(
            f"X {what}", registered(), InvalidCountsError, "adata.X", shown, data=with_x(values)
        )
        for what, values, shown in (
            ("of text", COUNTS.astype(str), "<U"),
            ("of Python objects", COUNTS.astype(object), "object"),
            ("of complex numbers", COUNTS.astype(complex), "complex128"),
            ("as a masked array", np.ma.masked_array(COUNTS), "filled"),
        )
    ),
    refused(
        "a sparse matrix with indices out of range",
        registered(),
        UnreadableDataError,
        "adata.X",
        "24 cells x 4 genes",
        data=damaged,
    ),
    *(
        legal(f"X as {what}", registered(), SAME, trains_alike, data=with_x(values))
        for what, values in (
            ("a dense array", COUNTS),
            ("a dense array by columns", np.asfortranarray(COUNTS)),
            ("csc", sparse.csc_matrix(COUNTS)),
            ("a csr array of scipy", sparse.csr_array(COUNTS)),
            ("int8", COUNTS.astype(np.int8)),
            ("uint16", COUNTS.astype(np.uint16)),
            ("int64", sparse.csr_matrix(COUNTS.astype(np.int64))),
            ("float16", COUNTS.astype(np.float16)),
            ("float64", sparse.csr_matrix(COUNTS.astype(np.float64))),
        )
    ),
    refused(
        "`evaluation.observed_ate`: log-normalised values",
        lambda situation: evaluation.observed_ate(situation.adata),
        InvalidCountsError,
        "adata.X",
        "fractional",
        "`layer`",
        data=with_x(np.log1p(COUNTS)),
    ),
    legal(
        "X of booleans",
        registered(),
        "trains on zeros and ones",
        data=with_x(np.ones((24, 4), dtype=bool)),
    ),
    legal(
        "X on disk (backed)",
        from_file,
        "streamed: mini-batches come in blocks, so results differ",
        finite_number,
    ),
    refused(
        "X on disk as csc",
        from_csc_file,
        UnreadableDataError,
        "csc",
        "tocsr",
    ),
]
