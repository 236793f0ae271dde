"""As many components as predict perturbations that are left out, and none where none do."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features import as_feature_table, from_gmt, match_genes, svd
from scvi_sams.features._svd import _best_ridge, _numbers

NAMES = [f"P{i}" for i in range(60)]


def random_features(n_columns=12, seed=0):
    scales = 1 / np.sqrt(1 + np.arange(n_columns))
    values = np.random.default_rng(seed).normal(size=(len(NAMES), n_columns)) * scales
    return pd.DataFrame(values + 3, index=NAMES)


def effects_of(features, noise, seed=1, n_genes=40):
    random = np.random.default_rng(seed)
    values = features.to_numpy() @ random.normal(size=(features.shape[1], n_genes))
    return pd.DataFrame(values + noise * random.normal(size=values.shape), index=features.index)


def gram(values):
    return np.asarray(values, dtype=float) @ np.asarray(values, dtype=float).T


def test_components_of_dense_features_are_principal_components():
    features = random_features()
    components = svd(features, n_components=12)
    centred = features - features.mean()
    scale = np.square(centred.to_numpy()).sum() / len(NAMES)
    np.testing.assert_allclose(gram(components), gram(centred) / scale, atol=1e-5)
    np.testing.assert_allclose(components.mean(), 0, atol=1e-6)
    squares = np.square(components).mean()
    assert squares.is_monotonic_decreasing
    assert squares.sum() == pytest.approx(1, rel=1e-5)
    few = svd(features, n_components=3)
    np.testing.assert_allclose(few, components.iloc[:, :3], atol=1e-5)
    assert few.attrs == {"n_components": 3}
    assert few.index.tolist() == NAMES


def test_components_of_sparse_features_are_not_centred():
    values = sparse.random_array((60, 9), density=0.3, rng=np.random.default_rng(0)).tocsr()
    components = svd(ad.AnnData(values, obs=pd.DataFrame(index=NAMES)), n_components=9)
    dense = values.toarray()
    scale = np.square(dense).sum() / 60
    np.testing.assert_allclose(gram(components), gram(dense) / scale, atol=1e-5)


@pytest.mark.parametrize("n_components", [1, 4, 12])
def test_the_closed_form_leaves_one_out(n_components):
    features = random_features().to_numpy()[:15, :n_components]
    effects = effects_of(random_features(), noise=2.0).to_numpy()[:15]
    choice = _best_ridge(features, effects)
    left_out = {
        ridge: cross_val_predict(Ridge(ridge), features, effects, cv=LeaveOneOut())
        for ridge in choice.ridge * np.array([0.3, 1, 3])
    }
    of_mean = np.square(effects - (effects.sum(axis=0) - effects) / 14).sum(axis=1)
    errors = [np.square(effects - predicted).sum(axis=1) for predicted in left_out.values()]
    assert np.argmin([error.sum() for error in errors]) == 1
    assert choice.error == pytest.approx(errors[1].sum() / of_mean.sum())
    gains = (of_mean - errors[1]) / of_mean.mean()
    assert choice.standard_error == pytest.approx(gains.std(ddof=1) / np.sqrt(15))


def test_useful_features_choose_components_that_predict_new_perturbations():
    features = random_features(30)
    latent = svd(features, n_components=5)
    effects = effects_of(latent, noise=0.1)
    reduced = svd(features, effects=effects[:40])
    record = reduced.attrs
    assert record["n_components"] == 5
    assert record["n_perturbations"] == 40
    assert json.loads(json.dumps(record)) == record, "plain values: pandas compares and writes them"
    curve = pd.DataFrame(record["curve"]).set_index("n_components")
    assert curve.index.tolist() == [0, 1, 2, 5, 10, 20, 30]
    assert curve["error"].idxmin() == 5
    assert curve.loc[0, "error"] == 1
    assert curve.loc[5, "ridge"] == record["ridge"]
    fitted = Ridge(record["ridge"]).fit(reduced[:40], effects[:40])
    left = effects[40:] - fitted.predict(reduced[40:])
    of_mean = effects[40:] - effects[:40].mean()
    assert np.square(left).sum().sum() < 0.05 * np.square(of_mean).sum().sum()
    pd.testing.assert_frame_equal(reduced, latent, check_exact=False, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_measured", [5, 20, 60])
def test_useless_features_choose_none(seed, n_measured, caplog):
    effects = pd.DataFrame(
        np.random.default_rng(seed + 10).normal(size=(n_measured, 40)), index=NAMES[:n_measured]
    )
    reduced = svd(random_features(30, seed), effects=effects)
    assert reduced.shape == (60, 0)
    assert reduced.attrs["n_components"] == 0
    assert f"of the {n_measured} perturbations with features significantly" in caplog.text
    with pytest.raises(InvalidArgumentError, match=r"has no columns.*features\.svd returns no"):
        as_feature_table(reduced)


def test_effects_may_be_a_table_of_effects_and_hold_other_rows():
    features = random_features()
    effects = effects_of(features, noise=0.1)
    more = pd.concat([effects[::-1], effects[:2].set_axis(["P0+P1", "control"])])
    ate = ad.AnnData(more.to_numpy(), obs=pd.DataFrame(index=more.index))
    pd.testing.assert_frame_equal(svd(features, effects=ate), svd(features, effects=effects))


def test_the_result_does_not_depend_on_units_or_the_seed():
    features, effects = random_features(), effects_of(random_features(), noise=1.0)
    one = svd(features, effects=effects)
    other = svd(features * 1e3, effects=effects * 1e-3 + 7, seed=5)
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(one.attrs["curve"]["error"], other.attrs["curve"]["error"])
    assert one.attrs["ridge"] == pytest.approx(other.attrs["ridge"])


def test_numbers_of_components():
    assert _numbers(1) == [0, 1]
    assert _numbers(2) == [0, 1, 2]
    assert _numbers(60) == [0, 1, 2, 5, 10, 20, 50, 60]
    assert _numbers(500) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_effects_that_are_all_the_same_choose_none():
    reduced = svd(random_features(), effects=pd.DataFrame(1.0, index=NAMES, columns=["g"]))
    assert reduced.attrs["n_components"] == 0
    same = random_features()
    same.iloc[:50] = 1.0
    effects = effects_of(random_features(), noise=1.0)[:50]
    assert svd(same, effects=effects).attrs["n_components"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass either `effects`"),
        ({"n_components": 2, "effects": random_features()}, "Pass either `effects`"),
        ({"n_components": 0}, "`n_components` must be a whole number of at least 1"),
        ({"n_components": 13}, "`n_components` must be at most 12"),
        ({"n_components": 1, "seed": -1}, "`seed`"),
        ({"n_components": 1, "table": pd.DataFrame({"x": [2.0, 2.0]})}, "have the same features"),
        ({"effects": random_features()[:2]}, "2 perturbations have features and effects"),
        (
            {"effects": effects_of(random_features(), 1.0).T.add_prefix("g")},
            "0 perturbations have features and effects.*`table` has 'P0'",
        ),
        ({"effects": random_features().T}, "60 of 60 perturbations are columns .* transpose"),
        ({"effects": random_features().replace(3, 1).assign(x=np.nan)}, "`effects` is nan for"),
        ({"table": "x", "n_components": 1}, "`table` is 'x'"),
    ],
)
def test_what_is_wrong_is_told(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        svd(**{"table": random_features()} | arguments)
    assert type(raised.value).__module__ == "scvi_sams.exceptions"


def test_from_a_file_to_a_table_for_models(tmp_path):
    """Genes of one pathway do the same, in spellings of their own."""
    pathways = {f"PATHWAY_{i}": [f"G{10 * i + j}" for j in range(10)] for i in range(4)}
    (tmp_path / "sets.gmt").write_text(
        "".join(f"{name}\t\t{chr(9).join(genes)}\n" for name, genes in pathways.items())
    )
    perturbations = ["old3", *(f"g{i}" for i in range(20)), *(f"G{i}" for i in range(20, 38))]
    memberships, report = match_genes(
        from_gmt(tmp_path / "sets.gmt"), [*perturbations, "unknown"], aliases={"old3": "G39"}
    )
    assert report["by"].value_counts().to_dict() == {
        "case": 20,
        "symbol": 18,
        "alias": 1,
        "none": 1,
    }
    group = memberships.to_numpy().argmax(axis=1)
    random = np.random.default_rng(0)
    effects = random.normal(size=(4, 30))[group] + 0.3 * random.normal(size=(39, 30))
    measured = pd.DataFrame(effects, index=memberships.index)[1:]
    table = as_feature_table(svd(memberships, effects=measured))
    assert table.n_features == 4
    assert table.missing([*perturbations, "unknown"]) == ["unknown"]
    # The gene that was not measured has the features of its pathway.
    np.testing.assert_allclose(table.rows(["old3"]), table.rows(["G37"]), atol=1e-6)
    assert abs(table.rows(["old3"]) - table.rows(["g0"])).max() > 0.1
