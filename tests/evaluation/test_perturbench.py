"""PerturBench's metrics against values computed by hand."""

import numpy as np
import pytest

from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._perturbench import deg_recall, logfc, rank_scores
from scvi_sams.metrics._profiles import cosine, largest, mae, pearson, rmse


def test_fit_by_hand():
    # Rows: x - y = (1, 2, 3); and x = -y.
    x, y = np.array([[2.0, 4, 6], [1, 0, -1]]), np.array([[1.0, 2, 3], [-1, 0, 1]])
    np.testing.assert_allclose(rmse(x, y), [np.sqrt(14 / 3), np.sqrt(8 / 3)])
    np.testing.assert_allclose(mae(x, y), [2, 4 / 3])
    np.testing.assert_allclose(pearson(x, y), [1, -1])
    np.testing.assert_allclose(cosine(x, y), [1, -1])
    # Shifted by one: still correlated, no longer parallel.
    assert pearson(np.array([1.0, 2]), np.array([0.0, 1])) == pytest.approx(1)
    assert cosine(np.array([1.0, 2]), np.array([0.0, 1])) == pytest.approx(2 / np.sqrt(5))


@pytest.mark.parametrize("similarity", [pearson, cosine])
def test_undefined_similarities_are_zero(similarity):
    # The mean of three times 0.1 is not exactly 0.1.
    constant = {pearson: np.full(3, 0.1), cosine: np.zeros(3)}[similarity]
    assert similarity(constant, np.array([1.0, 0, -1])) == 0
    assert similarity(np.array([1.0, 0, -1]), constant) == 0


def test_log_fold_change_adds_the_pseudocount_to_means_of_logarithms():
    change = logfc(np.array([[0.7, 0.1, 0.0]]), np.array([0.1, 0.3, 0.0]))
    np.testing.assert_allclose(change, [[2, -1, 0]])
    assert logfc(np.array([0.5]), np.array([0.0]), pseudocount=0.5)[0] == pytest.approx(1)


def test_log_fold_change_where_there_is_no_logarithm():
    # A mean of -0.2 has no logarithm after 0.1 is added: no change, as in their code.
    change = logfc(np.array([-0.2, np.nan, 0.1]), np.array([0.1, 0.1, 0.1]))
    np.testing.assert_array_equal(change, [0, np.nan, 0])


def test_ranks_by_hand():
    # Observations at 0, 1, 5 on a line; predictions at 0.2, 4, 0.9.
    # Sorted by distance to 0: 0.2, 0.9, 4 - A's own is first. To 1: 0.9, 0.2, 4 - B's is last.
    # To 5: 4, 0.9, 0.2 - C's is second.
    observed, predicted = np.array([[0.0], [1], [5]]), np.array([[0.2], [4], [0.9]])
    for metric in ("rmse", "mae"):
        ranks = rank_scores(predicted, observed, metric)
        np.testing.assert_allclose(ranks, [0, 1, 0.5])
        older = rank_scores(predicted, observed, metric, version="2024")
        np.testing.assert_allclose(older, [0, 2 / 3, 1 / 3])


def test_ranks_by_similarity():
    # Directions of 0, 45 and 90 degrees; predictions of 10, 80 and 50 degrees, whatever their size.
    angles = np.radians([10, 80, 50])
    predicted = np.column_stack([np.cos(angles), np.sin(angles)]) * [[1], [100], [0.01]]
    observed = np.array([[1.0, 0], [1, 1], [0, 1]])
    # To 45: 50 (C), then 10 and 80 at 35 degrees each, which share positions 1 and 2.
    np.testing.assert_allclose(rank_scores(predicted, observed, "cosine"), [0, 0.75, 0.5])
    shifted = rank_scores(
        np.column_stack([predicted, -predicted]) + 3, np.column_stack([observed, -observed])
    )
    centred = rank_scores(
        np.column_stack([predicted, -predicted]) + 3,
        np.column_stack([observed, -observed]),
        "pearson",
    )
    np.testing.assert_allclose(centred, [0, 0.75, 0.5])
    assert not np.allclose(shifted, centred)


def test_ties_take_their_mean_position_in_any_order():
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(7, 20))
    same = np.repeat(observed.mean(axis=0, keepdims=True), 7, axis=0)
    for metric in ("rmse", "mae", "cosine", "pearson"):
        np.testing.assert_array_equal(rank_scores(same, observed, metric), np.full(7, 0.5))
        older = rank_scores(same, observed, metric, version="2024")
        np.testing.assert_allclose(older, np.full(7, 3 / 7))
    # Equal up to single precision.
    same = same * (1 + 1e-12 * rng.normal(size=(7, 1)))
    np.testing.assert_array_equal(rank_scores(same, observed, "rmse"), np.full(7, 0.5))


def test_undefined_cosine_is_the_worst():
    observed = np.array([[1.0, 0], [0, 1], [-1, 0]])
    predicted = np.array([[0.0, 0], [0, 1], [1, 0]])
    # A's zero vector has no direction. Even C's prediction, opposite to what is observed, is nearer
    # to C than it is.
    np.testing.assert_allclose(rank_scores(predicted, observed, "cosine"), [1, 0, 0.5])
    # No direction anywhere: nothing is told apart.
    np.testing.assert_allclose(rank_scores(np.zeros((3, 2)), observed, "cosine"), [0.5] * 3)


def test_failed_predictions_are_last_and_stay_in_the_count():
    observed = np.array([[0.0], [1], [5]])
    predicted = np.array([[0.2], [np.nan], [0.1]])
    # C's own, at 0.1, is behind A's but before B's, which failed.
    np.testing.assert_allclose(rank_scores(predicted, observed, "rmse"), [0.5, 1, 0.5])
    failed = np.full((3, 1), np.nan)
    np.testing.assert_allclose(rank_scores(failed, observed, "rmse"), [1, 1, 1])


def test_ranks_do_not_depend_on_the_order_of_perturbations_or_genes():
    rng = np.random.default_rng(1)
    observed, predicted = rng.normal(size=(2, 9, 15))
    order, genes = rng.permutation(9), rng.permutation(15)
    for metric in ("rmse", "mae", "cosine", "pearson"):
        ranks = rank_scores(predicted, observed, metric)
        shuffled = rank_scores(predicted[order][:, genes], observed[order][:, genes], metric)
        np.testing.assert_allclose(shuffled, ranks[order])


def test_a_single_perturbation_has_no_rank():
    assert np.isnan(rank_scores(np.ones((1, 2)), np.ones((1, 2)), "rmse")).all()


def test_recall_of_differentially_expressed_genes_by_hand():
    control, variance = np.zeros(5), np.array([1.0, 4, 0.01, 1, 0])
    # |t| of A: 3, 2, 10, 1, 0; of B: 1, 0, 0, 2, infinite.
    observed = np.array([[3.0, 4, -1, 1, 0], [1, 0, 0, 2, 0.1]])
    # Predicted |t| of A: 0, 5, 3, 4, 0; of B: 1, 0, 0, 0, infinite.
    predicted = np.array([[0.0, 10, 0.3, 4, 0], [1, 0, 0, 0, 5]])
    # Top two of A: {2, 0} observed, {1, 3} predicted. Of B: {4, 3} and {4, 0}.
    recall = deg_recall(predicted, observed, control, variance, n_genes=2)
    np.testing.assert_allclose(recall, [0, 0.5])
    # Top three of A: {2, 0, 1} and {1, 3, 2}. B changes three genes, and the prediction two.
    recall = deg_recall(predicted, observed, control, variance, n_genes=3)
    np.testing.assert_allclose(recall, [2 / 3, 2 / 3])


def test_no_predicted_change_recovers_nothing():
    control, variance = np.array([1.0, 2, 3]), np.ones(3)
    unchanged, changed = control[None], 2 * control[None]
    assert deg_recall(unchanged, changed, control, variance, n_genes=2) == [0]
    assert deg_recall(changed, unchanged, control, variance, n_genes=2) == [0]
    # Fewer genes than asked for.
    assert deg_recall(unchanged - 1, changed, control, variance) == [1]


def test_what_cannot_be_ranked_is_refused():
    profiles = np.ones((3, 2))
    with pytest.raises(SAMSError, match=r"\(2, 2\) and \(3, 2\)"):
        rank_scores(profiles[:2], profiles)
    with pytest.raises(SAMSError, match="'spearman'"):
        rank_scores(profiles, profiles, "spearman")
    with pytest.raises(SAMSError, match="'2023'"):
        rank_scores(profiles, profiles, version="2023")


def test_of_equal_effects_the_first_genes_are_the_strongest():
    effects = np.zeros((2, 100))
    effects[1, 50] = -1
    assert largest(effects, 3).tolist() == [[0, 1, 2], [50, 0, 1]]


def test_a_control_of_no_expression_has_no_fold_change():
    change = logfc(np.array([1.0, np.nan]), np.array([-0.1, 0.5]), pseudocount=0.1)
    np.testing.assert_array_equal(change, [0, np.nan])
