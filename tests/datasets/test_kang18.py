import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from scvi_sams.datasets import fetch, kang18_subset
from scvi_sams.exceptions import DataIntegrityError, SAMSError

FILE = "kang18_subset.h5ad"


@pytest.fixture(scope="module")
def file(converted_file):
    return converted_file(FILE)


@pytest.fixture(scope="module")
def screen(file):
    return kang18_subset()


@pytest.fixture(scope="module")
def changes(screen):
    """Difference of means of log2(1 + 1e4 * share), and q-values, by cell type."""
    counts = screen.X.toarray().astype(np.float64)
    values = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))
    cell_types = screen.obs["cell_type"]
    is_treated = (screen.obs["perturbation"] == "interferon beta").to_numpy()
    tables = {}
    for cell_type in cell_types.cat.categories:
        own = (cell_types == cell_type).to_numpy()
        treated, control = values[own & is_treated], values[own & ~is_treated]
        p = ttest_ind(treated, control, equal_var=False).pvalue
        tables[cell_type] = pd.DataFrame(
            {
                "change": treated.mean(axis=0) - control.mean(axis=0),
                "q": false_discovery_control(np.nan_to_num(p, nan=1.0)),
            },
            index=screen.var_names,
        )
    return tables


def test_cells(screen):
    assert screen.shape == (1556, 1267)
    table = pd.crosstab(screen.obs["cell_type"], screen.obs["perturbation"])
    assert table.to_dict() == {
        "control": {
            "B cells": 144,
            "CD14+ Monocytes": 200,
            "CD4 T cells": 200,
            "CD8 T cells": 94,
            "FCGR3A+ Monocytes": 112,
        },
        "interferon beta": {
            "B cells": 154,
            "CD14+ Monocytes": 200,
            "CD4 T cells": 200,
            "CD8 T cells": 115,
            "FCGR3A+ Monocytes": 137,
        },
    }
    assert not screen.obs_names.duplicated().any()
    assert not screen.obs.isna().any(axis=None)


def test_names_say_the_same_as_the_published_ones(screen):
    obs = screen.obs.astype(str)
    assert (obs["cell_type"] == obs["cluster_id"]).all()
    treated = obs["perturbation"] == "interferon beta"
    assert (treated == (obs["group_id"] == "stim")).all()
    assert (obs["group_id"] + obs["donor"] == obs["sample_id"]).all()
    assert obs["donor"].value_counts().to_dict() == {"101": 954, "107": 602}


def test_counts_are_those_of_the_file(screen, file):
    assert screen.X.dtype == np.float32
    assert screen.X.format == "csr"
    np.testing.assert_array_equal(screen.X.data, np.round(screen.X.data))
    published = anndata.read_h5ad(file)
    assert (published.X != screen.X).nnz == 0
    assert published.var_names.equals(screen.var_names)
    sums = np.asarray(screen.X.sum(axis=1)).ravel()
    assert (sums.min(), np.median(sums), sums.max()) == (371, 1127, 5738)


@pytest.mark.parametrize(
    ("cell_type", "n_changed", "cxcl10"),
    [
        ("B cells", 272, 3.94),
        ("CD14+ Monocytes", 830, 6.97),
        ("CD4 T cells", 180, 1.09),
        ("CD8 T cells", 105, 0.81),
        ("FCGR3A+ Monocytes", 546, 6.13),
    ],
)
def test_cell_types_respond_differently(changes, cell_type, n_changed, cxcl10):
    table = changes[cell_type]
    assert (table["q"] < 0.05).sum() == pytest.approx(n_changed, abs=1)
    assert table.loc["CXCL10", "change"] == pytest.approx(cxcl10, abs=0.01)
    assert (table.loc[["ISG15", "IFI6", "ISG20", "IFIT1"], "change"] > 3).all()
    in_monocytes = "Monocytes" in cell_type
    assert (table.loc[["CCL8", "IL1RN"], "change"] > 1).all() == in_monocytes
    assert (table.loc["IL8", "change"] < -1) == in_monocytes


def test_source_and_round_trip(screen, tmp_path):
    screen.write_h5ad(tmp_path / "kang.h5ad")
    back = anndata.read_h5ad(tmp_path / "kang.h5ad")
    assert (back.X != screen.X).nnz == 0
    assert "10.1038/nbt.4042" in back.uns["source"]["citation"]
    assert back.uns["source"]["url"].endswith("/data/example_sce.rda")


def test_a_missing_file_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SCVI_SAMS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataIntegrityError) as error:
        kang18_subset()
    message = str(error.value)
    assert f"{tmp_path / FILE} is missing" in message
    assert "HelenaLC/muscat/017b290b414212c357e184d17edcca27f4302ace" in message
    assert "f66811fa513a01a91dae01bad308e96ed5238277246b911d8e1cd5f4425c3ed9" in message
    assert "writeH5AD" in message
    assert "SCVI_SAMS_DATA_DIR" in message
    with pytest.raises(SAMSError, match=r"No published file 'kang18_subset\.h5ad'"):
        fetch(FILE)


def converted(file, folder, monkeypatch, change):
    """Put the file into a cache folder of its own, written anew after a change."""
    adata = anndata.read_h5ad(file)
    change(adata).write_h5ad(folder / FILE)
    monkeypatch.setenv("SCVI_SAMS_DATA_DIR", str(folder))
    return kang18_subset()


def test_who_converts_it_and_how_does_not_matter(screen, file, tmp_path, monkeypatch):
    def otherwise(adata):
        adata = adata[::-1].copy()
        adata.X = adata.X.toarray().astype(np.float64)
        adata.obs = adata.obs.astype(str)
        return adata

    again = converted(file, tmp_path, monkeypatch, otherwise)
    np.testing.assert_array_equal(again.X.toarray(), screen.X.toarray()[::-1])
    assert again.obs["donor"].tolist() == screen.obs["donor"].tolist()[::-1]


def with_one_more(adata):
    adata.X.data[7] += 1
    return adata


def without_groups(adata):
    del adata.obs["group_id"]
    return adata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_one_more, "does not contain the published counts"),
        (lambda adata: adata[1:].copy(), "does not contain the published counts"),
        (without_groups, r"has no obs\['group_id'\]"),
    ],
)
def test_other_counts_are_refused(file, tmp_path, monkeypatch, change, message):
    with pytest.raises(DataIntegrityError, match=message) as error:
        converted(file, tmp_path, monkeypatch, change)
    assert "writeH5AD" in str(error.value)
