"""What metrics must not depend on: order, sign, scale and shift, where they say so."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from scvi_sams.evaluation import (
    active_at_fdr,
    effect_metrics,
    energy_distance,
    mask_recovery,
    match_latents,
    mean_correlation_coefficient,
    mmd,
    pearson_delta,
    rank_scores,
)

finite = st.floats(-100, 100, width=32).map(float)
tables = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6).flatmap(
    lambda shape: arrays(float, shape, elements=finite)
)


def like(table, elements=finite):
    return arrays(float, table.shape, elements=elements)


@given(st.data())
def test_effect_metrics_do_not_depend_on_the_order_of_entries(data):
    observed = data.draw(tables)
    predicted = data.draw(like(observed))
    order = data.draw(st.permutations(range(observed.size)))
    first = effect_metrics(predicted.ravel(), observed.ravel())
    second = effect_metrics(predicted.ravel()[order], observed.ravel()[order])
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, atol=1e-9, err_msg=name)


@given(st.data(), st.floats(0.01, 100))
def test_correlation_does_not_depend_on_scale_and_is_one_with_itself(data, scale):
    observed = data.draw(tables).ravel()
    predicted = data.draw(like(observed))
    assume(np.ptp(observed) > 1e-3)
    assume(np.ptp(predicted) > 1e-3)
    first = effect_metrics(predicted, observed)["pearson"]
    assert -1 - 1e-9 <= first <= 1 + 1e-9
    np.testing.assert_allclose(
        effect_metrics(scale * predicted, observed)["pearson"], first, atol=1e-6
    )
    np.testing.assert_allclose(effect_metrics(-predicted, observed)["pearson"], -first, atol=1e-6)
    itself = effect_metrics(observed, observed)
    np.testing.assert_allclose([itself["pearson"], itself["r2"], itself["slope"]], 1, atol=1e-6)


@st.composite
def mask_pairs(draw):
    rows, first, second = draw(st.tuples(*[st.integers(1, 6)] * 3))
    return tuple(
        draw(arrays(float, (rows, n), elements=st.sampled_from([0.0, 1.0])))
        for n in (first, second)
    )


@given(mask_pairs(), st.randoms())
def test_mask_recovery_does_not_depend_on_the_order_of_latents_and_perturbations(masks, random):
    estimate, truth = masks
    found = mask_recovery(estimate, truth)
    rows = random.sample(range(len(truth)), len(truth))
    columns = random.sample(range(estimate.shape[1]), estimate.shape[1])
    again = mask_recovery(estimate[rows][:, columns], truth[rows])
    for name in ("precision", "recall", "f1"):
        np.testing.assert_allclose(found[name], again[name], err_msg=name)
        assert 0 <= found[name] <= 1
    assert mask_recovery(truth, truth)["f1"] == (1.0 if truth.any() else found["f1"] * 0)


@given(mask_pairs())
def test_latents_are_matched_one_to_one(masks):
    rows, columns = match_latents(*masks)
    assert len(set(rows.tolist())) == len(rows) == len(set(columns.tolist())) == len(columns)
    assert len(rows) == min(mask.shape[1] for mask in masks)


@given(st.data())
def test_the_mean_correlation_coefficient_does_not_depend_on_order_sign_and_scale(data):
    truth = data.draw(tables)
    found = data.draw(like(truth))
    n_latent = truth.shape[1]
    columns = data.draw(st.permutations(range(n_latent)))
    factors = data.draw(
        st.lists(st.sampled_from([-4.0, -1.0, 0.5, 2.0]), min_size=n_latent, max_size=n_latent)
    )
    value = mean_correlation_coefficient(found, truth)
    assert -1e-9 <= value <= 1 + 1e-9
    moved = (found * factors)[:, columns]
    np.testing.assert_allclose(mean_correlation_coefficient(moved, truth), value, atol=1e-6)


@given(st.data())
def test_distances_are_symmetric_do_not_depend_on_order_and_are_zero_between_equals(data):
    first = data.draw(tables)
    second = data.draw(arrays(float, (4, first.shape[1]), elements=finite))
    order = data.draw(st.permutations(range(len(first))))
    for distance in (
        lambda x, y: energy_distance(x, y, unbiased=False),
        lambda x, y: mmd(x, y, bandwidth=3.0),
    ):
        value = distance(first, second)
        assert np.isfinite(value)
        scale = 1e-9 * (1 + abs(value) + 1e4)
        assert abs(distance(second, first) - value) <= scale
        assert abs(distance(first[order], second) - value) <= scale
    assert abs(energy_distance(first, first[order], unbiased=False)) <= 1e-6


@given(st.data())
def test_ranks_are_shares_and_do_not_depend_on_the_order_of_genes(data):
    observed = data.draw(tables)
    predicted = data.draw(like(observed))
    genes = data.draw(st.permutations(range(observed.shape[1])))
    found = np.asarray(rank_scores(predicted, observed, metric="rmse"))
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.asarray(rank_scores(observed, observed, metric="rmse")) <= 0.5 + 1e-9).all()
    # Sums in another order may part ties: whole numbers have none.
    whole = [np.rint(table) for table in (predicted, observed)]
    first = rank_scores(*whole, metric="mae")
    np.testing.assert_allclose(first, rank_scores(*(t[:, genes] for t in whole), metric="mae"))


@given(st.data(), st.floats(-50, 50))
def test_pearson_delta_does_not_depend_on_what_all_profiles_share(data, shift):
    observed = data.draw(tables)
    predicted = data.draw(like(observed))
    reference = data.draw(arrays(float, observed.shape[1], elements=finite))
    spread = [np.ptp(table - reference, axis=1).min() for table in (observed, predicted)]
    assume(min(spread) > 1e-2)
    value = np.asarray(pearson_delta(predicted, observed, reference))
    moved = np.asarray(pearson_delta(predicted + shift, observed + shift, reference + shift))
    np.testing.assert_allclose(moved, value, atol=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_calls_keep_to_their_false_discovery_rate_and_take_the_surest(probabilities, fdr):
    values = np.array(probabilities)
    active = np.asarray(active_at_fdr(values, fdr))
    if active.any():
        assert (1 - values[active]).mean() <= fdr + 1e-9
        assert values[active].min() >= values[~active].max(initial=0.0)
