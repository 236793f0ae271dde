"""Recovery of simulated truth: by hand, best matchings, and what it must not depend on."""

import itertools

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.metrics._recovery import mask_recovery, match_latents, mean_correlation_coefficient

TRUE_MASKS = np.array([[1, 0], [1, 1], [0, 1], [0, 1]])


def test_mask_recovery_by_hand():
    # Estimated dimensions 2 and 0 are the true 0 and 1; dimension 1 has no partner.
    masks = np.array([[0.1, 0.0, 0.9], [0.4, 0.9, 0.8], [0.9, 0.2, 0.7], [0.6, 0.3, 0.2]])
    rows, columns = match_latents(masks > 0.5, TRUE_MASKS)
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (2, 0)]
    # True positives 2 + 2; active: 6 estimated, 5 true.
    scores = mask_recovery(masks, TRUE_MASKS)
    assert scores.to_dict() == pytest.approx(
        {
            "precision": 4 / 6,
            "recall": 4 / 5,
            "f1": 8 / 11,
            "density": 6 / 12,
            "true_density": 5 / 8,
        }
    )


def test_unmatched_true_dimensions_are_false_negatives():
    scores = mask_recovery(TRUE_MASKS[:, [1]], TRUE_MASKS)
    assert scores["precision"] == 1
    assert scores["recall"] == pytest.approx(3 / 5)


def test_perfect_masks_in_any_order_of_dimensions():
    masks = np.column_stack([np.zeros(4), TRUE_MASKS[:, ::-1], np.zeros(4)])
    scores = mask_recovery(masks, TRUE_MASKS)
    assert scores[["precision", "recall", "f1"]].tolist() == [1, 1, 1]


def test_threshold_decides_what_is_active():
    masks = TRUE_MASKS * 0.3
    assert mask_recovery(masks, TRUE_MASKS)[["precision", "recall", "f1", "density"]].tolist() == [
        0, 0, 0, 0,
    ]  # fmt: skip
    assert mask_recovery(masks, TRUE_MASKS, threshold=0.2)["f1"] == 1
    # Effects in units of their own: the threshold is for the estimate alone.
    assert mask_recovery(10 * masks, TRUE_MASKS, threshold=2)["f1"] == 1


def test_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(5):
        masks, truth = rng.random((2, 12, 4)) < 0.4
        rows, columns = match_latents(masks, truth)
        best = max(
            np.sum(masks[:, list(order)] & truth) for order in itertools.permutations(range(4))
        )
        assert np.sum(masks[:, rows] & truth[:, columns]) == best


def test_recovery_does_not_depend_on_the_order_of_dimensions_or_perturbations():
    rng = np.random.default_rng(1)
    names = [f"P{i}" for i in range(20)]
    truth = pd.DataFrame(rng.random((20, 5)) < 0.4, index=names)
    masks = pd.DataFrame(0.9 * truth)
    masks.iloc[:2] = 0
    expected = mask_recovery(masks, truth)
    assert expected["precision"] == 1
    assert expected["recall"] == pytest.approx(truth.iloc[2:].sum().sum() / truth.sum().sum())
    shuffled = masks.iloc[rng.permutation(20), rng.permutation(5)]
    pd.testing.assert_series_equal(mask_recovery(shuffled, truth), expected)
    pd.testing.assert_series_equal(mask_recovery(masks.to_numpy(), truth.to_numpy()), expected)


def test_masks_of_different_perturbations_are_refused():
    truth = pd.DataFrame(TRUE_MASKS, index=list("ABCD"))
    with pytest.raises(UnknownPerturbationError, match="'D', 'X'"):
        mask_recovery(truth.rename(index={"D": "X"}), truth)
    with pytest.raises(SAMSError, match=r"3 perturbations .* 4"):
        mask_recovery(TRUE_MASKS[:3], TRUE_MASKS)


# Columns (1, 2, 3) and (1, -2, 1) are uncorrelated.
TRUE_LATENTS = np.array([[1.0, 1.0], [2.0, -2.0], [3.0, 1.0]])


def test_mean_correlation_coefficient_by_hand():
    # Correlations with (1, 2, 4): 3 / sqrt(14 / 3 * 2) and 1 / sqrt(14 / 3 * 6); with (0, 1, 0):
    # 0 and -1. The best matching takes the first of the one and the second of the other.
    latents = np.array([[0.0, 1.0], [1.0, 2.0], [0.0, 4.0]])
    expected = (3 / np.sqrt(14 / 3 * 2) + 1) / 2
    assert mean_correlation_coefficient(latents, TRUE_LATENTS) == pytest.approx(expected)
    ranked = mean_correlation_coefficient(latents, TRUE_LATENTS, method="spearman")
    assert ranked == pytest.approx(1)


def test_true_latents_without_a_partner_and_constant_ones_count_as_nothing():
    assert mean_correlation_coefficient(TRUE_LATENTS[:, :1], TRUE_LATENTS) == pytest.approx(0.5)
    constant = np.column_stack([TRUE_LATENTS[:, 0], np.full(3, 0.1)])
    assert mean_correlation_coefficient(constant, TRUE_LATENTS) == pytest.approx(0.5)


def test_correlation_is_blind_to_order_sign_scale_and_names_align_rows():
    rng = np.random.default_rng(0)
    names = [f"cell {i}" for i in range(50)]
    truth = pd.DataFrame(rng.normal(size=(50, 4)), index=names)
    noisy = truth + 0.5 * rng.normal(size=truth.shape)
    expected = mean_correlation_coefficient(noisy, truth)
    assert 0.7 < expected < 1
    mirrored = (noisy * [-1, 2, -3, 4] + 7).iloc[rng.permutation(50), [2, 0, 3, 1]]
    assert mean_correlation_coefficient(mirrored, truth) == pytest.approx(expected)


def test_correlations_that_do_not_exist_are_refused():
    with pytest.raises(SAMSError, match="at least two"):
        mean_correlation_coefficient(TRUE_LATENTS[:1], TRUE_LATENTS[:1])
    with pytest.raises(SAMSError, match="not finite"):
        mean_correlation_coefficient(TRUE_LATENTS * np.nan, TRUE_LATENTS)
    with pytest.raises(SAMSError, match="'kendall'"):
        mean_correlation_coefficient(TRUE_LATENTS, TRUE_LATENTS, method="kendall")
    with pytest.raises(SAMSError, match=r"2 observations .* 3"):
        mean_correlation_coefficient(TRUE_LATENTS[:2], TRUE_LATENTS)


def test_an_entry_at_the_threshold_is_off():
    recovery = mask_recovery(np.array([[0.5, 0.9]]), np.array([[0, 1]]))
    assert recovery["precision"] == 1
