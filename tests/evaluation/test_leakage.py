"""Basal leakage: states of known separation, models built to leak, and which cells are scored."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model.builders import TRAINING, VARIANTS, set_effects, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen
from scvi_sams.evaluation import basal_leakage
from scvi_sams.exceptions import MissingControlError, UnknownPerturbationError
from scvi_sams.interpretation._leakage import _states

LABELS = ["P001", "P001+P003", "P001+P004", "P002", "P003", "P004"]


@pytest.fixture
def score_known(monkeypatch):
    """Score states that are given for all cells, in place of those that the model infers."""

    def score(model, basal, total=None, **kwargs):
        def given(model, adata, positions, seed):
            return basal[positions], (basal if total is None else total)[positions]

        monkeypatch.setattr("scvi_sams.interpretation._leakage._states", given)
        return basal_leakage(model, **kwargs)

    return score


def registered(adata, n_latent=3, **setup):
    SAMSVAE.setup_anndata(adata, **setup)
    return SAMSVAE(adata, n_latent, n_hidden=4)


@pytest.fixture(scope="module")
def default_model():
    return train_small(small_screen())


@pytest.fixture(scope="module")
def large_screen():
    return simulate_screen(
        n_genes=12,
        n_controls=1500,
        n_perturbations=3,
        cells_per_perturbation=1500,
        n_combinations=0,
        n_latent=6,
        mask_probability=0.5,
        library_size=200.0,
        seed=0,
    )


def test_the_auc_of_a_known_shift(large_screen, score_known):
    # The best classifier of normal states that differ by d sd has the AUC Phi(d / sqrt 2).
    rng = np.random.default_rng(0)
    shifts = {"control": 0.0, "P001": 0.0, "P002": 1.0, "P003": -2.0}
    distance = large_screen.obs["perturbation"].astype(str).map(shifts).to_numpy()
    basal = rng.normal(size=(large_screen.n_obs, 3))
    basal[:, 1] += distance
    # A unit of measurement of its own in each dimension changes nothing.
    total = basal * [1e3, 1e-3, 1] + 7
    found = score_known(registered(large_screen), basal, total)
    assert found.index.tolist() == ["P001", "P002", "P003", "all"]
    assert found["n_cells"].tolist() == [1500, 1500, 1500, 4500]
    expected = [norm.cdf(abs(d) / 2**0.5) for d in (0, 1, 2)]
    np.testing.assert_allclose(found["auc_basal"].iloc[:3], expected, atol=0.03)
    np.testing.assert_allclose(found["auc_total"], found["auc_basal"], atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["alike", "on scales of their own"])
def test_aucs_are_those_of_scikit_learn(large_screen, score_known, scale):
    """Of the same folds, with its own solver to convergence."""
    labels = large_screen.obs["perturbation"].to_numpy()
    rng = np.random.default_rng(4)
    states = rng.normal(size=(len(labels), 3))
    states[labels == "P001", 0] += 1
    states[labels == "P002"] += 5  # apart altogether
    states = (states * [1, scale, 1 / scale]).astype(np.float32)
    found = score_known(registered(large_screen), states, indices=list(range(len(labels))))
    for label in ("P001", "P002"):
        cells = np.isin(labels, [label, "control"])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-10))
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        x, y = states[cells].astype(np.float64), labels[cells] == label
        expected = cross_val_score(classifier, x, y, cv=folds, scoring="roc_auc").mean()
        assert found.loc[label, "auc_basal"] == pytest.approx(expected, abs=2e-4)


def test_true_basal_states_do_not_leak_and_true_states_show_the_effects(large_screen, score_known):
    found = score_known(
        registered(large_screen),
        large_screen.obsm["true_basal"],
        large_screen.obsm["true_latent"],
    )
    np.testing.assert_allclose(found["auc_basal"], 0.5, atol=0.04)
    simulation = large_screen.uns["simulation"]
    length = np.linalg.norm(simulation["true_masks"] * simulation["true_effects"], axis=1)
    np.testing.assert_allclose(found["auc_total"].iloc[:3], norm.cdf(length / 2**0.5), atol=0.03)


def test_states_that_say_nothing_are_not_below_one_half(score_known):
    adata = small_screen()
    model = registered(adata)
    auc = [
        score_known(model, np.random.default_rng(seed).normal(size=(adata.n_obs, 4)))
        for seed in range(12)
    ]
    means = np.array([table["auc_basal"] for table in auc])
    error = means.std(axis=0) / 12**0.5
    assert (np.abs(means.mean(axis=0) - 0.5) < 4 * error).all()


def test_labels_that_give_themselves_away_and_labels_that_do_not(score_known):
    adata = small_screen()
    names = adata.obs["perturbation"].astype(str)
    basal = np.column_stack([names == "P002", np.zeros(adata.n_obs)]).astype(float)
    found = score_known(registered(adata), basal)
    assert found.index.tolist() == [*LABELS, "all"]
    expected = dict.fromkeys(LABELS, 0.5) | {"P002": 1.0}
    assert found["auc_basal"].drop("all").to_dict() == expected
    counts = names.value_counts()
    assert found["n_cells"].drop("all").to_dict() == counts[LABELS].to_dict()
    assert found.loc["all", "n_cells"] == counts[LABELS].sum()


def test_combinations_count_as_one_label_however_they_are_spelled(score_known):
    adata = small_screen()
    spelled = adata.obs["perturbation"].astype(str).to_numpy()
    turned = ["+".join(reversed(name.split("+"))) for name in spelled]
    mixed = np.where(np.arange(adata.n_obs) % 2, turned, spelled)
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    expected = score_known(registered(adata), basal)
    adata.obs["perturbation"] = mixed
    pd.testing.assert_frame_equal(score_known(registered(adata), basal), expected)


def test_a_dosage_matrix_gives_the_same_labels(score_known):
    adata = small_screen()
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    expected = score_known(registered(adata), basal)
    names = adata.obs["perturbation"].astype(str)
    adata.obsm["doses"] = names.str.get_dummies("+").drop(columns="control").astype(float) * 0.5
    # Names in another order than the alphabet's.
    adata.obsm["doses"] = adata.obsm["doses"].iloc[:, ::-1]
    by_matrix = registered(adata, dosage_obsm_key="doses", delimiter=None)
    pd.testing.assert_frame_equal(score_known(by_matrix, basal), expected)


def test_a_perturbation_at_dose_zero_was_not_given(score_known):
    adata = small_screen()
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    names = adata.obs["perturbation"].astype(str)
    adata.obs["dosage"] = np.where(names == "P001+P003", "0+1", "1")
    found = score_known(registered(adata, dosage_key="dosage"), basal)
    assert found.index.tolist() == ["P001", "P001+P004", "P002", "P003", "P004", "all"]
    assert found.loc["P003", "n_cells"] == 18 + 14


def test_the_seed_decides_the_folds(score_known):
    adata = small_screen()
    model, basal = registered(adata), np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    found = [score_known(model, basal, seed=seed)["auc_basal"].to_numpy() for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_the_seed_decides(default_model):
    first = basal_leakage(default_model, seed=1)
    torch.manual_seed(3)
    pd.testing.assert_frame_equal(basal_leakage(default_model, seed=1), first)
    assert (basal_leakage(default_model, seed=2)["auc_basal"] != first["auc_basal"]).any()


def test_the_seed_decides_the_draws(default_model):
    cells = np.arange(150)
    first, again, other = (
        _states(default_model, default_model.adata, cells, seed)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_a_mask_selects_the_same_cells_as_positions(default_model):
    mask = np.arange(150) % 3 > 0
    pd.testing.assert_frame_equal(
        basal_leakage(default_model, indices=mask),
        basal_leakage(default_model, indices=np.flatnonzero(mask)),
    )


def test_nothing_is_written(default_model):
    before = set(default_model.adata.obsm), set(default_model.adata.obs)
    basal_leakage(default_model)
    assert (set(default_model.adata.obsm), set(default_model.adata.obs)) == before


def test_few_cells_have_no_auc_but_a_count(score_known):
    adata = small_screen()
    names = adata.obs["perturbation"].astype(str).to_numpy()
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    few = np.flatnonzero(names == "P003")[:9]
    indices = np.concatenate([np.flatnonzero(np.isin(names, ["control", "P001"])), few])
    found = score_known(registered(adata), basal, indices=indices)
    assert found["n_cells"].to_dict() == {
        "P001": 18, "P001+P003": 0, "P001+P004": 0, "P002": 0, "P003": 9, "P004": 0, "all": 27,
    }  # fmt: skip
    has_auc = found.index.isin(["P001", "all"])
    assert found.loc[has_auc, ["auc_basal", "auc_total"]].notna().all(axis=None)
    assert found.loc[~has_auc, ["auc_basal", "auc_total"]].isna().all(axis=None)
    mask = np.isin(np.arange(adata.n_obs), indices)
    by_mask = score_known(registered(adata), basal, indices=mask)
    assert by_mask["n_cells"].tolist() == found["n_cells"].tolist()


def test_too_few_control_cells_are_refused(default_model):
    names = default_model.adata.obs["perturbation"].astype(str).to_numpy()
    perturbed, controls = np.flatnonzero(names != "control"), np.flatnonzero(names == "control")
    with pytest.raises(MissingControlError, match=r"0 of the 100 cells"):
        basal_leakage(default_model, indices=perturbed)
    with pytest.raises(MissingControlError, match=r"9 of the 109 cells"):
        basal_leakage(default_model, indices=np.append(perturbed, controls[:9]))


def with_split(adata, held_out):
    model = registered(adata)
    half = len(held_out) // 2
    model.validation_indices, model.test_indices = held_out[half:], held_out[:half]
    return model


def held_out_cells(adata, n_of_label):
    names = adata.obs["perturbation"].astype(str)
    return np.concatenate(
        [np.flatnonzero(names == name)[:n] for name, n in n_of_label.items()]
    ).astype(int)


def test_held_out_cells_are_scored_if_there_are_enough(caplog, score_known):
    adata = small_screen()
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    cells = held_out_cells(adata, {"control": 12, "P001": 10, "P002": 11, "P003": 10, "P004": 4})
    found = score_known(with_split(adata, cells), basal)
    assert found["n_cells"].tolist() == [10, 0, 0, 11, 10, 4, 35]
    assert "Too few" not in caplog.text
    explicit = score_known(registered(adata), basal, indices=np.sort(cells))
    pd.testing.assert_frame_equal(found, explicit)


@pytest.mark.parametrize(
    "n_of_label",
    [
        {"control": 9, "P001": 15, "P002": 15, "P003": 15, "P004": 15},
        {"control": 20, "P001": 15, "P002": 15, "P003": 9, "P004": 9},
        {},
    ],
    ids=["controls", "perturbations", "none"],
)
def test_otherwise_all_cells_are_scored(n_of_label, score_known):
    adata = small_screen()
    basal = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    cells = held_out_cells(adata, n_of_label) if n_of_label else np.empty(0, dtype=int)
    found = score_known(with_split(adata, cells), basal)
    assert found.loc["all", "n_cells"] == 100
    pd.testing.assert_frame_equal(found, score_known(registered(adata), basal))


def test_other_data_are_scored_whole_and_as_such(default_model):
    other = ad.concat([default_model.adata, default_model.adata], index_unique="-")
    found = basal_leakage(default_model, other)
    assert found.loc["all", "n_cells"] == 200
    # A view of the training data is other data, and gives the same as its cells by position.
    view = default_model.adata[20:]
    expected = basal_leakage(default_model, indices=np.arange(20, 150))
    pd.testing.assert_frame_equal(basal_leakage(default_model, view), expected, atol=1e-3)
    strange = default_model.adata.copy()
    strange.obs["perturbation"] = strange.obs["perturbation"].astype(str).replace("P001", "P9")
    with pytest.raises(UnknownPerturbationError, match="P9"):
        basal_leakage(default_model, strange)


def without_noise(model):
    """Make the standard deviation of basal states the smallest there is, 0.01."""
    with torch.no_grad():
        model.module.encoder.head.log_variance.weight.zero_()
        model.module.encoder.head.log_variance.bias.fill_(-30.0)
    return model


def blind(model, log_variance=0.0):
    """Make the encoder see nothing of the expression, and basal states have this log variance."""
    without_noise(model)
    with torch.no_grad():
        model.module.encoder.from_x.weight.zero_()
        model.module.encoder.head.log_variance.bias.fill_(log_variance)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_those_of_each_cell_under_its_own_perturbations(variant):
    model = without_noise(train_small(small_screen(), **VARIANTS[variant]))
    cells = np.random.default_rng(0).permutation(model.adata.n_obs)[:60]
    found = _states(model, model.adata, cells, seed=0)
    for states, representation in zip(found, ("basal", "perturbed"), strict=True):
        expected = model.get_latent_representation(
            indices=cells, representation=representation, key_added=None
        )
        np.testing.assert_allclose(states, expected, atol=0.05)
        assert np.abs(states - expected).max() > 0.01


def test_basal_states_are_drawn_with_their_own_standard_deviation():
    model = blind(train_small(small_screen(), correlated_basal=False), log_variance=1.0)
    basal, total = _states(model, model.adata, np.arange(150), seed=0)
    means = model.get_latent_representation(key_added=None)
    noise = (basal - means) / np.e**0.5
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    shifts = model.get_latent_representation(representation="perturbed", key_added=None) - means
    np.testing.assert_allclose(total - basal, shifts, atol=1e-5)


def test_an_encoder_that_sees_the_shift_leaks_it():
    # All that such a basal state can know of the cell is the shift that the encoder is told.
    model = blind(train_small(small_screen(), correlated_effects=False))
    set_effects(model, np.random.default_rng(0).normal(scale=20, size=(4, 4)))
    np.testing.assert_allclose(basal_leakage(model)["auc_basal"].drop("all"), 1, atol=0.01)


def test_an_encoder_that_sees_nothing_leaks_nothing():
    model = blind(train_small(small_screen(), correlated_basal=False, correlated_effects=False))
    effects = np.random.default_rng(0).normal(scale=20, size=(4, 4))
    effects[2] = 0
    set_effects(model, effects)
    found = basal_leakage(model)
    assert abs(found.loc["all", "auc_basal"] - 0.5) < 0.15
    # The perturbations show in the effects alone; P003 has none.
    with_effects = [label for label in LABELS if label != "P003"]
    np.testing.assert_allclose(found.loc[with_effects, "auc_total"], 1, atol=0.01)
    assert found.loc["P003", "auc_total"] == pytest.approx(found.loc["P003", "auc_basal"])


def test_traces_in_the_mean_of_a_state_that_is_all_noise_count_as_nothing():
    model = blind(train_small(small_screen(), correlated_effects=False))
    set_effects(model, np.full((4, 4), 1e-3))
    means = model.get_latent_representation(key_added=None)
    is_control = (model.adata.obs["perturbation"] == "control").to_numpy()
    separates = (means[is_control].max(axis=0) < means[~is_control].min(axis=0)) | (
        means[is_control].min(axis=0) > means[~is_control].max(axis=0)
    )
    assert separates.any()
    assert abs(basal_leakage(model).loc["all", "auc_basal"] - 0.5) < 0.15


def test_a_trained_model_scores_the_cells_it_held_out():
    adata = small_screen(n_controls=150, cells_per_perturbation=60, cells_per_combination=50)
    SAMSVAE.setup_anndata(adata)
    torch.manual_seed(0)
    model = SAMSVAE(adata, 4, n_hidden=16, effect_n_hidden=8)
    model.train(max_epochs=15, train_size=0.6, validation_size=0.2, **TRAINING)
    held_out = np.union1d(model.validation_indices, model.test_indices)
    names = adata.obs["perturbation"].astype(str).iloc[held_out]
    found = basal_leakage(model)
    assert found["n_cells"].drop("all").to_dict() == names.value_counts()[LABELS].to_dict()
    assert found.loc["all", "n_cells"] == (names != "control").sum()
    assert found[["auc_basal", "auc_total"]].to_numpy().min() > 0.2
    pd.testing.assert_frame_equal(found, basal_leakage(model, indices=held_out))
