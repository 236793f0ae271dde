"""Average treatment effects: hand computations, uncertainty, what is written and refused."""

import anndata as ad
import numpy as np
import pytest
import torch

from model.builders import (
    COVARIATES,
    N_LATENT,
    VARIANTS,
    assert_within_error,
    covariates_of,
    decode,
    decode_shares,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams.exceptions import MissingControlError, SAMSError, UnknownPerturbationError

LABELS = ["P001", "P002+P004", "P001+P003"]
METHODS = pytest.mark.parametrize("method", ["mean", "lognorm"])
EFFECTS = np.random.default_rng(5).normal(scale=1.5, size=(4, N_LATENT))
SHIFTS = np.stack([EFFECTS[0], EFFECTS[1] + EFFECTS[3], EFFECTS[0] + EFFECTS[2]])
TABLES = ["standard_error", "interval_low", "interval_high"]
N_BY_HAND = 8_000


def ate(model, labels=LABELS, *, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.predict_ate(labels, **({"key_added": None} | kwargs))


def known_effects(setup=None, **model_kwargs):
    """Train a model whose effects are, to all intents, known: EFFECTS."""
    model = train_small(small_screen(), setup, **VARIANTS["mean field"], **model_kwargs)
    set_effects(model, EFFECTS)
    return model


def linear_normal(scale=1e-6):
    """Make a model whose effects on expression are ``WEIGHT @ effect``; returns it and WEIGHT."""
    adata = small_screen()
    model = train_small(
        adata, {"layer": "normalised"}, gene_likelihood="normal", **VARIANTS["mean field"]
    )
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, adata.n_vars))
    set_effects(model, EFFECTS, scale)
    return model, weight


def difference_by_hand(f, basal, shifts):
    """Average f(z + shift) - f(z) over basal states, and its standard error."""
    effects = np.stack([f(basal + shift) - f(basal) for shift in shifts])
    return effects.mean(axis=1), effects.std(axis=1) / len(basal) ** 0.5


def assert_same_effects(found, expected, error):
    combined = np.hypot(found.layers["standard_error"], error)
    assert_within_error(found.X, expected, combined)
    assert np.abs(expected).max() > 20 * combined.max()  # else nothing was compared


def test_mean_effects_equal_a_hand_computation():
    model = known_effects()
    basal = np.random.default_rng(0).normal(size=(N_BY_HAND, N_LATENT))
    expected, error = difference_by_hand(lambda z: 1e4 * decode_shares(model, z), basal, SHIFTS)
    assert_same_effects(ate(model, method="mean", n_samples=10_000), expected, error)
    for_one, error = expected / 1e4, error / 1e4
    found = ate(model, method="mean", n_samples=10_000, target_sum=1, library_size=7)
    assert_same_effects(found, for_one, error)


@pytest.mark.parametrize(
    ("likelihood", "size_factor"), [("nb", False), ("poisson", False), ("nb", True)]
)
def test_lognorm_effects_equal_a_naive_simulation(likelihood, size_factor):
    setup = {"size_factor_key": "transcriptome"} if size_factor else None
    model = known_effects(setup, gene_likelihood=likelihood)
    library, total = (0.3, 5.0) if size_factor else (800.0, 1e3)
    rng = np.random.default_rng(0)

    def f(z):
        mean = library * (np.exp(decode(model, z)) if size_factor else decode_shares(model, z))
        if likelihood == "nb":
            theta = model.module.likelihood.log_inverse_dispersion.detach().exp().numpy()
            mean = rng.gamma(theta, mean / theta)
        counts = rng.poisson(mean)
        size = library if size_factor else counts.sum(axis=-1, keepdims=True)
        return np.log2(1 + total * counts / size)

    basal = rng.normal(size=(N_BY_HAND, N_LATENT))
    expected, error = difference_by_hand(f, basal, SHIFTS)
    found = ate(model, n_samples=10_000, library_size=library, target_sum=total)
    assert found.uns["ate"]["method"] == "lognorm"
    assert_same_effects(found, expected, error)


def test_lograte_effects_equal_a_hand_computation():
    model = known_effects()
    basal = np.random.default_rng(0).normal(size=(N_BY_HAND, N_LATENT))
    expected, error = difference_by_hand(
        lambda z: np.log2(1 + 1e3 * decode_shares(model, z)), basal, SHIFTS
    )
    found = ate(model, method="lograte", n_samples=10_000, target_sum=1e3)
    assert_same_effects(found, expected, error)
    assert "expected counts" in found.uns["ate"]["units"]


def test_norms_are_those_of_draws():
    """Of one latent dimension with effect e the effect on expression is e * weight."""
    model, weight = linear_normal()
    effects, scale = np.zeros((4, N_LATENT)), np.full((4, N_LATENT), 1e-6)
    effects[:, 2], scale[:, 2] = [3.0, -2.0, 0.0, 1.0], [0.1, 0.2, 0.3, 1e-6]
    set_effects(model, effects, scale)
    found = ate(model, None, method="mean", n_samples=20_000, n_posterior_samples=20_000).obs
    unit = np.linalg.norm(weight[:, 2])
    # The mean of |e| where e ~ Normal(0, 0.3) is 0.3 sqrt(2 / pi), its quantiles as of that.
    norm = [3.0, 2.0, 0.3 * np.sqrt(2 / np.pi), 1.0]
    np.testing.assert_allclose(found["effect_norm"] / unit, norm, rtol=0.02)
    low = [3 - 1.96 * 0.1, 2 - 1.96 * 0.2, 0.3 * 0.03134, 1.0]
    np.testing.assert_allclose(found["effect_norm_low"] / unit, low, atol=0.02)
    high = [3 + 1.96 * 0.1, 2 + 1.96 * 0.2, 0.3 * 2.2414, 1.0]
    np.testing.assert_allclose(found["effect_norm_high"] / unit, high, atol=0.03)


@pytest.mark.parametrize("method", ["mean", "lograte", "lognorm"])
def test_what_changes_nothing_has_no_norm(method):
    """No noise, which would be the same in every gene, passes for an effect."""
    model = known_effects()
    set_effects(model, np.zeros((4, N_LATENT)), 1e-9)
    found = ate(model, ["P001", "P002"], method=method, n_samples=200).obs
    assert (found["effect_norm_high"] < 1e-3).all()


def test_a_size_factor_model_predicts_rates_that_need_not_sum_to_one():
    model = known_effects({"size_factor_key": "transcriptome"})
    basal = np.random.default_rng(0).normal(size=(N_BY_HAND, N_LATENT))
    expected, error = difference_by_hand(lambda z: 10 * np.exp(decode(model, z)), basal, SHIFTS)
    found = ate(model, method="mean", n_samples=10_000, target_sum=10)
    assert_same_effects(found, expected, error)
    assert np.abs(found.X.sum(axis=1)).min() > 1


def test_covariates_are_those_of_control_cells():
    model = known_effects(COVARIATES)
    obs = model.adata.obs
    controls = covariates_of(obs[obs["perturbation"] == "control"])
    rng = np.random.default_rng(0)
    drawn = controls[rng.integers(len(controls), size=N_BY_HAND)]
    basal = rng.normal(size=(N_BY_HAND, N_LATENT))
    expected, error = difference_by_hand(
        lambda z: 1e4 * decode_shares(model, z, drawn), basal, SHIFTS
    )
    assert_same_effects(ate(model, method="mean", n_samples=10_000), expected, error)


@pytest.mark.parametrize("setup", [None, COVARIATES], ids=["none", "covariates"])
def test_basal_states_of_controls_are_draws_from_their_posteriors(setup):
    model = known_effects(setup)
    obs = model.adata.obs
    cells = np.flatnonzero(obs["perturbation"] == "control")
    torch.manual_seed(1)
    basal = model.get_latent_representation(
        indices=cells, give_mean=False, n_samples=400, key_added=None
    )
    covariates = None if setup is None else np.tile(covariates_of(obs.iloc[cells]), (400, 1))
    expected, error = difference_by_hand(
        lambda z: 1e4 * decode_shares(model, z, covariates), basal.reshape(-1, N_LATENT), SHIFTS
    )
    found = ate(model, method="mean", n_samples=20_000, basal="control")
    assert_same_effects(found, expected, error)
    assert found.uns["ate"]["basal"] == "control"
    prior = ate(model, method="mean", n_samples=20_000)
    far = np.abs(prior.X - expected) / np.hypot(prior.layers["standard_error"], error)
    assert far.max() > 10  # the two kinds of basal states can be told apart here


def test_effects_of_a_linear_decoder_are_exact_and_additive():
    model, weight = linear_normal()
    found = ate(model, ["P002", "P004", "P002+P004", "P001"], method="mean", n_samples=200)
    expected = np.stack([EFFECTS[1], EFFECTS[3], SHIFTS[1], EFFECTS[0]]) @ weight.T
    np.testing.assert_allclose(found.X, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.X[2], found.X[0] + found.X[1], atol=1e-4)
    assert found.layers["standard_error"].max() < 1e-4


def test_doses_scale_the_shift_of_their_perturbation():
    model, weight = linear_normal()
    found = ate(model, ["P001", "P004+P002"], dosages=["2", "0.5+3"], method="mean")
    expected = np.stack([2 * EFFECTS[0], 0.5 * EFFECTS[3] + 3 * EFFECTS[1]]) @ weight.T
    np.testing.assert_allclose(found.X, expected, rtol=1e-4, atol=1e-4)
    doubled = ate(model, ["P001"], dosages=[2.0], method="mean")
    np.testing.assert_allclose(doubled.X, 2 * ate(model, ["P001"], method="mean").X, atol=1e-4)


@METHODS
def test_the_order_of_names_plays_no_part(any_variant, method):
    one = ate(any_variant, ["P001+P003", "P004"], method=method)
    other = ate(any_variant, ["P003+P001", "P004"], method=method)
    np.testing.assert_array_equal(one.X, other.X)
    assert list(one.obs_names) == list(other.obs_names) == ["P001+P003", "P004"]


@METHODS
def test_combinations_that_nobody_measured(any_variant, method):
    unseen = "P001+P002+P003+P004"
    assert unseen not in set(any_variant.adata.obs["perturbation"])
    found = ate(any_variant, [unseen, "P001"], method=method)
    assert np.isfinite(found.X).all()
    assert np.abs(found.X[0] - found.X[1]).max() > 3 * found.layers["standard_error"].max()


@METHODS
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_effect_of_zero_is_exactly_zero(variant, method):
    """Both arms share all their random numbers."""
    model = train_small(small_screen(), **VARIANTS[variant])
    with torch.no_grad():
        model.module.masks.logits[0] = -40.0
    found = ate(model, ["P001", "P002", "control"], method=method)
    for values in (found.X, *(found.layers[name] for name in TABLES)):
        assert (values[[0, 2]] == 0).all()
        assert np.abs(values[1]).max() > 0


@METHODS
@pytest.mark.parametrize("basal", ["prior", "control"])
@pytest.mark.parametrize("model", ["mean_field", "default_model"])
def test_the_standard_error_is_the_spread_between_calls(request, model, method, basal):
    model = request.getfixturevalue(model)
    settings = {"method": method, "basal": basal, "n_samples": 200, "n_posterior_samples": 40}
    calls = [ate(model, seed=seed, **settings) for seed in range(60, 120)]
    spread = np.std([call.X for call in calls], axis=0, ddof=1)
    reported = np.mean([call.layers["standard_error"] for call in calls], axis=0)
    ratio = reported / spread
    assert 0.85 < np.median(ratio) < 1.15
    assert 0.7 < ratio[spread > np.quantile(spread, 0.1)].mean() < 1.3


@pytest.mark.parametrize(("interval", "n_sd"), [(0.95, 1.960), (0.5, 0.6745)])
def test_the_interval_holds_the_posterior_of_the_effect(interval, n_sd):
    scale = np.random.default_rng(7).uniform(0.2, 0.6, size=EFFECTS.shape)
    model, weight = linear_normal(scale)
    found = ate(
        model,
        ["P001", "P002+P004"],
        method="mean",
        n_samples=20_000,
        n_posterior_samples=20_000,
        interval=interval,
    )
    variances = np.stack([scale[0] ** 2, scale[1] ** 2 + scale[3] ** 2])
    half_width = n_sd * np.sqrt(variances @ (weight**2).T)
    centre = SHIFTS[:2] @ weight.T
    low, high = found.layers["interval_low"], found.layers["interval_high"]
    np.testing.assert_allclose((centre - low) / half_width, 1, atol=0.06)
    np.testing.assert_allclose((high - centre) / half_width, 1, atol=0.06)
    assert found.uns["ate"]["interval"] == interval


@METHODS
def test_without_intervals_the_rest_is_the_same(default_model, method):
    settings = {"method": method, "n_samples": 200, "n_posterior_samples": 40}
    whole = ate(default_model, **settings)
    short = ate(default_model, interval=None, **settings)
    assert set(TABLES) & set(short.layers) == {"standard_error"}
    assert list(short.obs) == ["perturbation", "dosage", "effect_norm"]
    np.testing.assert_array_equal(short.X, whole.X)
    np.testing.assert_array_equal(short.layers["standard_error"], whole.layers["standard_error"])
    np.testing.assert_array_equal(short.obs["effect_norm"], whole.obs["effect_norm"])


def test_without_intervals_the_table_survives_a_file(default_model, tmp_path):
    ate(default_model, interval=None, method="mean").write_h5ad(tmp_path / "ate.h5ad")
    read = ad.read_h5ad(tmp_path / "ate.h5ad")
    assert read.uns["ate"]["interval"] == "none"


def test_how_many_labels_are_summed_at_once_changes_nothing(default_model, monkeypatch):
    labels = ["P001", "control", "P002+P004", "P001+P002"]
    whole = ate(default_model, labels, method="mean")
    monkeypatch.setattr("scvi_sams.model._counterfactual._SHIFTS_AT_ONCE", 1)
    np.testing.assert_array_equal(ate(default_model, labels, method="mean").X, whole.X)


def test_the_number_of_draws_is_reported(default_model):
    found = ate(default_model, n_samples=210, n_posterior_samples=50)
    assert found.uns["ate"]["n_posterior_samples"] == 50
    assert found.uns["ate"]["n_samples"] == 200


def test_how_many_draws_are_held_in_memory_changes_nothing(default_model, monkeypatch):
    monkeypatch.setattr("scvi_sams.model._contrast._VALUES_AT_ONCE", 2**24)
    whole = ate(default_model, method="mean")
    monkeypatch.setattr("scvi_sams.model._contrast._VALUES_AT_ONCE", 2000)
    np.testing.assert_allclose(ate(default_model, method="mean").X, whole.X, rtol=1e-4, atol=1e-3)


def test_every_single_perturbation_by_default_and_genes_in_order(default_model):
    found = ate(default_model, None)
    assert list(found.obs_names) == default_model.perturbations
    assert list(found.var_names) == list(default_model.adata.var_names)


@METHODS
def test_a_seed_fixes_the_result_and_is_not_reset(default_model, method):
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    state = np.random.get_state()  # noqa: NPY002
    first = default_model.predict_ate(LABELS, method=method, key_added=None)
    second = default_model.predict_ate(LABELS, method=method, key_added=None)
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert np.abs(first.X - second.X).max() > 0
    np.testing.assert_array_equal(ate(default_model, method=method, seed=4).X, first.X)


@METHODS
@pytest.mark.parametrize("setup", [None, COVARIATES], ids=["none", "covariates"])
def test_tables_survive_a_file(tmp_path, method, setup):
    model = train_small(small_screen(), setup)
    found = model.predict_ate(LABELS, method=method)
    model.predict_ate(["P003"], method=method, key_added="other")
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    uns = ad.read_h5ad(tmp_path / "screen.h5ad").uns
    read = uns["sams_ate"]
    np.testing.assert_array_equal(read["effect"], found.X)
    for name in TABLES:
        np.testing.assert_array_equal(read[name], found.layers[name])
    assert list(read["perturbations"]) == LABELS
    assert list(read["genes"]) == list(model.adata.var_names)
    assert read["method"] == method
    assert "log2" in read["units"] if method == "lognorm" else "log" not in read["units"]
    assert list(uns["other"]["perturbations"]) == ["P003"]

    found.write_h5ad(tmp_path / "ate.h5ad")
    assert ad.read_h5ad(tmp_path / "ate.h5ad").uns["ate"]["units"] == read["units"]


def test_no_key_no_change(covariate_model):
    before = set(covariate_model.adata.uns), set(covariate_model.adata.obs)
    ate(covariate_model, basal="control")
    assert (set(covariate_model.adata.uns), set(covariate_model.adata.obs)) == before


def test_what_was_written_does_not_change_with_the_returned_table():
    model = train_small(small_screen())
    found = model.predict_ate(["P001"])
    before = found.X.copy(), found.layers["standard_error"].copy()
    found.X[:] = 7
    found.layers["standard_error"][:] = 7
    np.testing.assert_array_equal(model.adata.uns["sams_ate"]["effect"], before[0])
    np.testing.assert_array_equal(model.adata.uns["sams_ate"]["standard_error"], before[1])


def test_cells_so_small_that_some_have_no_counts_give_no_nan(default_model):
    found = ate(default_model, library_size=2.0)
    assert np.isfinite(found.X).all()


def test_unknown_perturbations_are_named(default_model):
    with pytest.raises(UnknownPerturbationError, match=r"'P1'.*did you mean"):
        ate(default_model, ["P002", "P1+P002"])


@pytest.mark.parametrize(
    "wrong", [{"method": "log"}, {"basal": "posterior"}, {"interval": 1.5}], ids=str
)
def test_wrong_settings_are_refused(default_model, covariate_model, wrong):
    for model in (default_model, covariate_model):
        with pytest.raises(SAMSError, match=str(next(iter(wrong.values())))):
            ate(model, **wrong)


def test_one_posterior_sample_has_no_spread_to_report(default_model):
    with pytest.raises(SAMSError, match="n_posterior_samples"):
        ate(default_model, n_posterior_samples=1)


def test_lognorm_of_a_normal_likelihood_is_refused(normal_model):
    with pytest.raises(SAMSError, match="method='mean'"):
        ate(normal_model)
    assert ate(normal_model, method="mean").uns["ate"]["units"] == "units of the data"


def test_data_without_controls_gives_effects_from_the_prior(default_model, tmp_path):
    default_model.save(tmp_path / "model")
    perturbed = default_model.adata[default_model.adata.obs["perturbation"] != "control"].copy()
    loaded = type(default_model).load(tmp_path / "model", perturbed, accelerator="cpu")
    expected = ate(default_model, method="mean", n_samples=20_000)
    found = ate(loaded, method="mean", n_samples=20_000, seed=1)
    error = np.hypot(found.layers["standard_error"], expected.layers["standard_error"])
    assert_within_error(found.X, expected.X, error)
    with pytest.raises(MissingControlError):
        ate(loaded, basal="control")
