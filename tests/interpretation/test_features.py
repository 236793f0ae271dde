"""What features say of latent dimensions: weights of columns by hand, ranks, and saying nothing."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from model.builders import N_LATENT, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import SAMSError
from scvi_sams.features import as_feature_table
from scvi_sams.interpretation import feature_importance
from scvi_sams.module._feature_prior import MOST_FEATURES

N_PERTURBATIONS = 12


@pytest.fixture(scope="module")
def adata():
    return small_screen(n_perturbations=N_PERTURBATIONS, n_combinations=0)


def table_of(adata, n_columns, n_unmeasured=2):
    """Random numbers on scales of their own, of measured perturbations and of others."""
    names = sorted(set(adata.obs["perturbation"]) - {"control"})
    names += [f"new{place}" for place in range(n_unmeasured)]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(names), n_columns)) * rng.uniform(0.1, 10, n_columns) + 3
    columns = [f"f{place}" for place in range(n_columns)]
    return pd.DataFrame(values, index=names, columns=columns)


def with_weights(adata, features):
    """A model as after training, but for what it says of cells."""
    SAMSVAE.setup_anndata(adata)
    made = SAMSVAE(adata, n_latent=N_LATENT, n_hidden=4, perturbation_features=features)
    made.is_trained_ = True
    set_weights(made)
    return made


def set_weights(model, seed=1):
    """Posteriors of all weights but those of dimension 0, which has none."""
    prior = model.module.features
    n_weights = prior.mask_weights.shape[0]
    rng = np.random.default_rng(seed)
    for name in ("mask", "effect"):
        means = rng.normal(size=(n_weights, N_LATENT))
        roots = rng.normal(size=(N_LATENT, n_weights, n_weights)) / 5
        covariances = roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(n_weights)
        means[:, 0], covariances[0] = 0, 0
        getattr(prior, f"{name}_weights").copy_(torch.as_tensor(means))
        getattr(prior, f"{name}_covariance").copy_(torch.as_tensor(covariances))
    prior.unexplained.fill_(0.75)


@pytest.fixture(scope="module")
def model(adata):
    made = train_small(adata.copy(), perturbation_features=table_of(adata, 3))
    set_weights(made)
    return made


def entry(table, part, feature, latent):
    chosen = table.query("part == @part and feature == @feature and latent == @latent")
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_a_few_columns_have_the_weights_of_the_prior(model):
    prior, table = model.module.features, feature_importance(model)
    assert len(table) == 2 * 3 * (N_LATENT - 1)
    for part, latent, column in (("mask", 1, 0), ("effect", 3, 2)):
        row = entry(table, part, f"f{column}", f"latent_{latent}")
        mean = float(getattr(prior, f"{part}_weights")[column, latent])
        sd = float(getattr(prior, f"{part}_covariance")[latent, column, column]) ** 0.5
        assert row["weight"] == pytest.approx(mean)
        assert row["sd"] == pytest.approx(sd)
        assert row["lfsr"] == pytest.approx(norm.cdf(-abs(mean) / sd))


def test_the_surest_come_first(model):
    table = feature_importance(model)
    assert (np.diff(np.abs(table["weight"] / table["sd"])) <= 1e-12).all()
    assert table["lfsr"].is_monotonic_increasing


def test_a_dimension_without_weights_has_no_rows(model):
    assert set(feature_importance(model)["latent"]) == {"latent_1", "latent_2", "latent_3"}


def test_weights_are_those_of_a_step_of_one_sd(adata, model):
    """The mean of effects that the prior gives changes by the weight."""
    features = table_of(adata, 3)
    measured = features.loc[model.perturbations]
    step = measured["f1"].std(ddof=0)
    changed = features.copy()
    changed.loc["new0"] = changed.loc["new1"] = measured.mean()
    changed.loc["new1", "f1"] += step
    other = with_weights(adata, changed)
    rows = torch.tensor([other.unmeasured.index(name) for name in ("new0", "new1")])
    prior = other.module.features.of(len(other.perturbations) + rows)
    moved = prior.mean[1] - prior.mean[0]
    table = feature_importance(other)
    for latent in range(1, N_LATENT):
        row = entry(table, "effect", "f1", f"latent_{latent}")
        assert row["weight"] == pytest.approx(float(moved[latent]), rel=1e-4)


def test_weights_of_many_columns_are_taken_back_through_their_components(adata):
    n_columns = MOST_FEATURES + 20
    features = table_of(adata, n_columns)
    made = with_weights(adata, features)
    prior, table = made.module.features, feature_importance(made)
    # By hand: what the model holds of measured perturbations are standardised columns times P.
    measured = features.loc[made.perturbations]
    standardised = (measured - measured.mean()) / measured.std(ddof=0)
    components = prior.features[:N_PERTURBATIONS, :-1].double().numpy()
    assert components.shape[1] == N_PERTURBATIONS - 1
    projection = np.linalg.pinv(standardised.to_numpy()) @ components
    for part in ("mask", "effect"):
        v = getattr(prior, f"{part}_weights")[:-1].double().numpy()
        covariance = getattr(prior, f"{part}_covariance")[:, :-1, :-1].double().numpy()
        of_part = table[table["part"] == part]
        weight, sd = (
            of_part.pivot(index="feature", columns="latent", values=name).loc[features.columns]
            for name in ("weight", "sd")
        )
        np.testing.assert_allclose(weight, (projection @ v)[:, 1:], rtol=1e-4, atol=1e-5)
        for latent in range(1, N_LATENT):
            whole = projection @ covariance[latent] @ projection.T
            expected = np.sqrt(np.diag(whole))
            np.testing.assert_allclose(sd[f"latent_{latent}"], expected, rtol=1e-3)
        # The same prior: what columns say with these weights is what components say.
        np.testing.assert_allclose(
            standardised.to_numpy() @ weight.to_numpy(), (components @ v)[:, 1:], atol=1e-3
        )


def test_columns_that_do_not_differ_are_left_out(adata):
    features = table_of(adata, 3)
    features.loc[features.index.str.startswith("P"), "f1"] = 2.0
    made = with_weights(adata, features)
    assert set(feature_importance(made)["feature"]) == {"f0", "f2"}


def test_sparse_tables_have_the_same_weights(adata, model):
    features = table_of(adata, 3)
    as_sparse = features.astype(pd.SparseDtype(float, 0.0))
    other = with_weights(adata, as_sparse)
    found, expected = (feature_importance(made) for made in (other, model))
    assert found.attrs["prediction"] == {}  # not trained
    pd.testing.assert_frame_equal(found, expected)


def test_what_is_explained_and_what_predictions_are_made_of(model):
    attrs = feature_importance(model).attrs
    assert attrs["explained"] == 0.25
    weights = model.module.unmeasured.weights.tolist()
    names = ("model", "shifts", "genes", "mean of perturbations")
    assert attrs["prediction"] == dict(zip(names, weights, strict=True))


def test_a_loaded_model_says_the_same(model, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SAMSVAE.load(tmp_path / "model", accelerator="cpu")
    pd.testing.assert_frame_equal(feature_importance(loaded), feature_importance(model))


def test_features_that_say_nothing_have_no_rows_and_a_warning(adata, caplog):
    """Those of other perturbations, of two epochs: nothing is learned of them."""
    shuffled = as_feature_table(table_of(adata, 3)).shuffled(seed=0)
    made = train_small(adata.copy(), perturbation_features=shuffled)
    assert float(made.module.features.unexplained) == 1
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        table = feature_importance(made)
    assert table.empty
    assert list(table.columns) == ["feature", "latent", "part", "weight", "sd", "lfsr"]
    assert table.attrs["explained"] == 0
    assert "Features are uninformative about latent dimensions" in caplog.text


def test_where_weights_are_known_nothing_is_warned_of(model, caplog):
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        feature_importance(model)
    assert not caplog.records


def test_learned_features_stand_before_noise():
    """Features that decide on masks and effects are found among as many that say nothing."""
    screen = small_screen(
        n_perturbations=60,
        n_combinations=0,
        cells_per_perturbation=5,
        n_features=2,
        n_noise_features=2,
        feature_share=0.9,
        mask_probability=0.5,
    )
    SAMSVAE.setup_anndata(screen)
    made = SAMSVAE(screen, n_latent=N_LATENT, perturbation_features="perturbation_features")
    made.is_trained_ = True
    truth = screen.uns["simulation"]
    effects = torch.as_tensor(truth["true_masks"] * truth["true_effects"], dtype=torch.float32)
    made.module.features.fit(effects, torch.full_like(effects, 0.01), torch.arange(60))
    table = feature_importance(made)
    assert table.attrs["explained"] > 0.5
    surest = table[table["lfsr"] < 0.001]
    assert set(surest["feature"]) == {"feature_01", "feature_02"}
    true_weights = pd.DataFrame(
        truth["true_effect_weights"],
        index=screen.uns["perturbation_features"].columns,
        columns=[f"latent_{latent}" for latent in range(N_LATENT)],
    )
    for row in surest[surest["part"] == "effect"].itertuples():
        assert abs(row.weight - true_weights.loc[row.feature, row.latent]) < 4 * row.sd + 0.2


def test_models_without_features_are_an_error(adata):
    made = train_small(adata.copy())
    with pytest.raises(SAMSError, match=r"has no features .*perturbation_features=\.\.\."):
        feature_importance(made)


def test_untrained_models_are_an_error(adata):
    SAMSVAE.setup_anndata(adata)
    made = SAMSVAE(adata, n_latent=2, perturbation_features=table_of(adata, 2))
    with pytest.raises(SAMSError, match="train the model"):
        feature_importance(made)
