import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scvi_sams.datasets import fetch, norman19_subset
from scvi_sams.datasets._norman19 import _recover_counts
from scvi_sams.exceptions import DataIntegrityError


@pytest.fixture(scope="module")
def screen(data_dir):
    return norman19_subset()


def test_conditions(screen):
    cells = screen.obs["perturbation"].value_counts()
    pairs = cells[cells.index.str.contains("+", regex=False)]
    assert screen.shape == (3375, 500)
    assert cells["control"] == 100
    assert (len(cells), len(pairs), pairs.sum()) == (34, 15, 1480)
    assert cells[cells != 100].to_dict() == {"PLK4": 95, "FOXL2+HOXB9": 80}


def test_labels_are_sorted(screen):
    labels = screen.obs["perturbation"]
    assert labels.dtype == "category"
    assert all(label.split("+") == sorted(label.split("+")) for label in labels.cat.categories)
    raw = screen.obs["perturbation_raw"]
    assert set(labels[raw == "SET+KLF1"]) == {"KLF1+SET"}
    assert set(labels[raw == "KIAA1804"]) == {"MAP3K21"}


def test_five_pairs_have_both_singles(screen):
    labels = set(screen.obs["perturbation"])
    complete = {x for x in labels if "+" in x and set(x.split("+")) <= labels}
    assert complete == {
        "KLF1+MAP2K6",
        "KLF1+TGFBR2",
        "MAP2K3+MAP2K6",
        "MAP2K3+SLC38A2",
        "MAPK1+TGFBR2",
    }


def test_counts_give_back_the_published_values(screen):
    assert screen.X.dtype == np.float32
    assert screen.X.format == "csr"
    np.testing.assert_array_equal(screen.X.data, np.round(screen.X.data))
    assert screen.X.data.min() == 1
    published = anndata.read_h5ad(fetch("perturbench_devel.h5ad"))[screen.obs_names]
    assert published.var_names.equals(screen.var_names)
    total = screen.obs["total_counts"].to_numpy()[:, None]
    again = np.log1p(1e4 * screen.X.toarray().astype(np.float64) / total)
    np.testing.assert_allclose(again, published.X.toarray(), atol=1e-12)


def test_total_counts_are_the_whole_transcriptome(screen):
    total = screen.obs["total_counts"].to_numpy()
    np.testing.assert_array_equal(total, np.round(total))
    # The publisher also states the total before genes were filtered: a little more in every cell.
    published = anndata.read_h5ad(fetch("perturbench_devel.h5ad"))[screen.obs_names]
    share = total / published.obs["ncounts"].to_numpy()
    assert share.min() > 0.98
    assert share.max() < 1
    assert screen.X.sum() / total.sum() == pytest.approx(0.0107, abs=1e-4)


def test_source_is_stated(screen):
    assert "10.1126/science.aax4438" in screen.uns["source"]["citation"]
    assert screen.uns["source"]["licence"] == "BSD-3-Clause"


def test_h5ad_round_trip(screen, tmp_path):
    screen.write_h5ad(tmp_path / "norman.h5ad")
    back = anndata.read_h5ad(tmp_path / "norman.h5ad")
    assert (back.X != screen.X).nnz == 0
    assert back.obs["perturbation"].equals(screen.obs["perturbation"])


def test_recovery_of_cells_without_a_count_of_one():
    counts = np.array([[2, 3, 0], [4, 0, 6], [1, 0, 5], [3, 7, 0]], dtype=np.float64)
    total = np.array([1001.0, 503.0, 777.0, 1234.0])
    recovered, recovered_total = _recover_counts(
        csr_matrix(np.log1p(1e4 * counts / total[:, None]))
    )
    # The second cell's counts are all even; only its odd total tells 4 and 6 from 2 and 3.
    np.testing.assert_array_equal(recovered.toarray(), counts)
    np.testing.assert_array_equal(recovered_total, total)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 1.5], [0.5, 0.7]], "2 cells have values that are not counts"),
        ([[1.0, 2.0], [0.0, 0.0]], "1 cell has no value"),
        ([[1.0, -2.0], [1.0, 1.0]], "no negative ones"),
    ],
)
def test_other_values_are_refused(values, message):
    with pytest.raises(DataIntegrityError, match=message):
        _recover_counts(csr_matrix(np.array(values)))
