"""Systema's metrics against values computed by hand."""

import numpy as np
import pytest

from scvi_sams.metrics._systema import (
    centroid_accuracy,
    pearson_delta,
    pearson_delta_top,
    perturbed_centroid,
)


def test_the_perturbed_centroid_counts_each_perturbation_once():
    np.testing.assert_allclose(perturbed_centroid(np.array([[0.0, 2], [4, 6]])), [2, 4])


def test_correlation_of_deltas_by_hand():
    reference = np.array([1.0, 1, 1])
    observed = np.array([[2.0, 3, 4], [2, 3, 4]])
    # Deltas (1, 2, 3) against (3, 2, 1) and (1, 3, 2).
    predicted = np.array([[4.0, 3, 2], [2, 4, 3]])
    np.testing.assert_allclose(pearson_delta(predicted, observed, reference), [-1, 0.5])


def test_what_all_perturbations_share_is_worth_nothing():
    # Every perturbation moves genes by (4, 2, 0) from control, plus its own small effect.
    control, shared = np.array([1.0, 1, 1]), np.array([4.0, 2, 0])
    own = np.array([[0.1, -0.2, 0.1], [-0.1, 0.2, -0.1]])
    observed = control + shared + own
    reference = perturbed_centroid(observed)
    predicted = np.repeat(reference[None], 2, axis=0)
    assert pearson_delta(predicted, observed, control).min() > 0.98
    np.testing.assert_allclose(pearson_delta(predicted, observed, reference), 0, atol=1e-12)
    np.testing.assert_allclose(pearson_delta(observed, observed, reference), 1)


def test_top_genes_differ_most_from_control_not_from_the_reference():
    control, reference = np.zeros(4), np.array([3.0, 3, 3, 0])
    observed = np.array([[3.0, 4, 5, 1]])
    # Largest differences from control: genes 2, 1, 0; from the reference gene 3 would be third.
    predicted = np.array([[3.0, 5, 4, 99]])
    # Deltas of genes 0, 1, 2: (0, 1, 2) and (0, 2, 1).
    top = pearson_delta_top(predicted, observed, reference, control, n_genes=3)
    np.testing.assert_allclose(top, [0.5])


def test_centroid_accuracy_by_hand():
    # Observed centroids at 0, 1, 5. The prediction of A, 0.2, is nearest to its own; that of B, 4,
    # is nearer to 5; that of C, 0.9, nearer to both others.
    observed, predicted = np.array([[0.0], [1], [5]]), np.array([[0.2], [4], [0.9]])
    np.testing.assert_allclose(centroid_accuracy(predicted, observed), [1, 0.5, 0])


def test_ties_count_half_and_failures_nothing():
    observed = np.array([[0.0], [2], [9]])
    # A's prediction is as near to B as to A.
    predicted = np.array([[1.0], [2], [np.nan]])
    np.testing.assert_allclose(centroid_accuracy(predicted, observed), [0.75, 1, 0])


def test_collapsed_predictions_are_at_chance():
    observed = np.random.default_rng(0).normal(size=(9, 20))
    same = np.repeat(observed.mean(axis=0, keepdims=True), 9, axis=0)
    assert centroid_accuracy(same, observed).mean() == pytest.approx(0.5)


def test_accuracy_does_not_depend_on_order():
    rng = np.random.default_rng(1)
    observed, predicted = rng.normal(size=(2, 9, 15))
    order, genes = rng.permutation(9), rng.permutation(15)
    np.testing.assert_allclose(
        centroid_accuracy(predicted[order][:, genes], observed[order][:, genes]),
        centroid_accuracy(predicted, observed)[order],
    )


def test_a_single_perturbation_has_no_accuracy():
    assert np.isnan(centroid_accuracy(np.ones((1, 2)), np.ones((1, 2)))).all()
