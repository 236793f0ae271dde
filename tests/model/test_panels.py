"""Total counts that were forgotten: a warning of panels that are registered without a size."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen


def panel(**columns):
    """21 cells with 10, 11, ... 30 counts: their median is 20."""
    counts = np.full((21, 4), 2.0, dtype=np.float32)
    counts[:, 0] += np.arange(21) + 2
    obs = pd.DataFrame({"perturbation": ["control", "A", "B"] * 7, **columns})
    obs.index = [f"c{i}" for i in range(21)]
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs)
    adata.layers["normalised"] = adata.X * 0.5 + 0.1 * (adata.X > 0)
    return adata


def warned(caplog, adata, **arguments):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        SAMSVAE.setup_anndata(adata, **arguments)
    return [text for text in caplog.messages if "panel" in text]


@pytest.fixture(autouse=True)
def log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("scvi"), "propagate", True)


def test_ten_times_the_counts_of_the_genes_are_those_of_a_panel(caplog):
    totals = 200.0 + np.arange(-10, 11)
    (message,) = warned(caplog, panel(nCount_RNA=totals))
    for words in ("adata.obs['nCount_RNA'] is 200,", "4 genes about 20.", "key='nCount_RNA'"):
        assert words in message
    assert not warned(caplog, panel(nCount_RNA=totals - 1))
    assert not warned(caplog, panel(nCount_RNA=totals), size_factor_key="nCount_RNA")


@pytest.mark.parametrize(
    "name", ["total_counts", "n_counts", "NCOUNT_RNA", "n_umi", "nUMI", "UMI_count"]
)
def test_usual_names_of_total_counts_in_any_case(caplog, name):
    assert f"size_factor_key={name!r}" in warned(caplog, panel(**{name: [1000] * 21}))[0]


def test_the_column_that_is_too_large_is_named_once(caplog):
    adata = panel(n_counts=[20] * 21, total_counts=[400] * 21, nUMI=[500] * 21)
    (message,) = warned(caplog, adata)
    assert "adata.obs['total_counts'] is 400," in message


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"library": [1000] * 21},
        {"total_counts": ["1000"] * 21},
        {"total_counts": pd.Categorical([1000] * 21)},
        {"total_counts": [True] * 21},
        {"total_counts": [np.nan] * 21},
    ],
    ids=["none", "another name", "text", "categories", "booleans", "NaN"],
)
def test_without_numbers_of_that_name_nothing_is_said(caplog, columns):
    assert not warned(caplog, panel(**columns))


def test_values_that_are_not_counts_are_for_the_normal_likelihood(caplog):
    adata = panel(total_counts=[1000] * 21)
    assert not warned(caplog, adata, layer="normalised")
    adata.X.data[0] = np.nan
    assert not warned(caplog, adata)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_screen_on_disk_is_read_too(caplog, tmp_path, suffix):
    path = tmp_path / f"screen.{suffix}"
    getattr(panel(total_counts=[500] * 21), f"write_{suffix}")(path)
    assert "genes about 20." in warned(caplog, open_screen(path))[0]
