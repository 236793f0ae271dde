"""Observed effects against values computed by hand and by plain loops over cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.data import open_screen
from scvi_sams.evaluation import observed_ate
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidCovariateError,
    InvalidPerturbationLabelError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.metrics import _observed


def make_cells(counts, labels, **obs) -> ad.AnnData:
    names = [f"cell{i}" for i in range(len(labels))]
    return ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame({"perturbation": labels, **obs}, index=names),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(np.shape(counts)[1])]),
    )


@pytest.fixture
def random_cells() -> ad.AnnData:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 2.0, size=6), size=(60, 6)) + np.eye(60, 6)
    labels = rng.choice(["control", "A", "B", "A+B", "B+A", "C"], size=60)
    return make_cells(counts, labels, size=rng.uniform(5, 15, size=60))


def naive_ate(counts, size, labels, label, transform):
    """Loop over cells: mean and standard error of the effect of one label."""
    values = {"control": [], label: []}
    for x, cell_size, cell_label in zip(counts, size, labels, strict=True):
        if cell_label in values:
            values[cell_label].append(transform(x / cell_size))
    control, treated = values["control"], values[label]
    error = np.sqrt(
        np.var(treated, axis=0, ddof=1) / len(treated)
        + np.var(control, axis=0, ddof=1) / len(control)
    )
    return np.mean(treated, axis=0) - np.mean(control, axis=0), error


def test_mean_effect_and_standard_error_by_hand():
    # Per 100 counts: controls (10, 90) and (30, 70), A (40, 60) and (50, 50), A+B (0, 100).
    cells = make_cells(
        [[10, 90], [60, 140], [40, 60], [1, 1], [0, 10]], ["control", "control", "A", "A", "B+A"]
    )
    table = observed_ate(cells, method="mean", target_sum=100)
    assert table.obs_names.tolist() == ["A", "A+B"]
    assert table.var_names.tolist() == ["gene0", "gene1"]
    assert table.obs["n_cells"].tolist() == [2, 1]
    np.testing.assert_allclose(table.X, [[25, -25], [-20, 20]], rtol=1e-12)
    error = table.layers["standard_error"]
    # Variances: 200 among two controls, 50 among two cells of A.
    np.testing.assert_allclose(error[0], np.sqrt(200 / 2 + 50 / 2), rtol=1e-12)
    assert np.isnan(error[1]).all()
    assert table.uns["ate"] == {
        "method": "mean",
        "target_sum": 100.0,
        "size_factor_key": "none",
        "units": "difference of mean 100 * counts / total counts",
    }


def test_lognorm_effect_by_hand():
    # Per 10 counts, log2(1 + x): controls (2, 3, 0) and (3, 2, 0), A twice as deep (0, 2, 3).
    cells = make_cells([[3, 7, 0], [7, 3, 0], [0, 6, 14]], ["control", "control", "A"])
    table = observed_ate(cells, target_sum=10)
    np.testing.assert_allclose(table.X, [[-2.5, -0.5, 3]], atol=1e-12)
    assert table.uns["ate"]["method"] == "lognorm"
    assert table.uns["ate"]["units"] == "difference of mean log2(1 + 10 * counts / total counts)"


def test_size_factor_replaces_the_total_by_hand():
    cells = make_cells([[3, 0], [7, 1]], ["control", "A"], depth=[1.0, 0.5])
    table = observed_ate(cells, size_factor_key="depth", method="mean", target_sum=2)
    np.testing.assert_allclose(table.X, [[2 * 7 / 0.5 - 2 * 3, 2 * 1 / 0.5]])
    assert "depth" in table.uns["ate"]["units"]
    assert table.uns["ate"]["size_factor_key"] == "depth"


@pytest.mark.parametrize("size_factor_key", [None, "size"])
@pytest.mark.parametrize(
    ("method", "transform"),
    [("lognorm", lambda x: np.log2(1 + 1e4 * x)), ("mean", lambda x: 1e4 * x)],
)
def test_equals_a_loop_over_cells(random_cells, method, transform, size_factor_key):
    counts = random_cells.X.toarray().astype(float)
    size = counts.sum(axis=1) if size_factor_key is None else random_cells.obs["size"].to_numpy()
    labels = random_cells.obs["perturbation"].replace("B+A", "A+B").tolist()
    table = observed_ate(random_cells, method=method, size_factor_key=size_factor_key)
    assert table.obs_names.tolist() == ["A", "A+B", "B", "C"]
    for row, label in enumerate(table.obs_names):
        effect, error = naive_ate(counts, size, labels, label, transform)
        assert table.obs["n_cells"].iloc[row] == labels.count(label)
        np.testing.assert_allclose(table.X[row], effect, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(table.layers["standard_error"][row], error, rtol=1e-6)


def test_cell_order_and_storage_do_not_matter(random_cells, tmp_path):
    expected = observed_ate(random_cells)
    shuffled = random_cells[np.random.default_rng(1).permutation(60)].copy()
    dense = random_cells.copy()
    dense.X = dense.X.toarray()
    columns = random_cells.copy()
    columns.X = columns.X.tocsc()
    layered = random_cells.copy()
    layered.layers["counts"], layered.X = layered.X, None
    random_cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for cells, layer in [
        (shuffled, None), (dense, None), (columns, None), (layered, "counts"), (backed, None),
    ]:  # fmt: skip
        table = observed_ate(cells, layer=layer)
        assert table.obs_names.equals(expected.obs_names)
        np.testing.assert_allclose(table.X, expected.X, atol=1e-10)
        np.testing.assert_allclose(
            table.layers["standard_error"], expected.layers["standard_error"], atol=1e-8
        )
    backed.file.close()


@pytest.mark.parametrize("layer", [None, "counts"])
def test_counts_on_disk_are_read_in_blocks(random_cells, layer, tmp_path, monkeypatch):
    random_cells.layers["counts"] = random_cells.X.copy()
    random_cells.write_h5ad(tmp_path / "cells.h5ad")
    random_cells.write_zarr(tmp_path / "cells.zarr")
    chosen = np.arange(5, 60)
    expected = [observed_ate(random_cells), observed_ate(random_cells, indices=chosen)]
    monkeypatch.setattr(_observed, "_CELLS_AT_ONCE", 7)  # 60 cells: eight blocks and a rest
    for name in ("cells.h5ad", "cells.zarr"):
        cells = open_screen(tmp_path / name)
        for indices, table in zip((None, chosen), expected, strict=True):
            found = observed_ate(cells, layer=layer, indices=indices)
            np.testing.assert_allclose(found.X, table.X, atol=1e-12)
            np.testing.assert_allclose(
                found.layers["standard_error"], table.layers["standard_error"], atol=1e-10
            )


def test_labels_are_matched_in_any_spelling_and_reported_in_one(random_cells):
    everything = observed_ate(random_cells)
    asked = observed_ate(random_cells, perturbations=["C", "B+A"])
    assert asked.obs_names.tolist() == ["C", "A+B"]
    np.testing.assert_array_equal(asked.X, everything[["C", "A+B"]].X)
    np.testing.assert_array_equal(asked.obs["n_cells"], everything[["C", "A+B"]].obs["n_cells"])


def test_several_control_labels_form_one_control_group(random_cells):
    renamed = random_cells.copy()
    is_control = np.flatnonzero(renamed.obs["perturbation"] == "control")
    renamed.obs["perturbation"] = renamed.obs["perturbation"].astype(str)
    renamed.obs.iloc[is_control[::2], renamed.obs.columns.get_loc("perturbation")] = "NT-1"
    renamed.obs.iloc[is_control[1::2], renamed.obs.columns.get_loc("perturbation")] = "NT-2"
    table = observed_ate(renamed, control=["NT-1", "NT-2"])
    np.testing.assert_allclose(table.X, observed_ate(random_cells).X, atol=1e-12)


def test_control_parts_of_a_label_mean_nothing():
    cells = make_cells([[1, 1], [3, 1], [1, 3]], ["ctrl", "A+ctrl", "ctrl+A"])
    table = observed_ate(cells, control="ctrl", method="mean", target_sum=4)
    assert table.obs_names.tolist() == ["A"]
    np.testing.assert_allclose(table.X, [[0, 0]])


def test_without_a_delimiter_labels_are_not_split():
    cells = make_cells([[1, 1], [3, 1], [1, 3]], ["control", "B+A", "A+B"])
    assert observed_ate(cells, delimiter=None).obs_names.tolist() == ["A+B", "B+A"]


def test_only_the_given_cells_are_used(random_cells, tmp_path):
    chosen = np.random.default_rng(2).permutation(60)[:40]
    expected = observed_ate(random_cells[np.sort(chosen)].copy())
    mask = np.isin(np.arange(60), chosen)
    random_cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for cells, indices in [(random_cells, chosen), (random_cells, mask), (backed, chosen.tolist())]:
        table = observed_ate(cells, indices=indices)
        assert table.obs["n_cells"].tolist() == expected.obs["n_cells"].tolist()
        np.testing.assert_allclose(table.X, expected.X, atol=1e-12)
    backed.file.close()


def test_input_is_not_changed(random_cells):
    before = random_cells.copy()
    observed_ate(random_cells, perturbations=["A"], indices=np.arange(50))
    np.testing.assert_array_equal(random_cells.X.toarray(), before.X.toarray())
    pd.testing.assert_frame_equal(random_cells.obs, before.obs)
    assert not random_cells.uns
    assert not random_cells.layers


def test_equal_cells_have_no_variance_whatever_the_rounding():
    # log2(1 + 10) is one of the values whose mean square rounds to less than its squared mean.
    cells = make_cells([[10, 9990]] * 3 + [[9990, 10]] * 3, ["control"] * 3 + ["A"] * 3)
    np.testing.assert_allclose(observed_ate(cells).layers["standard_error"], 0, atol=1e-6)


def test_table_survives_writing(random_cells, tmp_path):
    table = observed_ate(random_cells)
    table.write_h5ad(tmp_path / "ate.h5ad")
    read = ad.read_h5ad(tmp_path / "ate.h5ad")
    np.testing.assert_array_equal(read.X, table.X)
    assert read.uns["ate"] == table.uns["ate"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"perturbation_key": "guide"}, MissingKeyError, "'guide'"),
        ({"layer": "counts"}, MissingKeyError, "'counts'"),
        ({"size_factor_key": "depth"}, MissingKeyError, "'depth'"),
        ({"size_factor_key": "perturbation"}, InvalidCovariateError, "not a size of a cell"),
        ({"control": "NT"}, MissingControlError, "'NT'"),
        ({"perturbations": ["A", "Z"]}, UnknownPerturbationError, "'Z'"),
        ({"perturbations": ["control"]}, UnknownPerturbationError, "'control'"),
        ({"perturbations": ["A+B", "B+A"]}, SAMSError, "more than once"),
        ({"method": "median"}, SAMSError, "'median'"),
    ],
)
def test_errors_name_what_is_wrong(random_cells, arguments, error, message):
    with pytest.raises(error, match=message):
        observed_ate(random_cells, **arguments)


def test_indices_without_controls_are_refused(random_cells):
    perturbed = np.flatnonzero(random_cells.obs["perturbation"] != "control")
    with pytest.raises(MissingControlError, match="indices"):
        observed_ate(random_cells, indices=perturbed)


def test_missing_labels_are_refused(random_cells):
    random_cells.obs["perturbation"] = random_cells.obs["perturbation"].replace("C", None)
    with pytest.raises(InvalidPerturbationLabelError, match="no perturbation label"):
        observed_ate(random_cells)


def test_empty_cells_and_impossible_counts_are_refused():
    labels = ["control", "A"]
    with pytest.raises(InvalidCountsError, match="'cell1'"):
        observed_ate(make_cells([[1, 2], [0, 0]], labels))
    with pytest.raises(InvalidCountsError, match=r"smallest: -1"):
        observed_ate(make_cells([[1, 2], [-1, 2]], labels))
    with pytest.raises(InvalidCountsError, match="non-finite"):
        observed_ate(make_cells([[1, 2], [np.nan, 2]], labels))
    with pytest.raises(InvalidCountsError, match="size"):
        observed_ate(make_cells([[1, 2], [1, 2]], labels, size=[1, 0]), size_factor_key="size")


def test_empty_x_is_refused(random_cells):
    random_cells.X = None
    with pytest.raises(MissingKeyError, match="layer"):
        observed_ate(random_cells)


# Weights of cells --------------------------------------------------------------------------------


def test_weighted_effect_and_its_error_by_hand():
    # Per 100 counts of gene 0: controls 10 and 30; A 40, 50 and 90; B 0 and 20.
    counts = [[10, 90], [60, 140], [40, 60], [1, 1], [9, 1], [0, 10], [20, 80]]
    weights = [np.nan, np.nan, 0.5, 1.0, 0.25, 0.0, 1.0]
    cells = make_cells(counts, ["control"] * 2 + ["A"] * 3 + ["B"] * 2, sams_response=weights)
    table = observed_ate(cells, method="mean", target_sum=100, weights="sams_response")
    assert table.obs["n_cells"].tolist() == [3, 2]
    n_of_a = 1.75**2 / (0.25 + 1 + 0.0625)
    np.testing.assert_allclose(table.obs["n_effective"], [n_of_a, 1], rtol=1e-12)
    mean = (0.5 * 40 + 50 + 0.25 * 90) / 1.75
    np.testing.assert_allclose(table.X[:, 0], [mean - 20, 0], rtol=1e-12)
    np.testing.assert_allclose(table.X[:, 1], -table.X[:, 0], atol=1e-12)
    variance = (0.5 * (40 - mean) ** 2 + (50 - mean) ** 2 + 0.25 * (90 - mean) ** 2) / 1.75
    error = np.sqrt(variance / (n_of_a - 1) + 200 / 2)
    np.testing.assert_allclose(table.layers["standard_error"][0], [error] * 2, rtol=1e-12)
    assert np.isnan(table.layers["standard_error"][1]).all()  # one cell is left
    assert table.uns["ate"]["weights"] == "sams_response"
    array = observed_ate(cells, method="mean", target_sum=100, weights=weights)
    np.testing.assert_array_equal(array.X, table.X)
    assert array.uns["ate"]["weights"] == "given"


def test_controls_count_as_they_are_told_to():
    counts = [[10, 90], [60, 140], [40, 60], [50, 50]]
    cells = make_cells(counts, ["control"] * 2 + ["A"] * 2)
    table = observed_ate(cells, method="mean", target_sum=100, weights=[3, 1, 1, 1])
    np.testing.assert_allclose(table.X, [[45 - 15, 15 - 45]], rtol=1e-12)
    n = 16 / 10
    error = np.sqrt(50 / 2 + (0.75 * 25 + 0.25 * 225) / (n - 1))
    np.testing.assert_allclose(table.layers["standard_error"], [[error, error]], rtol=1e-12)


@pytest.mark.parametrize("weight", [1.0, 7.0, np.nan])
def test_equal_weights_are_none(random_cells, weight):
    plain = observed_ate(random_cells)
    table = observed_ate(random_cells, weights=np.full(60, weight))
    np.testing.assert_allclose(table.X, plain.X, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        table.layers["standard_error"], plain.layers["standard_error"], rtol=1e-6
    )
    np.testing.assert_allclose(table.obs["n_effective"], plain.obs["n_cells"], rtol=1e-12)
    assert "n_effective" not in plain.obs
    assert "weights" not in plain.uns["ate"]


def test_weights_of_zero_and_one_select_cells(random_cells):
    chosen = np.random.default_rng(2).random(60) < 0.7
    chosen |= random_cells.obs["perturbation"].to_numpy() == "control"
    expected = observed_ate(random_cells, indices=chosen)
    table = observed_ate(random_cells, weights=pd.Series(chosen, index=random_cells.obs_names))
    np.testing.assert_allclose(table.X, expected.X, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(
        table.layers["standard_error"], expected.layers["standard_error"], rtol=1e-6
    )
    np.testing.assert_allclose(table.obs["n_effective"], expected.obs["n_cells"])


def test_weights_go_with_their_cells_on_disk_and_among_indices(random_cells, tmp_path, monkeypatch):
    weights = np.random.default_rng(4).uniform(0, 2, size=60)
    random_cells.obs["weight"] = weights
    chosen = np.random.default_rng(2).permutation(60)[:40]
    part = random_cells[np.sort(chosen)].copy()
    expected = observed_ate(part, weights="weight")
    random_cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(_observed, "_CELLS_AT_ONCE", 7)
    on_disk = open_screen(tmp_path / "cells.h5ad")
    mask = np.isin(np.arange(60), chosen)
    for cells, indices, given in [
        (random_cells, chosen, weights),
        (random_cells, mask, "weight"),
        (on_disk, mask, weights),
        (on_disk, np.sort(chosen), "weight"),
    ]:
        table = observed_ate(cells, indices=indices, weights=given)
        np.testing.assert_allclose(table.X, expected.X, atol=1e-10)
        np.testing.assert_allclose(
            table.layers["standard_error"], expected.layers["standard_error"], atol=1e-8
        )
        np.testing.assert_allclose(table.obs["n_effective"], expected.obs["n_effective"])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("response", MissingKeyError, "'response'"),
        ("perturbation", InvalidArgumentError, "not a weight of a cell"),
        (np.ones(59), InvalidArgumentError, "each of the 60 cells"),
        (np.ones((60, 1)), InvalidArgumentError, "each of the 60 cells"),
        ([*[1.0] * 57, -0.5, -1, 1], InvalidArgumentError, "-0.5, for cell 'cell57' and 1 more"),
        ([*[1.0] * 59, np.inf], InvalidArgumentError, "'cell59'"),
        (["much"] * 60, InvalidArgumentError, "must be numbers"),
        (pd.Series(np.ones(60), index=[f"c{i}" for i in range(60)]), InvalidArgumentError, "index"),
    ],
)
def test_weights_that_are_none_are_refused(random_cells, weights, error, message):
    with pytest.raises(error, match=message):
        observed_ate(random_cells, weights=weights)


@pytest.mark.parametrize(("label", "named"), [("C", "'C'"), ("control", "control cells")])
def test_a_label_without_weight_is_refused(random_cells, label, named):
    weights = (random_cells.obs["perturbation"] != label).astype(float).to_numpy()
    with pytest.raises(InvalidArgumentError, match=f"All weights of .*{named}.* are 0"):
        observed_ate(random_cells, weights=weights)
    if label == "C":
        table = observed_ate(random_cells, weights=weights, perturbations=["A"])
        assert table.obs_names.tolist() == ["A"]
