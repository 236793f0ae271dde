"""Interactions that cells show: by hand, calibrated, and beside those of a model."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from model.builders import linear_normal, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen
from scvi_sams.evaluation import observed_ate
from scvi_sams.exceptions import (
    MissingControlError,
    SAMSError,
    ScaleMismatchError,
    UnknownPerturbationError,
)
from scvi_sams.interpretation import genetic_interactions, observed_interactions

LABELS = ["control"] * 3 + ["A"] * 2 + ["B"] * 2 + ["B+A"] * 3


def screen(counts, labels):
    return ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame(
            {"perturbation": labels, "size": 1.0}, index=[f"c{i}" for i in range(len(labels))]
        ),
        var=pd.DataFrame(index=["g1", "g2"]),
    )


def by_hand():
    rng = np.random.default_rng(0)
    return screen(rng.integers(0, 9, size=(10, 2)), LABELS)


def direction_of(additive, name="A+B"):
    return ad.AnnData(
        np.zeros_like(additive),
        obs=pd.DataFrame(index=[name]),
        var=pd.DataFrame(index=["g1", "g2"]),
        layers={"additive": additive},
    )


SETTINGS = {"method": "mean", "size_factor_key": "size", "target_sum": 1.0}


def test_counts_may_be_on_disk(tmp_path):
    cells = by_hand()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    found = observed_interactions(open_screen(tmp_path / "cells.h5ad"), **SETTINGS)
    np.testing.assert_allclose(found.X, observed_interactions(cells, **SETTINGS).X)


def test_observed_interaction_by_hand():
    cells = by_hand()
    found = observed_interactions(
        cells, ["A+B"], direction=direction_of(np.array([[3.0, -4.0]])), **SETTINGS
    )
    x = cells.X.toarray().astype(np.float64)
    control, a, b, pair = x[:3], x[3:5], x[5:7], x[7:]
    interaction = pair.mean(0) - a.mean(0) - b.mean(0) + control.mean(0)
    np.testing.assert_allclose(found.X[0], interaction)
    np.testing.assert_allclose(found.layers["effect"][0], pair.mean(0) - control.mean(0))
    additive = a.mean(0) + b.mean(0) - 2 * control.mean(0)
    np.testing.assert_allclose(found.layers["additive"][0], additive)
    groups = (control, a, b, pair)
    squared = sum(group.var(axis=0, ddof=1) / len(group) for group in groups)
    np.testing.assert_allclose(found.layers["standard_error"][0], np.sqrt(squared))
    unit = np.array([0.6, -0.8])
    row = found.obs.loc["A+B"]
    assert row["score"] == pytest.approx(interaction @ unit)
    squared = sum((group @ unit).var(ddof=1) / len(group) for group in groups)
    assert row["score_standard_error"] == pytest.approx(np.sqrt(squared))
    assert row["additive_score"] == pytest.approx(additive @ unit)
    assert row["n_cells"] == 3
    assert row["n_cells_single"] == 2


def test_interactions_are_differences_of_observed_effects():
    cells = small_screen()
    found = observed_interactions(cells)
    ate = observed_ate(cells).to_df()
    for pair in found.obs_names:
        np.testing.assert_allclose(found[pair].layers["effect"][0], ate.loc[pair], atol=1e-6)
        additive = ate.loc[pair.split("+")].sum()
        np.testing.assert_allclose(found[pair].layers["additive"][0], additive, atol=1e-6)
        np.testing.assert_allclose(found[pair].X[0], ate.loc[pair] - additive, atol=1e-6)
    assert set(found.obs_names) == {name for name in ate.index if "+" in name}
    assert "score" not in found.obs


def test_three_perturbations_count_the_control_twice():
    counts = np.arange(10.0).reshape(5, 2) ** 2
    cells = screen(counts, ["control", "A", "B", "C", "A+B+C"])
    found = observed_interactions(cells, ["C+B+A"], **SETTINGS)
    np.testing.assert_allclose(
        found.X[0], counts[4] - counts[1] - counts[2] - counts[3] + 2 * counts[0]
    )
    assert np.isnan(found.layers["standard_error"]).all()  # of single cells


def test_the_order_of_cells_and_names_plays_no_part():
    cells = by_hand()
    permuted = cells[np.random.default_rng(1).permutation(10)].copy()
    one = observed_interactions(cells, ["A+B"], **SETTINGS)
    other = observed_interactions(permuted, ["B+A"], **SETTINGS)
    np.testing.assert_allclose(one.X, other.X)
    np.testing.assert_allclose(one.layers["standard_error"], other.layers["standard_error"])


def test_scores_of_additive_cells_are_calibrated():
    """Correlated genes and unequal groups: z of what is truly additive is standard normal."""
    rng = np.random.default_rng(0)
    labels = ["control"] * 60 + ["A"] * 20 + ["B"] * 30 + ["A+B"] * 15
    mean = {"control": [20, 20], "A": [30, 22], "B": [24, 35], "A+B": [34, 37]}
    rates = np.array([mean[label] for label in labels], dtype=float)
    direction = direction_of(np.array([[14.0, 17.0]]))
    z = []
    for _ in range(400):
        shared = rng.poisson(10, size=(len(labels), 1))
        cells = screen(rng.poisson(rates - 10) + shared, labels)
        row = observed_interactions(cells, ["A+B"], direction=direction, **SETTINGS).obs.iloc[0]
        z.append(row["score"] / row["score_standard_error"])
    assert abs(np.mean(z)) < 0.2
    assert 0.9 < np.std(z) < 1.15


def test_what_cannot_be_observed_is_refused():
    cells = by_hand()
    with pytest.raises(SAMSError, match="'A' is not a combination"):
        observed_interactions(cells, ["A"], **SETTINGS)
    with pytest.raises(UnknownPerturbationError, match=r"'C'.*'A\+C'"):
        observed_interactions(cells, ["A+C"], **SETTINGS)
    with pytest.raises(UnknownPerturbationError, match="'B'"):
        observed_interactions(cells[cells.obs["perturbation"] != "B"], ["A+B"], **SETTINGS)
    with pytest.raises(SAMSError, match="No combination was measured"):
        observed_interactions(cells[cells.obs["perturbation"] != "B"], **SETTINGS)
    with pytest.raises(MissingControlError):
        observed_interactions(cells[3:], **SETTINGS)
    with pytest.raises(SAMSError, match="more than once"):
        observed_interactions(cells, ["A+B", "B+A"], **SETTINGS)
    other = direction_of(np.ones((1, 2)), "A+C")
    with pytest.raises(SAMSError, match=r"no 'A\+B'"):
        observed_interactions(cells, ["A+B"], direction=other, **SETTINGS)
    with pytest.raises(SAMSError, match="genes"):
        observed_interactions(cells[:, ["g2", "g1"]], ["A+B"], direction=other, **SETTINGS)


def test_the_table_holds_both_kinds_of_interactions():
    model = train_small(small_screen())
    torch.manual_seed(0)
    table = genetic_interactions(model)
    torch.manual_seed(0)
    predicted = model.predict_interactions(sorted(table.index), method="lognorm")
    observed = observed_interactions(model.adata, sorted(table.index), direction=predicted).obs
    table = table.loc[observed.index]
    np.testing.assert_allclose(table["predicted_score"], predicted.obs["score"])
    np.testing.assert_allclose(table["predicted_high"], predicted.obs["score_high"])
    np.testing.assert_allclose(table["observed_score"], observed["score"])
    z = observed["score"] / observed["score_standard_error"]
    np.testing.assert_allclose(table["z"], z)
    np.testing.assert_allclose(table["p_value"], 2 * stats.norm.sf(np.abs(z)))
    relative = observed["score"] / observed["additive_score"]
    np.testing.assert_allclose(table["observed_relative"], relative)
    assert (table["fdr"] >= table["p_value"]).all()
    pd.testing.assert_frame_equal(
        model.adata.uns["sams_interactions"].loc[table.index], table, check_names=False
    )


def test_the_table_is_written_only_if_asked_for_and_survives_a_file(tmp_path):
    model = train_small(small_screen(), {"size_factor_key": "transcriptome"})
    before = set(model.adata.uns)
    genetic_interactions(model, key_added=None)
    assert set(model.adata.uns) == before
    table = genetic_interactions(model)
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").uns["sams_interactions"]
    pd.testing.assert_frame_equal(read, table, check_dtype=False, check_index_type=False)
    assert (np.diff(table["p_value"]) >= 0).all()


def test_both_kinds_are_normalised_to_one_total():
    model = train_small(small_screen())
    torch.manual_seed(0)
    table = genetic_interactions(model, target_sum=50.0, key_added=None).sort_index()
    names = list(table.index)
    torch.manual_seed(0)
    predicted = model.predict_interactions(names, method="lognorm", target_sum=50.0)
    arguments = {"direction": predicted, "target_sum": 50.0}
    observed = observed_interactions(model.adata, names, **arguments).obs
    np.testing.assert_allclose(table["observed_score"], observed["score"])
    arguments["target_sum"] = 1e4
    with pytest.raises(ScaleMismatchError, match=r"target_sum is 50 in the direction and 10000"):
        observed_interactions(model.adata, names, **arguments)


def test_a_bend_of_the_decoder_is_found_in_cells():
    """A saturating gene: what a simulated screen with a strong bend shows, the table shows."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "A", "B", "A+B"], 200)
    fold = np.repeat([0.0, 2.0, 2.0, 2.0], 200)  # log2, of the pair half of what the sum says
    counts = rng.poisson(np.column_stack([20 * 2**fold, np.full(800, 400)]))
    found = observed_interactions(
        screen(counts, labels),
        direction=direction_of(np.array([[4.0, 0.0]])),
        size_factor_key="size",
        target_sum=1.0,
    ).obs.iloc[0]
    assert found["additive_score"] == pytest.approx(4, abs=0.25)
    assert found["score"] == pytest.approx(-2, abs=0.2)
    assert found["score"] / found["score_standard_error"] < -10


def test_models_without_comparable_observations_are_refused():
    model, _ = linear_normal(SAMSVAE)
    with pytest.raises(SAMSError, match="counts"):
        genetic_interactions(model)
    dosed = small_screen(dosages=[0.5, 1.0])
    with pytest.raises(SAMSError, match="`dosage_key`"):
        genetic_interactions(train_small(dosed, {"dosage_key": "dosage"}))
