"""Baselines that predict unmeasured perturbations, against regressions solved in another way."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.baselines._features import FeatureNeighbours, FeatureRidge, _random_effects_weights
from scvi_sams.baselines._simple import TrainingMean
from scvi_sams.exceptions import InvalidArgumentError, UnknownPerturbationError
from scvi_sams.features._table import FeatureTable

each_method = pytest.mark.parametrize("method", [FeatureRidge, FeatureNeighbours])
NEW = ["N1", "N2", "N3"]


def cells_of(n_cells, seed=0, effect=None, noise=0.5):
    """A screen of some cells per perturbation, ``X`` already log-normalised, 6 genes."""
    rng = np.random.default_rng(seed)
    names = [f"P{i:02d}" for i in range(len(n_cells))]
    effects = rng.normal(size=(len(names), 6)) if effect is None else effect
    labels = np.repeat(["control", *names], [20, *n_cells])
    shift = np.repeat(np.vstack([np.zeros(6), effects]), [20, *n_cells], axis=0)
    cells = ad.AnnData(5 + shift + noise * rng.normal(size=shift.shape))
    cells.obs["perturbation"] = labels
    return cells, names


def table_of(names, n_columns, seed=1):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(names) + len(NEW), n_columns)) * np.geomspace(0.1, 9, n_columns)
    return pd.DataFrame(values + 3, index=[*names, *NEW])


def solved(x, y, weights, alpha):
    """Ridge with an intercept, by normal equations in which the intercept has no penalty."""
    design = np.column_stack([np.ones(len(x)), x])
    penalty = alpha * np.eye(design.shape[1])
    penalty[0, 0] = 0
    return np.linalg.solve((design.T * weights) @ design + penalty, (design.T * weights) @ y)


def predicted_by(coefficients, x):
    return coefficients[0] + x @ coefficients[1:]


@pytest.mark.parametrize("n_columns", [3, 40])
def test_ridge_is_the_one_of_least_error_where_each_is_left_out(n_columns):
    truth = np.random.default_rng(5).normal(size=(n_columns, 6))
    n_cells = np.array([2, 3, 5, 8, 40, 4, 9, 12, 30, 6, 3, 7])
    names = [f"P{i:02d}" for i in range(12)]
    table = table_of(names, n_columns)
    # Columns that go together, so that many of them still tell something of few perturbations.
    table += (
        20 * table_of(names, 2).to_numpy() @ np.random.default_rng(3).normal(size=(2, n_columns))
    )
    x_all = (table - table.loc[names].mean()) / table.loc[names].std(ddof=0)
    rest = np.random.default_rng(2).normal(size=(12, 6))
    effect = x_all.loc[names].to_numpy() @ truth / np.sqrt(n_columns) + rest
    cells, _ = cells_of(n_cells, effect=effect, noise=2.0)
    method = FeatureRidge(table).fit(cells)
    x, y = x_all.loc[names].to_numpy(), np.asarray(method.effects.X)
    # Weights by hand: variances between effects and within perturbations, summed over genes.
    within = sum(
        np.square(group - group.mean(axis=0)).sum()
        for group in (cells[cells.obs["perturbation"] == name].X for name in names)
    ) / (n_cells.sum() - 12)
    between = y.var(axis=0, ddof=1).sum() - (within / n_cells).mean()
    weights = 1 / (between + within / n_cells)
    weights /= weights.mean()
    assert weights.max() > 1.2 * weights.min()

    def error(alpha):
        left_out = np.eye(12, dtype=bool)
        residuals = [
            y[one] - predicted_by(solved(x[~one], y[~one], weights[~one], alpha), x[one])
            for one in left_out
        ]
        return weights @ np.square(np.concatenate(residuals)).sum(axis=1)

    alphas = n_columns * np.logspace(-3, 5, 33)
    errors = [error(alpha) for alpha in alphas]
    assert 0 < np.argmin(errors) < 32
    assert method.alpha == pytest.approx(alphas[np.argmin(errors)])
    expected = predicted_by(solved(x, y, weights, method.alpha), x_all.loc[NEW].to_numpy())
    predicted = method.predict(NEW).X - method.control_mean
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


def test_effects_that_features_determine_are_recovered():
    names = [f"P{i:02d}" for i in range(30)]
    table = table_of(names, 4)
    weights = np.random.default_rng(3).normal(size=(4, 6))
    effect = (table.to_numpy() - 3) @ weights
    cells, _ = cells_of([200] * 30, effect=effect[:30])
    predicted = FeatureRidge(table).fit(cells).predict(NEW).X - 5
    np.testing.assert_allclose(predicted, effect[30:], atol=0.3)
    assert np.abs(effect[30:]).max() > 5


def test_features_without_a_message_leave_the_mean_effect():
    cells, names = cells_of([10] * 40)
    method = FeatureRidge(table_of(names, 3, seed=8)).fit(cells)
    mean = method.control_mean + method.effects.X.mean(axis=0)
    np.testing.assert_allclose(method.predict(NEW).X, [mean] * 3, atol=0.05)
    assert np.ptp(method.effects.X, axis=0).min() > 2


def test_weights_are_those_of_a_random_effect():
    effects = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    # Variance between: (1 + 1 + 9 - 3) / 2 = 4; errors 1, 1 and 4, of mean 2, leave 2.
    weights = _random_effects_weights(effects, np.array([4, 4, 1]), within=4.0)
    expected = np.array([1 / 3, 1 / 3, 1 / 6])
    np.testing.assert_allclose(weights, expected / expected.mean())
    # Effects that differ by less than their errors: by cells.
    weights = _random_effects_weights(effects / 100, np.array([4, 4, 1]), within=4.0)
    np.testing.assert_allclose(weights, np.array([4, 4, 1]) / 3)
    # One cell each: nothing tells errors from effects.
    np.testing.assert_allclose(_random_effects_weights(effects, np.ones(3), within=0.0), 1)
    np.testing.assert_allclose(_random_effects_weights(0 * effects, np.ones(3), within=0.0), 1)


def test_neighbours_are_those_of_the_largest_cosine():
    effect = np.diag([1.0, 2.0, 3.0, 4.0, 0.0, 0.0])[:4]
    cells, names = cells_of([3] * 4, effect=effect)
    # Standardised, columns are (1, 1, -1, -1) and (1, -1, 1, -1); the third is the same for all.
    table = pd.DataFrame(
        [[12, 3, 7], [12, 1, 7], [8, 3, 7], [8, 1, 7], [100, 2.2, 0], [7, 0.4, 9]],
        index=[*names, "N1", "N2"],
    )
    method = FeatureNeighbours(table, k=2).fit(cells)
    effects = np.asarray(method.effects.X)
    predicted = method.predict(["N1", "N2"]).X - method.control_mean
    # (45, 0.2) points to the first two, (-1.5, -1.6) to the last, then to the third.
    np.testing.assert_allclose(predicted[0], effects[[0, 1]].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(predicted[1], effects[[3, 1]].mean(axis=0), atol=1e-6)
    all_of_them = FeatureNeighbours(table, k=99).fit(cells).predict(["N1"]).X
    np.testing.assert_allclose(all_of_them[0] - method.control_mean, effects.mean(axis=0))


@each_method
def test_combinations_add_up_measured_and_unmeasured_parts(method):
    cells, names = cells_of([5] * 8)
    pair = cells[:4].copy()
    pair.obs["perturbation"] = "P00+P01"
    train = ad.concat([cells, pair], index_unique="-")
    fitted = method(table_of(names, 3)).fit(train)
    c = fitted.control_mean
    one, new, other, known = (
        fitted.predict([label]).X[0] - c for label in ("P00", "N1", "N2", "P01")
    )
    np.testing.assert_allclose(one, TrainingMean().fit(train).predict(["P00"]).X[0] - c)
    for label, effect in (
        ("N1+P00", one + new), ("N1+N2", new + other), ("P01+P00", one + known)
    ):  # fmt: skip
        np.testing.assert_allclose(fitted.predict([label]).X[0] - c, effect, atol=1e-6)
    assert np.abs(new).max() > 0.01


@each_method
def test_a_perturbation_of_combinations_only_is_predicted_from_features(method):
    cells, names = cells_of([5] * 8)
    moved = cells.copy()
    moved.obs["perturbation"] = moved.obs["perturbation"].replace("P07", "P07+P06")
    table = table_of(names, 3)
    without = cells[cells.obs["perturbation"] != "P07"]
    expected = method(table).fit(without).predict(["P07"]).X
    if method is FeatureNeighbours:
        np.testing.assert_allclose(method(table).fit(moved).predict(["P07"]).X, expected)
    else:  # cells of the pair count in the variance within labels
        np.testing.assert_allclose(method(table).fit(moved).predict(["P07"]).X, expected, atol=0.05)


@each_method
def test_what_tables_look_like_does_not_matter(method):
    cells, names = cells_of([4, 9, 5, 3, 8, 6, 7])
    table = table_of(names, 5).mul(np.random.default_rng(0).random((10, 5)) > 0.3)
    before = table.copy()
    expected = method(table).fit(cells).predict(NEW).X
    pd.testing.assert_frame_equal(table, before)
    others = {
        "sparse": FeatureTable(tuple(table.index), tuple("abcde"), sparse.csr_matrix(table)),
        "order": table.iloc[::-1, ::-1],
        "units": table * [1, 1e6, -3, 1e-6, 2],
        "constant": table.assign(other=7.3),
        "more rows": pd.concat([table, table.set_axis(table.index + "x")]),
    }
    for name, other in others.items():
        found = method(other).fit(cells).predict(NEW).X
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


@each_method
def test_shuffled_features_are_those_of_other_perturbations(method):
    cells, names = cells_of([5] * 10)
    table = FeatureTable((*names, *NEW), tuple("abc"), table_of(names, 3).to_numpy())
    by_hand = method(table.shuffled(3)).fit(cells).predict(NEW).X
    shuffled = method(table, shuffled=True, seed=3)
    np.testing.assert_array_equal(shuffled.fit(cells).predict(NEW).X, by_hand)
    assert shuffled.features is table
    assert not np.allclose(method(table).fit(cells).predict(NEW).X, by_hand)


@each_method
def test_what_cannot_be_predicted_raises(method):
    cells, names = cells_of([5] * 4)
    table = table_of(names, 2)
    fitted = method(table.drop(index="P03")).fit(cells)
    assert fitted.predict(["P03"]).n_obs == 1  # it has cells of its own
    with pytest.raises(UnknownPerturbationError, match="No features of 'N9'"):
        fitted.predict(["N1", "N9+P00"])
    with pytest.raises(InvalidArgumentError, match="`perturbation_features`"):
        method().fit(cells)
    with pytest.raises(InvalidArgumentError, match=r"Only 1 of 4 .* has features"):
        method(table.loc[["P00", *NEW]]).fit(cells)
    with pytest.raises(InvalidArgumentError, match=r"transpose the table"):
        method(table.T).fit(cells)
    with pytest.raises(InvalidArgumentError, match="are the same"):
        method(table * 0 + 4).fit(cells)
    with pytest.raises(InvalidArgumentError, match="`features`"):
        method([1, 2])
    with pytest.raises(InvalidArgumentError, match="`k`"):
        FeatureNeighbours(table, k=0)
