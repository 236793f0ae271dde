import warnings

import anndata
import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from scvi_sams.datasets import papalexi21


@pytest.fixture(scope="module")
def screen(data_dir):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Missing constructor")  # of an R class
        return papalexi21()


def expression(screen, library_size):
    """Return log2(1 + 1e4 * count / library size), cells x genes."""
    return np.log2(1 + 1e4 * screen.X.toarray() / np.asarray(library_size).reshape(-1, 1))


def mean_change(screen, values, gene, perturbation):
    column = values[:, screen.var_names.get_loc(gene)]
    labels = screen.obs["perturbation"].to_numpy()
    return column[labels == perturbation].mean() - column[labels == "control"].mean()


def test_cells(screen):
    cells = screen.obs["perturbation"].value_counts()
    knock_outs = cells.drop("control")
    assert screen.shape == (19619, 299)
    assert cells["control"] == 2292
    assert len(knock_outs) == 25
    assert (knock_outs.min(), knock_outs.median(), knock_outs.max()) == (47, 640, 1197)
    assert (knock_outs["SPI1"], knock_outs["MYC"]) == (47, 102)
    assert screen.obs["replicate"].nunique() == 3
    assert not screen.obs_names.duplicated().any()
    assert not screen.obs.isna().any(axis=None)


def test_guides_match_their_targets(screen):
    targets = screen.obs["guide"].astype(str).str.replace(r"g\d+$", "", regex=True)
    # Two targets are spelled otherwise in guide names: NT is non-targeting, PDL1 is CD274.
    targets = targets.replace({"NT": "control", "PDL1": "CD274"})
    np.testing.assert_array_equal(targets, screen.obs["perturbation"].astype(str))


def test_counts(screen):
    assert screen.X.dtype == np.float32
    assert screen.X.format == "csr"
    np.testing.assert_array_equal(screen.X.data, np.round(screen.X.data))
    in_panel = np.asarray(screen.X.sum(axis=1)).ravel()
    total = screen.obs["total_counts"].to_numpy()
    assert (in_panel <= total).all()
    assert in_panel.sum() / total.sum() == pytest.approx(0.0156, abs=1e-4)
    # Cells of the count file and of the covariate file are matched by position only: a shift
    # by one cell would destroy this correlation.
    assert np.corrcoef(np.log(in_panel + 1), np.log(total))[0, 1] > 0.8
    assert abs(np.corrcoef(np.log(in_panel[1:] + 1), np.log(total[:-1]))[0, 1]) < 0.4


def test_interferon_knock_outs_lower_stat1(screen):
    by_total = expression(screen, screen.obs["total_counts"])
    by_panel = expression(screen, screen.X.sum(axis=1))
    assert mean_change(screen, by_total, "STAT1", "IFNGR2") == pytest.approx(-1.18, abs=0.01)
    assert mean_change(screen, by_total, "PSMB9", "IFNGR2") == pytest.approx(-1.35, abs=0.01)
    assert mean_change(screen, by_panel, "STAT1", "IFNGR2") == pytest.approx(-1.83, abs=0.01)
    assert mean_change(screen, by_panel, "PSMB9", "IFNGR2") == pytest.approx(-2.13, abs=0.01)
    assert abs(mean_change(screen, by_total, "STAT1", "ATF2")) < 0.1


@pytest.mark.parametrize(
    ("perturbation", "n_changed"),
    [("IFNGR1", 104), ("STAT1", 86), ("SMAD4", 83), ("CUL3", 41), ("ATF2", 0), ("ETV7", 0)],
)
def test_number_of_changed_genes(screen, perturbation, n_changed):
    values = expression(screen, screen.obs["total_counts"])
    labels = screen.obs["perturbation"].to_numpy()
    p = ttest_ind(values[labels == perturbation], values[labels == "control"], equal_var=False)
    changed = false_discovery_control(np.nan_to_num(p.pvalue, nan=1.0)) < 0.05
    assert changed.sum() == pytest.approx(n_changed, abs=1)


def test_source_and_round_trip(screen, tmp_path):
    screen.write_h5ad(tmp_path / "papalexi.h5ad")
    back = anndata.read_h5ad(tmp_path / "papalexi.h5ad")
    assert (back.X != screen.X).nnz == 0
    assert "10.1038/s41588-021-00778-2" in back.uns["source"]["citation"]
    assert back.uns["source"]["licence"] == "MIT"
