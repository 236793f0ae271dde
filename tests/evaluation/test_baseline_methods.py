"""Baseline methods against values computed by hand, and what they must not depend on."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scvi_sams.baselines._features import FeatureNeighbours, FeatureRidge
from scvi_sams.baselines._shrunken import AshMean, EBMean, ShrunkenAdditive
from scvi_sams.baselines._simple import (
    Additive,
    ControlMean,
    MatchingMean,
    PCARidge,
    PerturbationMean,
    TrainingMean,
    split_half,
)
from scvi_sams.baselines._trained import DecoderOnly, LatentAdditive, LinearAdditive
from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

GENES = ["g1", "g2", "g3", "constant"]
# Means: control (2, 0, 2), A (4, 2, 2) of 2 cells, B (2, 0, 5) of 1, A+B (8, 0, 2) of 3.
CELLS = [
    ("control", [1, 0, 2, 1]),
    ("A", [4, 1, 2, 1]),
    ("A+B", [7, 0, 2, 1]),
    ("control", [3, 0, 2, 1]),
    ("B", [2, 0, 5, 1]),
    ("B+A", [8, 0, 2, 1]),
    ("A", [4, 3, 2, 1]),
    ("A+B", [9, 0, 2, 1]),
]
CONTROL = np.array([2, 0, 2, 1])
FEATURES = pd.DataFrame({"x": [1.0, 2.0]}, index=["A", "B"])
METHODS = [
    ControlMean(),
    PerturbationMean(),
    TrainingMean(),
    Additive(),
    MatchingMean(),
    PCARidge(),
    EBMean(),
    AshMean(),
    ShrunkenAdditive(),
    FeatureRidge(FEATURES),
    FeatureNeighbours(FEATURES),
    LinearAdditive(epochs=2),
    LatentAdditive(epochs=2, n_hidden=4, n_latent=2),
    DecoderOnly(epochs=2, n_hidden=4),
]
WITHOUT_TRAINING, NETWORKS = METHODS[:11], METHODS[11:]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
each_closed_form = pytest.mark.parametrize(
    "method", WITHOUT_TRAINING, ids=lambda m: type(m).__name__
)


def screen(labels, rows) -> ad.AnnData:
    genes = pd.DataFrame(index=GENES[: len(rows[0])])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(np.array(rows, dtype=np.float32), obs=obs, var=genes)


@pytest.fixture
def train() -> ad.AnnData:
    return screen(*zip(*CELLS, strict=True))


def test_control_mean(train):
    np.testing.assert_allclose(ControlMean().fit(train).predict(["A", "Z+Y"]).X, [CONTROL] * 2)


def test_perturbation_mean_weighs_perturbations_not_cells(train):
    # Effects (2, 2, 0), (0, 0, 3) and (6, 0, 0).
    predicted = PerturbationMean().fit(train).predict(["A", "Z"]).X
    np.testing.assert_allclose(predicted, [[14 / 3, 2 / 3, 3, 1]] * 2, rtol=1e-6)


def test_training_mean(train):
    predicted = TrainingMean().fit(train).predict(["B+A", "A"]).X
    np.testing.assert_allclose(predicted, [[8, 0, 2, 1], [4, 2, 2, 1]])
    with pytest.raises(UnknownPerturbationError, match=r"'A\+C', 'Z'"):
        TrainingMean().fit(train).predict(["A", "Z", "C+A"])


def test_additive_predicts_combinations_from_singles_even_if_they_were_in_training(train):
    predicted = Additive().fit(train).predict(["A+B", "B"]).X
    np.testing.assert_allclose(predicted, [[4, 2, 5, 1], [2, 0, 5, 1]])
    with pytest.raises(UnknownPerturbationError, match="'C'"):
        Additive().fit(train).predict(["A+C"])


def test_matching_mean_falls_back_on_the_mean_of_all_perturbed_cells(train):
    perturbed = np.array([34, 4, 15, 6]) / 6
    a = np.array([4, 2, 2, 1])
    predicted = MatchingMean().fit(train).predict(["A+B", "A+C", "C", "A"]).X
    expected = [[3, 1, 3.5, 1], (a + perturbed) / 2, perturbed, a]
    np.testing.assert_allclose(predicted, expected, rtol=1e-6)


def test_pca_ridge_solves_the_normal_equations(train):
    # Three components hold all variation. With alpha = 1: [[6, 3], [3, 5]] W = [[22, 4, 0],
    # [18, 0, 3]], rows A and B.
    predicted = PCARidge(alpha=1).fit(train).predict(["A", "B", "A+B"]).X
    effects = np.array([[56, 20, -9, 0], [42, -12, 18, 0], [98, 8, 9, 0]]) / 21
    np.testing.assert_allclose(predicted, CONTROL + effects, atol=1e-5)


def test_pca_ridge_shrinks_single_perturbations_by_their_number_of_cells(train):
    singles = train[~train.obs["perturbation"].isin(["A+B", "B+A"])]
    predicted = PCARidge(alpha=2).fit(singles).predict(["A", "B"]).X
    effects = [[2 * 2 / 4, 2 * 2 / 4, 0, 0], [0, 0, 3 * 1 / 3, 0]]
    np.testing.assert_allclose(predicted, CONTROL + effects, atol=1e-5)


def test_pca_ridge_effects_have_the_rank_that_was_asked_for(train):
    predicted = PCARidge(n_components=1).fit(train).predict(["A", "B"]).X - CONTROL
    assert np.linalg.matrix_rank(predicted, tol=1e-5) == 1


def test_pca_ridge_learns_a_perturbation_from_combinations_only():
    train = screen(["control", "A", "A+B", "A+B"], [[0, 0], [1, 0], [1, 2], [1, 2]])
    predicted = PCARidge(alpha=1e-6).fit(train).predict(["B"]).X
    # One component of the two: the axis along which the cells vary.
    axis = np.linalg.svd(train.X - train.X.mean(axis=0))[2][0]
    np.testing.assert_allclose(predicted[0], axis * (axis @ [0, 2]), atol=1e-4)


@each_method
def test_predictions_are_profiles_in_the_order_asked_for(method, train):
    predicted = method.fit(train).predict(["B+A", "A"])
    assert predicted.obs_names.tolist() == ["B+A", "A"]
    assert predicted.obs["perturbation"].tolist() == ["A+B", "A"]
    assert predicted.var_names.tolist() == GENES
    assert np.isfinite(predicted.X).all()
    # Rows do not depend on what else is asked for.
    np.testing.assert_allclose(predicted.X[1:], method.predict(["A"]).X, rtol=1e-5)
    assert method.predict([]).shape == (0, len(GENES))


@each_closed_form
def test_predictions_depend_neither_on_order_nor_on_spelling_nor_on_sparsity(method, train):
    expected = method.fit(train).predict(["A+B"]).X
    shuffled = train[[7, 2, 5, 0, 3, 6, 1, 4]]
    respelled = train.copy()
    respelled.obs["perturbation"] = ["+".join(reversed(x.split("+"))) for x in
                                     train.obs["perturbation"]]  # fmt: skip
    csr, csr_array = train.copy(), train.copy()
    csr.X, csr_array.X = sparse.csr_matrix(train.X), sparse.csr_array(train.X)
    for other in (shuffled, respelled, csr, csr_array):
        np.testing.assert_allclose(method.fit(other).predict(["B+A"]).X, expected, atol=1e-5)


@each_method
def test_training_data_is_not_changed(method, train):
    before = train.copy()
    method.fit(train).predict(["A"]).X[:] = 0
    np.testing.assert_array_equal(train.X, before.X)
    pd.testing.assert_frame_equal(train.obs, before.obs)
    assert (method.predict(["A"]).X != 0).any()


@each_method
def test_what_cannot_be_learned_or_predicted_is_refused_by_name(method, train):
    with pytest.raises(SAMSError, match="call fit first"):
        type(method)().predict(["A"])
    method.fit(train)
    with pytest.raises(UnknownPerturbationError, match="is the control"):
        method.predict(["A", "control"])
    with pytest.raises(SAMSError, match=r"'A\+B' occurs more than once"):
        method.predict(["A+B", "B+A"])
    with pytest.raises(MissingControlError, match="'control'"):
        method.fit(train[train.obs["perturbation"] != "control"])
    with pytest.raises(SAMSError, match="no effect to learn"):
        method.fit(train[train.obs["perturbation"] == "control"])
    with pytest.raises(MissingKeyError, match="'guide'"):
        type(method)(perturbation_key="guide").fit(train)
    train.X[0, 0] = np.nan
    with pytest.raises(InvalidCountsError, match="not finite"):
        method.fit(train)


@pytest.mark.parametrize("method", [*METHODS[5:11], *NETWORKS], ids=lambda m: type(m).__name__)
def test_perturbations_in_no_training_label_are_refused(method, train):
    with pytest.raises(UnknownPerturbationError, match="'Z'"):
        method.fit(train).predict(["A", "A+Z"])


def test_names_in_the_data_can_be_chosen(train):
    train.obs["guide"] = train.obs["perturbation"].str.replace("+", "_").replace("control", "NT")
    method = Additive(perturbation_key="guide", control=["NT", "ctrl"], delimiter="_").fit(train)
    predicted = method.predict(["B_A"])
    assert predicted.obs["guide"].tolist() == ["A_B"]
    np.testing.assert_allclose(predicted.X, [[4, 2, 5, 1]])
    unsplit = Additive(perturbation_key="guide", control="NT", delimiter=None).fit(train)
    np.testing.assert_allclose(unsplit.predict(["A_B"]).X, [[8, 0, 2, 1]])


def constant_screen() -> ad.AnnData:
    means = {"control": [1, 2], "A": [2, 2], "B": [1, 4], "C": [3, 1], "A+B": [2, 4]}
    return screen(np.repeat(list(means), 20), np.repeat(list(means.values()), 20, axis=0))


def test_linear_additive_finds_additive_effects():
    method = LinearAdditive(softplus=False, epochs=300, batch_size=20, learning_rate=0.02)
    predicted = method.fit(constant_screen()).predict(["A", "B", "A+B", "A+C"]).X
    np.testing.assert_allclose(predicted, [[2, 2], [1, 4], [2, 4], [4, 1]], atol=0.05)


def test_linear_additive_starts_from_the_mean_of_the_controls(train):
    method = LinearAdditive(softplus=False, epochs=1, learning_rate=1e-12).fit(train)
    # The map is affine, so what is left of a combination after its singles is the bias.
    a, b, combined = method.predict(["A", "B", "A+B"]).X
    weights = method._network.weight.detach().numpy()
    bias = method._network.bias.detach().numpy()
    np.testing.assert_allclose(a, CONTROL + weights[:, 0] + bias, atol=1e-6)
    np.testing.assert_allclose(combined, a + b - CONTROL - bias, atol=1e-6)


def test_latent_additive_fits_what_is_not_additive():
    data = constant_screen()
    combined = (data.obs["perturbation"] == "A+B").to_numpy()
    data.X[combined] = [5, 0]
    method = LatentAdditive(n_hidden=32, epochs=100, batch_size=20, dropout=0, learning_rate=5e-3)
    predicted = method.fit(data).predict(["A", "A+B"]).X
    np.testing.assert_allclose(predicted, [[2, 2], [5, 0]], atol=0.3)
    assert (predicted > 0).all()


def test_decoder_only_fits_what_is_not_additive_and_sees_no_control_cell():
    data = constant_screen()
    combined = (data.obs["perturbation"] == "A+B").to_numpy()
    data.X[combined] = [5, 0]
    settings = {"n_hidden": 32, "epochs": 100, "batch_size": 20, "dropout": 0}
    method = DecoderOnly(**settings, learning_rate=5e-3)
    predicted = method.fit(data).predict(["A", "A+B"]).X
    np.testing.assert_allclose(predicted, [[2, 2], [5, 0]], atol=0.3)
    assert (predicted > 0).all()
    data.X[(data.obs["perturbation"] == "control").to_numpy()] += 3
    np.testing.assert_array_equal(method.fit(data).predict(["A", "A+B"]).X, predicted)


@pytest.mark.parametrize("method", [LinearAdditive, LatentAdditive, DecoderOnly])
def test_networks_depend_on_their_seed_only(method, train):
    state = torch.get_rng_state()
    settings = {"epochs": 3, "batch_size": 2}
    expected = method(seed=1, **settings).fit(train).predict(["A+B"]).X
    torch.rand(1)
    np.testing.assert_array_equal(
        method(seed=1, **settings).fit(train).predict(["A+B"]).X, expected
    )
    assert np.abs(method(seed=2, **settings).fit(train).predict(["A+B"]).X - expected).max() > 1e-3
    torch.set_rng_state(state)
    method(**settings).fit(train).predict(["A"])
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(SAMSError, match="at least one component"):
        PCARidge(n_components=0)
    with pytest.raises(SAMSError, match="epochs is 0"):
        LinearAdditive(epochs=0)


@pytest.mark.parametrize("seed", range(5))
def test_split_half_predicts_one_half_by_the_other(train, seed):
    train = train[train.obs["perturbation"] != "B"].copy()
    prediction, observed = split_half(train, seed=seed)
    assert prediction.obs["perturbation"].tolist() == ["A", "A+B"]
    labels = train.obs["perturbation"].replace("B+A", "A+B").to_numpy()
    used = np.setdiff1d(np.arange(train.n_obs), observed)
    assert set(np.flatnonzero(labels == "control")) <= set(observed)
    for row, label in enumerate(["A", "A+B"]):
        half = used[labels[used] == label]
        assert 0 < len(half) < (labels == label).sum()
        np.testing.assert_allclose(prediction.X[row], train.X[half].mean(axis=0), rtol=1e-6)


def test_split_half_depends_on_its_seed_only():
    labels = np.repeat(["control", "A", "B"], 30)
    data = screen(labels, np.arange(180).reshape(90, 2))
    first, observed = split_half(data, seed=3)
    again, observed_again = split_half(data, seed=3)
    np.testing.assert_array_equal(first.X, again.X)
    np.testing.assert_array_equal(observed, observed_again)
    assert len(observed) == 60
    assert set(split_half(data, seed=4)[1]) != set(observed)


def test_split_half_refuses_perturbations_without_two_cells(train):
    with pytest.raises(SAMSError, match="'B' has a single cell"):
        split_half(train)
    with pytest.raises(SAMSError, match="controls"):
        split_half(train[train.obs["perturbation"] == "control"])


def test_an_empty_x_is_refused():
    cells = ad.AnnData(obs=pd.DataFrame({"perturbation": ["control", "A"]}, index=["c1", "c2"]))
    with pytest.raises(MissingKeyError, match="X is empty"):
        Additive().fit(cells)


def test_one_gene_has_no_principal_components():
    cells = ad.AnnData(
        np.array([[1.0], [2.0], [4.0]]),
        obs=pd.DataFrame({"perturbation": ["control", "A", "B"]}, index=list("xyz")),
    )
    with pytest.raises(SAMSError, match="two cells and two genes"):
        PCARidge().fit(cells)
