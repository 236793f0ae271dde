"""Which entries are active at a false discovery rate, and calibration on known truth, by hand."""

import numpy as np
import pandas as pd
import pytest

from model.builders import small_screen, train_small
from scvi_sams.evaluation import active_at_fdr, mask_calibration, mask_recovery
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError


def test_the_largest_set_within_the_rate_is_active():
    # Mean of 1 - probability over the first 1, 2, 3, 4 entries: 0.01, 0.03, 0.0867, 0.19.
    masks = np.array([[0.5, 0.99], [0.8, 0.95]])
    assert active_at_fdr(masks, 0.05).tolist() == [[False, True], [False, True]]
    assert active_at_fdr(masks, 0.09).tolist() == [[False, True], [True, True]]
    assert active_at_fdr(masks, 0.19).all()
    assert active_at_fdr(masks, 0.009).sum() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.1, 0.2])
def test_a_rate_that_is_met_exactly_is_met(dtype, fdr):
    # 1 - 0.95 is above 0.05 in floating-point numbers.
    assert active_at_fdr(np.full(7, 1 - fdr, dtype=dtype), fdr).all()
    assert not active_at_fdr(np.full(7, 1 - fdr - 1e-5, dtype=dtype), fdr).any()


def test_ties_are_active_together_or_not_at_all():
    # One entry of 0.9 would be within 0.06: (0 + 0.1) / 2. All three are not: 0.3 / 4.
    masks = np.array([0.9, 1.0, 0.9, 0.9])
    assert active_at_fdr(masks, 0.06).tolist() == [False, True, False, False]
    assert active_at_fdr(masks, 0.075).all()


def test_the_set_is_the_largest_of_all_thresholds():
    rng = np.random.default_rng(0)
    for fdr in (0.02, 0.1, 0.3):
        masks = np.round(rng.random((15, 8)), 2)
        active = active_at_fdr(masks, fdr)
        assert (1 - masks[active]).mean() <= fdr + 1e-9
        n_allowed = [
            (masks >= level).sum()
            for level in masks.ravel()
            if (1 - masks[masks >= level]).mean() <= fdr + 1e-9
        ]
        assert active.sum() == max(n_allowed)


def test_more_is_active_at_a_higher_rate_and_order_plays_no_part():
    rng = np.random.default_rng(1)
    masks = pd.DataFrame(rng.beta(0.3, 0.3, (20, 6)), index=[f"P{i}" for i in range(20)])
    strict, loose = active_at_fdr(masks, 0.01), active_at_fdr(masks, 0.1)
    assert 0 < strict.sum().sum() < loose.sum().sum()
    assert (loose | ~strict).all(axis=None)
    shuffled = masks.iloc[rng.permutation(20), rng.permutation(6)]
    pd.testing.assert_frame_equal(
        active_at_fdr(shuffled, 0.1).loc[masks.index, masks.columns], loose
    )


def test_calibrated_probabilities_keep_the_rate():
    rng = np.random.default_rng(2)
    probability = rng.beta(0.2, 0.6, 200_000)
    truth = rng.random(200_000) < probability
    for fdr in (0.05, 0.2):
        active = active_at_fdr(probability, fdr)
        assert (~truth[active]).mean() == pytest.approx(fdr, abs=0.005)


@pytest.mark.parametrize("fdr", [0, 1, -0.1, np.nan])
def test_impossible_rates_are_refused(fdr):
    with pytest.raises(SAMSError, match="above 0 and below 1"):
        active_at_fdr(np.array([0.5]), fdr)


@pytest.mark.parametrize("value", [np.nan, -0.01, 1.01, np.inf])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(SAMSError, match=f"1 of 2 entries .* {value:g}"):
        active_at_fdr(np.array([0.5, value]))
    with pytest.raises(SAMSError, match="1 of 2 entries"):
        mask_calibration(np.array([[0.5, value]]), np.array([[0, 1]]))


def test_nothing_at_all_is_active_in_an_empty_table():
    assert active_at_fdr(np.empty((0, 3))).shape == (0, 3)


TRUTH = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
# The columns of the truth swapped, and a third dimension that has no partner.
MASKS = np.array([
    [0.0, 1.0, 0.25],
    [0.75, 0.75, 0.0],
    [1.0, 0.0, 0.0],
    [0.75, 0.25, 1.0],
])  # fmt: skip


def test_calibration_by_hand():
    result = mask_calibration(MASKS, TRUTH, n_bins=4)
    # Bin 0: 0 (4 entries, none true). Bin 1: 0.25 twice, none true. Bin 3: 0.75 three times, two
    # of them true, and 1 three times, two of them true.
    bins = result.bins
    assert bins["lower"].tolist() == [0, 0.25, 0.5, 0.75]
    assert bins["upper"].tolist() == [0.25, 0.5, 0.75, 1]
    assert bins["n_entries"].tolist() == [4, 2, 0, 6]
    np.testing.assert_allclose(bins["predicted"], [0, 0.25, np.nan, (2.25 + 3) / 6])
    np.testing.assert_allclose(bins["observed"], [0, 0, np.nan, 4 / 6])
    assert result.expected_calibration_error == pytest.approx((2 * 0.25 + 6 * (5.25 - 4) / 6) / 12)
    # At 1, 5 and 10 % only the three entries of 1 are active, of which two are true; at 20 % those
    # of 0.75 too: (3 * 0.25) / 6 = 0.125.
    assert result.fdr.index.tolist() == [0.01, 0.05, 0.1, 0.2]
    assert result.fdr["n_active"].tolist() == [3, 3, 3, 6]
    np.testing.assert_allclose(result.fdr["false_discovery_proportion"], [1 / 3] * 3 + [2 / 6])
    np.testing.assert_allclose(result.fdr["recall"], [2 / 4] * 3 + [4 / 4])


def test_true_dimensions_without_a_partner_are_missed_in_the_recall_only():
    result = mask_calibration(TRUTH[:, :1].astype(float), TRUTH)
    assert result.expected_calibration_error == 0
    assert result.fdr["false_discovery_proportion"].tolist() == [0, 0, 0, 0]
    assert result.fdr["recall"].tolist() == [0.5] * 4
    assert result.bins["n_entries"].tolist() == [2, *[0] * 8, 2]


def test_nothing_called_and_nothing_true():
    result = mask_calibration(np.zeros((3, 2)), np.zeros((3, 2), dtype=bool))
    assert (result.fdr == 0).all(axis=None)
    assert result.expected_calibration_error == 0


def test_calibration_does_not_depend_on_the_order_of_dimensions_or_perturbations():
    rng = np.random.default_rng(3)
    names = [f"P{i}" for i in range(30)]
    truth = pd.DataFrame(rng.random((30, 4)) < 0.3, index=names)
    masks = pd.DataFrame(np.where(truth, rng.beta(5, 1, (30, 4)), rng.beta(1, 5, (30, 4))), names)
    expected = mask_calibration(masks, truth)
    found = mask_calibration(masks.iloc[rng.permutation(30), rng.permutation(4)], truth)
    for ours, theirs in ((found.bins, expected.bins), (found.fdr, expected.fdr)):
        pd.testing.assert_frame_equal(ours, theirs)
    assert found.expected_calibration_error == pytest.approx(expected.expected_calibration_error)


def test_probabilities_that_hold_are_calibrated_and_bold_ones_are_not():
    rng = np.random.default_rng(4)
    probability = rng.beta(0.3, 0.7, (5000, 4))
    truth = rng.random((5000, 4)) < probability
    honest = mask_calibration(probability, truth)
    np.testing.assert_allclose(honest.bins["observed"], honest.bins["predicted"], atol=0.05)
    assert honest.expected_calibration_error < 0.02
    np.testing.assert_allclose(
        honest.fdr["false_discovery_proportion"], honest.fdr.index, rtol=0.2, atol=0.005
    )
    bold = mask_calibration(probability**0.25, truth)
    assert bold.expected_calibration_error > 0.15
    assert (bold.fdr["false_discovery_proportion"] > 2 * bold.fdr.index).all()


def test_what_cannot_be_compared_is_refused():
    truth = pd.DataFrame(TRUTH, index=list("ABCD"))
    masks = pd.DataFrame(MASKS, index=list("ABCX"))
    with pytest.raises(UnknownPerturbationError, match="'D', 'X'"):
        mask_calibration(masks, truth)
    with pytest.raises(SAMSError, match="3 perturbations"):
        mask_calibration(MASKS[:3], TRUTH)
    with pytest.raises(SAMSError, match="other than 0 and 1"):
        mask_calibration(MASKS, TRUTH * 0.5)
    with pytest.raises(SAMSError, match="n_bins"):
        mask_calibration(MASKS, TRUTH, n_bins=0)


def test_a_trained_model_against_the_truth_of_its_screen():
    adata = small_screen()
    model = train_small(adata)
    simulation = adata.uns["simulation"]
    masks = model.get_perturbation_masks(key_added=None)
    truth = pd.DataFrame(simulation["true_masks"], index=list(simulation["perturbations"]))
    result = mask_calibration(masks, truth)
    assert result.bins["n_entries"].sum() == masks.size
    np.testing.assert_allclose(
        (result.bins["predicted"] * result.bins["n_entries"]).sum() / masks.size,
        masks.to_numpy().mean(),
        rtol=1e-5,
    )
    for rate, row in result.fdr.iterrows():
        active = active_at_fdr(masks, rate)
        assert row["n_active"] == active.to_numpy().sum()
        assert row["recall"] <= mask_recovery(active, truth)["recall"] + 1e-9
