"""Distances between cells: by hand, brute force, and scPerturb and pertpy if installed."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist, pdist

from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics import _distances
from scvi_sams.metrics._distances import energy_distance, median_bandwidth, mmd, principal_axes


def two_samples(n=30, m=40, n_genes=5, shift=0.5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, n_genes)), rng.normal(size=(m, n_genes)) + shift


def test_squared_energy_distance_by_hand():
    # Between {0, 2} and {3, 7}: squares 9, 49, 1, 25, mean 21. Within: 4 and 16.
    x, y = np.array([[0.0], [2]]), np.array([[3.0], [7]])
    assert energy_distance(x, y) == pytest.approx(2 * 21 - 4 - 16)
    # Each cell beside itself halves what is within.
    assert energy_distance(x, y, unbiased=False) == pytest.approx(2 * 21 - 2 - 8)


def test_energy_distance_by_hand():
    # Distances 3, 7, 1, 5, mean 4. Within: 2 and 4.
    x, y = np.array([[0.0], [2]]), np.array([[3.0], [7]])
    assert energy_distance(x, y, metric="euclidean") == pytest.approx(2 * 4 - 2 - 4)


def test_mmd_by_hand():
    x, y = np.array([[0.0], [2]]), np.array([[3.0], [7]])

    def kernel(distance, width):
        return np.exp(-(distance**2) / (2 * width**2))

    expected = {
        width: kernel(2, width)
        + kernel(4, width)
        - 2 * np.mean([kernel(d, width) for d in (3, 7, 1, 5)])
        for width in (1.0, 4.0)
    }
    assert mmd(x, y, bandwidth=4) == pytest.approx(expected[4])
    assert mmd(x, y, bandwidth=[1, 4]) == pytest.approx((expected[1] + expected[4]) / 2)
    # The median distance of the observed cells is their only one.
    assert mmd(x, y) == pytest.approx(expected[4])


def test_squared_energy_distance_sees_only_means():
    # Twice the squared distance of the means, less its bias: the variances over the numbers.
    x, y = two_samples()
    shift = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    bias = x.var(axis=0, ddof=1).sum() / len(x) + y.var(axis=0, ddof=1).sum() / len(y)
    assert energy_distance(x, y) == pytest.approx(2 * shift - 2 * bias)
    # Spread out about the same mean: only the others see it.
    wide = x.mean(axis=0) + 3 * (x - x.mean(axis=0))
    assert energy_distance(x, wide) < 0
    assert energy_distance(x, wide, metric="euclidean") > 0.5
    assert mmd(x, wide) > 0.03


@pytest.mark.parametrize("to_matrix", [np.asarray, sparse.csr_array, np.float32])
def test_chunks_give_what_all_pairs_give(to_matrix, monkeypatch):
    monkeypatch.setattr(_distances, "_MEGABYTES_AT_ONCE", 1e-3)  # a few rows at a time
    x, y = two_samples()
    matrices = to_matrix(x), to_matrix(y)
    precision = {"rel": 1e-5} if to_matrix is np.float32 else {"rel": 1e-9}
    for metric in ("sqeuclidean", "euclidean"):
        brute = 2 * cdist(x, y, metric).mean() - pdist(x, metric).mean() - pdist(y, metric).mean()
        assert energy_distance(*matrices, metric=metric) == pytest.approx(brute, **precision)

    def kernel(distances):
        return np.exp(-(distances**2) / 8)

    brute = kernel(pdist(x)).mean() + kernel(pdist(y)).mean() - 2 * kernel(cdist(x, y)).mean()
    assert mmd(*matrices, bandwidth=2) == pytest.approx(brute, **precision)
    assert median_bandwidth(matrices[0]) == pytest.approx(np.median(pdist(x)), **precision)


@pytest.mark.parametrize(
    "distance", [energy_distance, lambda x, y: energy_distance(x, y, metric="euclidean"), mmd]
)
def test_distances_do_not_depend_on_the_order_of_cells_or_genes(distance):
    x, y = two_samples()
    rng = np.random.default_rng(1)
    genes = rng.permutation(5)
    shuffled = distance(rng.permutation(x)[:, genes], rng.permutation(y)[:, genes])
    assert shuffled == pytest.approx(distance(x, y))
    # Halves of one sample are nearer than another sample; the estimate has no bias.
    assert distance(x[::2], x[1::2]) < distance(x, y + 1)


def test_a_sample_is_at_distance_zero_from_itself():
    x, _ = two_samples()
    for metric in ("sqeuclidean", "euclidean"):
        assert energy_distance(x, x, metric=metric, unbiased=False) == pytest.approx(0, abs=1e-8)
    assert mmd(x, x, unbiased=False) == pytest.approx(0, abs=1e-12)


def test_one_cell_has_no_unbiased_distance():
    x, y = two_samples()
    assert np.isnan(energy_distance(x[:1], y))
    assert np.isnan(mmd(x[:1], y))
    assert energy_distance(x[:1], y, unbiased=False) > 0


def test_a_large_sample_gives_its_bandwidth_by_a_seeded_subset():
    x = np.random.default_rng(0).normal(size=(600, 3))
    subset = median_bandwidth(x, max_cells=200)
    assert subset == median_bandwidth(x, max_cells=200)
    assert subset != median_bandwidth(x, max_cells=200, seed=1)
    assert subset == pytest.approx(median_bandwidth(x), rel=0.05)


@pytest.mark.parametrize("to_matrix", [np.asarray, sparse.csr_array])
def test_principal_axes_keep_distances(to_matrix):
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 8)) + 3
    axes = principal_axes(to_matrix(cells), 2)
    assert axes.shape == (8, 2)
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=1e-10)
    # Two dimensions hold all of the variation.
    np.testing.assert_allclose(pdist(cells @ axes), pdist(cells))
    # No more axes than cells less one.
    assert principal_axes(to_matrix(cells[:4]), 50).shape == (8, 3)


def test_what_has_no_distance_is_refused():
    x, y = two_samples()
    with pytest.raises(SAMSError, match="'cosine'"):
        energy_distance(x, y, metric="cosine")
    with pytest.raises(SAMSError, match="not 0"):
        mmd(x, np.zeros_like(y))
    with pytest.raises(SAMSError, match="at least two"):
        median_bandwidth(x[:1])


def test_agrees_with_scperturb():
    scperturb = pytest.importorskip("scperturb")
    x, y = two_samples()
    obs = pd.DataFrame({"perturbation": ["x"] * len(x) + ["y"] * len(y)})
    adata = ad.AnnData(np.concatenate([x, y]), obs=obs.set_index(obs.index.astype(str)))
    adata.obsm["X_pca"] = adata.X
    theirs = scperturb.edist(adata, obs_key="perturbation", verbose=False)
    assert energy_distance(x, y) == pytest.approx(theirs.loc["x", "y"])


def test_agrees_with_pertpy():
    # Version 1.0.3 installs on Python 3.11 but fails to import beside statsmodels 0.15.
    pertpy = pytest.importorskip("pertpy", exc_type=ImportError)
    x, y = two_samples()
    theirs = pertpy.tl.Distance("mmd")(x, y, kernel="rbf", gamma=0.1)
    bandwidth = np.sqrt(1 / (2 * 0.1))
    assert mmd(x, y, bandwidth=bandwidth, unbiased=False) == pytest.approx(theirs)
    # Its E-distance is Euclidean and counts each cell's distance to itself.
    theirs = pertpy.tl.Distance("edistance")(x, y)
    ours = energy_distance(x, y, metric="euclidean", unbiased=False)
    assert ours == pytest.approx(theirs)


def test_a_sample_of_cells_has_no_cell_twice():
    """The median distance of two different cells is never zero."""
    cells = np.arange(6.0)[:, None] ** 2
    found = [median_bandwidth(cells, max_cells=2, seed=seed) for seed in range(30)]
    assert min(found) >= 1
