"""Differential genes in scanpy's functions: what they return and draw is what the model says."""

import logging

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.model._differential_table import keep_ranked_genes

KEY = "rank_genes_groups"


@pytest.fixture(scope="module")
def ranked(model):
    """Table of all perturbations, and a copy of the data with what scanpy reads."""
    scvi.settings.seed = 0
    table = model.differential_expression(n_samples=500, key_added=KEY)
    adata = model.adata.copy()
    del model.adata.uns[KEY]
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    return table, adata


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_its_table_is_ours(model, ranked):
    table, adata = ranked
    found = sc.get.rank_genes_groups_df(adata, group=None)
    assert found["group"].unique().tolist() == model.perturbations
    for name, genes in found.groupby("group", observed=True):
        ours = table[table["group1"] == name]
        assert genes["names"].tolist() == ours.index.tolist()
        for theirs, column in (
            ("scores", "lfc_z"), ("logfoldchanges", "lfc_mean"),
            ("pvals", "proba_not_de"), ("pvals_adj", "adj_p_value"),
        ):  # fmt: skip
            np.testing.assert_allclose(genes[theirs], ours[column], rtol=1e-6)


def test_its_cutoff_calls_the_genes_that_we_call(model, ranked):
    table, adata = ranked
    for name in model.perturbations:
        # Rounding of means of probabilities apart.
        theirs = sc.get.rank_genes_groups_df(adata, group=name, pval_cutoff=0.05 + 1e-7)
        ours = table[(table["group1"] == name) & table["is_de_fdr_0.05"]]
        assert set(theirs["names"]) == set(ours.index)
    assert table["is_de_fdr_0.05"].any()


def test_adjusted_values_are_mean_errors_of_all_that_are_as_likely(ranked):
    """Worked out gene by gene."""
    table, _ = ranked
    for _, genes in table.groupby("group1"):
        errors = genes["proba_not_de"].to_numpy()
        expected = [errors[errors <= error].mean() for error in errors]
        np.testing.assert_allclose(genes["adj_p_value"], expected, atol=1e-12)
        assert (np.diff(genes["adj_p_value"]) >= -1e-12).all()


def test_its_figures_are_drawn_from_it(model, ranked):
    _, adata = ranked
    first = model.perturbations[0]
    panels = sc.pl.rank_genes_groups(adata, n_genes=7, sharey=False, show=False)
    assert len(panels) == len(model.perturbations)
    assert [panel.get_title() for panel in panels] == [
        f"{name} vs. control" for name in model.perturbations
    ]
    leading = sc.get.rank_genes_groups_df(adata, group=first)["names"].head(7).tolist()
    assert [text.get_text() for text in panels[0].texts] == leading
    sc.pl.rank_genes_groups_violin(adata, groups=first, n_genes=3, show=False)
    sc.pl.rank_genes_groups_heatmap(adata, n_genes=2, show=False, show_gene_labels=True)
    sc.pl.rank_genes_groups_matrixplot(adata, n_genes=2, show=False)
    axes = sc.pl.rank_genes_groups_dotplot(adata, groups=[first], n_genes=4, show=False)
    shown = [label.get_text() for label in axes["mainplot_ax"].get_xticklabels()]
    assert sorted(shown) == sorted(leading[:4])
    # Fold changes are of the groups: it wants a column with these only.
    single = adata[adata.obs["perturbation"].isin(model.perturbations)].copy()
    sc.pl.rank_genes_groups_dotplot(
        single, n_genes=2, values_to_plot="logfoldchanges", dendrogram=False, show=False
    )


def test_it_survives_a_file(ranked, tmp_path):
    _, adata = ranked
    adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad")
    pd.testing.assert_frame_equal(
        sc.get.rank_genes_groups_df(read, group=None),
        sc.get.rank_genes_groups_df(adata, group=None),
        check_dtype=False,
    )
    assert read.uns[KEY]["params"]["reference"] == "control"
    assert "posterior errors instead of p-values" in read.uns[KEY]["params"]["method"]


def test_groups_of_cells_have_their_own_reference(model):
    adata = model.adata.copy()
    adata.obs["cluster"] = np.where(adata.obs["perturbation"] == "P001", "one", "other")
    model.differential_expression(
        adata, groupby="cluster", group1="one", n_samples=50, key_added="of_clusters"
    )
    params = adata.uns["of_clusters"]["params"]
    assert (params["groupby"], params["reference"]) == ("cluster", "rest")
    found = sc.get.rank_genes_groups_df(adata, group="one", key="of_clusters")
    assert set(found["names"]) == set(adata.var_names)
    assert "of_clusters" not in model.adata.uns


def test_columns_of_pertpy(model):
    table = model.differential_expression(group1="P001+P002", n_samples=100)
    assert (table["variable"] == table.index).all()
    assert (table["log_fc"] == table["lfc_mean"]).all()
    assert table["adj_p_value"].between(0, 1).all()
    assert not table.index.duplicated().any()


def test_what_scanpy_could_not_read_raises(model):
    with pytest.raises(InvalidArgumentError, match="mode='change'"):
        model.differential_expression(groupby="perturbation", mode="vanilla", key_added=KEY)
    with pytest.raises(InvalidArgumentError, match="`groupby`"):
        model.differential_expression(idx1=[0, 1], key_added=KEY)
    with pytest.raises(InvalidArgumentError, match="`key_added`"):
        model.differential_expression(key_added=3)
    assert KEY not in model.adata.uns


@pytest.mark.parametrize(("n_groups", "fits"), [(950, True), (1000, False)])
def test_more_groups_than_a_file_holds_are_warned_of(model, tmp_path, caplog, n_groups, fits):
    names = np.repeat([f"PERT{number:04d}" for number in range(n_groups)], 2)
    columns = ("lfc_z", "log_fc", "proba_not_de", "adj_p_value")
    table = pd.DataFrame({"variable": ["a", "b"] * n_groups, "group1": names, "group2": "control"})
    table = table.assign(**dict.fromkeys(columns, 0.5))
    adata = ad.AnnData(np.ones((2, 2), np.float32))
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        keep_ranked_genes(model, adata, table, None, KEY)
    assert ("write_h5ad will fail" in caplog.text) is not fits
    if fits:
        adata.write_h5ad(tmp_path / "many.h5ad")
    else:
        with pytest.raises(ValueError, match="header message is too large"):
            adata.write_h5ad(tmp_path / "many.h5ad")
