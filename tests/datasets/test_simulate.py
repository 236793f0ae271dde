import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scvi_sams.datasets import (
    _simulated_truth,
    simulate_benchmark_screen,
    simulate_screen,
    simulated_rates,
)
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidDosageError,
    SAMSError,
)

SMALL = {
    "n_genes": 40,
    "n_controls": 30,
    "n_perturbations": 6,
    "cells_per_perturbation": 10,
    "n_combinations": 5,
    "cells_per_combination": 8,
    "n_latent": 7,
    "n_hidden": 16,
}


def expected_shifts(adata):
    """Sum of dosage * mask * effect by cell, from the labels and dosages as a user reads them."""
    simulation = adata.uns["simulation"]
    row = {name: t for t, name in enumerate(simulation["perturbations"])}
    shifts = np.zeros(adata.obsm["true_basal"].shape)
    dosages = adata.obs.get("dosage", adata.obs["perturbation"])
    for i, (label, dosage) in enumerate(zip(adata.obs["perturbation"], dosages, strict=True)):
        if label == "control":
            assert dosage in ("0", "control")
            continue
        names = label.split("+")
        doses = [float(dose) for dose in dosage.split("+")] if "dosage" in adata.obs else [1, 1, 1]
        assert len(names) == adata.obs["n_perturbations"].iloc[i]
        for name, dose in zip(names, doses, strict="dosage" in adata.obs):
            t = row[name]
            shifts[i] += dose * simulation["true_masks"][t] * simulation["true_effects"][t]
    return shifts


def test_same_seed_same_screen():
    first, again = simulate_screen(**SMALL, seed=3), simulate_screen(**SMALL, seed=3)
    other = simulate_screen(**SMALL, seed=4)
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    np.testing.assert_array_equal(first.obsm["true_latent"], again.obsm["true_latent"])
    assert (first.X != other.X).nnz > 1000
    assert not np.allclose(
        first.uns["simulation"]["true_effects"], other.uns["simulation"]["true_effects"]
    )


def test_global_random_state_is_untouched():
    np.random.seed(11)  # noqa: NPY002 - the point is the global state
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(11)  # noqa: NPY002
    simulate_screen(**SMALL)
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002


def test_layout():
    adata = simulate_screen(**SMALL)
    assert adata.shape == (30 + 6 * 10 + 5 * 8, 40)
    assert isinstance(adata.X, csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))
    cells = adata.obs["perturbation"].value_counts()
    assert cells["control"] == 30
    assert (cells[[f"P00{t}" for t in range(1, 7)]] == 10).all()
    pairs = cells[cells.index.str.contains("+", regex=False)]
    assert (pairs == 8).all()
    assert len(pairs) == 5
    assert all(pair.split("+") == sorted(set(pair.split("+"))) for pair in pairs.index)
    assert list(adata.var_names[[0, -1]]) == ["gene_0001", "gene_0040"]
    assert "dosage" not in adata.obs


def test_all_combinations_can_be_drawn():
    adata = simulate_screen(**{**SMALL, "n_combinations": 20, "combination_size": 3})
    labels = [x for x in adata.obs["perturbation"].cat.categories if x.count("+") == 2]
    assert len(labels) == 20  # every set of 3 of the 6
    carried = adata.obs["n_perturbations"]
    assert carried.value_counts().to_dict() == {3: 20 * 8, 1: 60, 0: 30}


@pytest.mark.parametrize("dosages", [None, [0.5, 1, 2.25]])
@pytest.mark.parametrize("combination_size", [2, 3])
def test_latents_are_shifted_by_dose_times_masked_effect(dosages, combination_size):
    adata = simulate_screen(**SMALL, combination_size=combination_size, dosages=dosages)
    shift = adata.obsm["true_latent"] - adata.obsm["true_basal"]
    np.testing.assert_allclose(shift, expected_shifts(adata), atol=1e-5)
    assert (np.abs(shift).max(axis=1) > 1e-3).sum() == 100  # all but the controls move


def test_doses_are_drawn_one_by_one():
    adata = simulate_screen(**{**SMALL, "cells_per_perturbation": 500}, dosages=[0.5, 1, 2.25])
    single = adata.obs["n_perturbations"] == 1
    shares = adata.obs["dosage"][single].value_counts(normalize=True)
    np.testing.assert_allclose(shares[["0.5", "1.0", "2.25"]], 1 / 3, atol=0.03)
    pairs = adata.obs["dosage"][adata.obs["n_perturbations"] == 2]
    assert {"0.5+2.25", "2.25+0.5"} <= set(pairs)


def test_truth_has_the_distributions_asked_for():
    adata = simulate_screen(
        **{**SMALL, "n_perturbations": 400, "cells_per_perturbation": 20, "n_latent": 50},
        mask_probability=0.1,
        effect_scale=2.0,
        library_size=800.0,
        library_log_sd=0.4,
    )
    simulation = adata.uns["simulation"]
    assert simulation["true_masks"].mean() == pytest.approx(0.1, abs=0.007)  # 3 standard errors
    assert simulation["true_effects"].std() == pytest.approx(2.0, rel=0.02)
    assert abs(simulation["true_effects"].mean()) < 0.05
    assert adata.obsm["true_basal"].std() == pytest.approx(1.0, abs=0.01)
    log_library = np.log(adata.obs["library_size"])
    assert log_library.median() == pytest.approx(np.log(800), abs=0.02)
    assert log_library.std() == pytest.approx(0.4, abs=0.01)
    hidden = adata.obsm["true_basal"] @ simulation["decoder"]["hidden_weight"].T
    assert hidden.std() == pytest.approx(1.0, abs=0.1)


def test_inverse_dispersions_are_log_normal():
    adata = simulate_screen(
        **{**SMALL, "n_genes": 20000, "n_controls": 1, "n_perturbations": 2, "n_combinations": 0},
        inverse_dispersion=4.0,
        inverse_dispersion_log_sd=0.7,
    )
    log_theta = np.log(adata.var["true_inverse_dispersion"])
    assert log_theta.median() == pytest.approx(np.log(4), abs=0.02)
    assert log_theta.std() == pytest.approx(0.7, abs=0.015)
    assert adata.uns["simulation"]["decoder"]["gene_bias"].std() == pytest.approx(1, abs=0.02)


def test_every_perturbation_moves_something():
    settings = {**SMALL, "n_perturbations": 2000, "n_latent": 5, "mask_probability": 0.02}
    masks = simulate_screen(**settings).uns["simulation"]["true_masks"]
    assert masks.any(axis=1).all()
    # Given at least one active latent: p / (1 - (1 - p)^L) = 0.208, for each of them alike.
    np.testing.assert_allclose(masks.mean(axis=0), 0.02 / (1 - 0.98**5), atol=0.03)


def test_counts_have_negative_binomial_moments():
    adata = simulate_screen(
        **{**SMALL, "n_controls": 6000}, library_size=600.0, inverse_dispersion=2.0
    )
    x = adata.X.toarray().astype(np.float64)
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    library = adata.obs["library_size"].to_numpy()[:, None]
    mean = library * simulated_rates(adata, adata.obsm["true_latent"])
    variance = mean + mean**2 / theta
    z_of_mean = (x - mean).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert np.abs(z_of_mean).max() < 4
    assert z_of_mean.std() == pytest.approx(1, abs=0.35)
    squared = (x - mean) ** 2 / variance
    np.testing.assert_allclose(squared.mean(axis=0), 1, atol=0.25)
    assert squared.mean() == pytest.approx(1, abs=0.02)
    # A Poisson variance would be far from the truth here, so the dispersion is really used.
    assert ((x - mean) ** 2 / mean).mean() > 3


def test_no_cell_is_empty():
    adata = simulate_screen(**SMALL, library_size=1.0)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert totals.min() == 1
    assert totals.mean() < 3


def test_empty_cells_that_cannot_be_helped():
    with pytest.raises(InvalidCountsError, match="raise library_size"):
        simulate_screen(**SMALL, library_size=1e-7)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dosages": [0.5, -1]}, InvalidDosageError, r"\[0.5, -1\]"),
        ({"dosages": []}, InvalidDosageError, "positive"),
        ({"dosages": [float("nan")]}, InvalidDosageError, "nan"),
        ({"mask_probability": 0.0}, SAMSError, "mask_probability"),
        ({"n_combinations": 16}, SAMSError, "Only 15 sets of 2 can be made from 6"),
        ({"combination_size": 1}, SAMSError, "at least 2"),
    ],
)
def test_settings_that_make_no_sense(settings, error, message):
    with pytest.raises(error, match=message):
        simulate_screen(**{**SMALL, **settings})


def test_h5ad_round_trip(tmp_path):
    adata = simulate_screen(**SMALL, dosages=[0.5, 1.0])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = anndata.read_h5ad(tmp_path / "screen.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert list(back.obs["perturbation"]) == list(adata.obs["perturbation"])
    np.testing.assert_allclose(
        back.obsm["true_latent"] - back.obsm["true_basal"], expected_shifts(back), atol=1e-5
    )
    settings = back.uns["simulation"]["settings"]
    assert settings["n_latent"] == 7
    assert settings["mask_probability"] == 0.1
    np.testing.assert_array_equal(settings["dosages"], [0.5, 1.0])


def test_stored_settings_draw_the_same_screen_again():
    adata = simulate_screen(**SMALL, dosages=[0.5, 1.0], seed=5)
    again = simulate_screen(**adata.uns["simulation"]["settings"])
    assert (adata.X != again.X).nnz == 0


def test_benchmark_design():
    adata = simulate_benchmark_screen(n_genes=10, seed=2)
    cells = adata.obs["perturbation"].value_counts()
    assert adata.n_obs == 20_000
    assert cells["control"] == 1000
    assert (cells == 130).sum() == 100
    assert (cells == 120).sum() == 50
    assert adata.obsm["true_latent"].shape[1] == 30
    assert adata.uns["simulation"]["settings"]["seed"] == 2


def test_benchmark_sparsity(monkeypatch):
    monkeypatch.setattr(_simulated_truth, "_ENTRIES_PER_CHUNK", 300_000)  # several chunks
    adata = simulate_benchmark_screen(cells_per_perturbation=4, cells_per_combination=4)
    assert adata.shape == (1600, 2000)
    assert adata.X.nnz / np.prod(adata.shape) == pytest.approx(0.57, abs=0.02)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert np.median(totals) == pytest.approx(5000, rel=0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_genes": 0}, "`n_genes` must be a whole number of at least 1, not 0"),
        ({"n_genes": -1}, "`n_genes` must be a whole number of at least 1, not -1"),
        ({"n_genes": "x"}, "`n_genes` must be a whole number of at least 1, not 'x'"),
        ({"n_latent": 2.5}, "`n_latent` must be a whole number"),
        ({"n_controls": -1}, "`n_controls` must be a whole number of at least 0"),
        ({"library_size": 0}, "`library_size` must be a number above 0"),
        ({"effect_scale": "strong"}, "`effect_scale` must be a number of at least 0"),
        ({"mask_probability": 0}, "`mask_probability` must be a number above 0"),
        ({"seed": "x"}, "`seed` must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        simulate_screen(**settings)
