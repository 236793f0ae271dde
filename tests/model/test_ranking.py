"""Which unmeasured perturbations and pairs to screen next: closed forms, and all against a few."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import N_LATENT, VARIANTS, make_decoder_linear, small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError
from scvi_sams.model._ranking import _Nearest
from scvi_sams.model._strongest_sums import strongest_sums
from scvi_sams.model._variance_reduction import (
    Regressions,
    most_telling,
    regressions_of_features,
)
from scvi_sams.module._feature_prior import FeaturePrior

NOTHING = np.empty((0, 2), dtype=int)
UNMEASURED = ["Q1", "Q2", "Q3", "Q4", "Q5"]


def feature_table():
    """Three features of the four measured perturbations and of five others."""
    names = ["P001", "P002", "P003", "P004", *UNMEASURED]
    values = np.random.default_rng(4).normal(size=(len(names), 3))
    return pd.DataFrame(values, index=names, columns=["a", "b", "c"])


def make_features_tell(model):
    """Let masks be on wherever features are known, and effects be linear in these."""
    rng = np.random.default_rng(5)
    prior = model.module.features
    with torch.no_grad():
        prior.mask_weights[-1] = 60.0
        prior.effect_weights.copy_(torch.as_tensor(rng.normal(size=prior.effect_weights.shape)))
        prior.unexplained.fill_(1e-12)
        roots = rng.normal(size=(N_LATENT, 4, 4))
        prior.effect_covariance.copy_(torch.as_tensor(roots @ roots.swapaxes(1, 2)))


@pytest.fixture(scope="module")
def linear():
    """Return a model whose genes are linear in shifts, the matrix, and all shifts by hand."""
    adata = small_screen()
    model = train_small(
        adata,
        {"layer": "normalised"},
        gene_likelihood="normal",
        perturbation_features=feature_table(),
        **VARIANTS["mean field"],
    )
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, adata.n_vars))
    make_features_tell(model)
    prior = model.module.features
    with torch.no_grad():
        of_covariance = prior.effect_covariance.clone()
        prior.effect_covariance.zero_()  # shifts are then known
        model.module.effects.log_scale.fill_(-15.0)
        model.module.masks.logits.fill_(40.0)
    measured = model.module.effects.loc.detach().double().numpy()
    others = (prior.features[4:] @ prior.effect_weights).double().numpy()
    return model, weight, np.concatenate([measured, others]), of_covariance


@pytest.fixture(scope="module")
def stacked():
    """Return a model with all defaults."""
    model = train_small(small_screen(), perturbation_features=feature_table())
    make_features_tell(model)
    return model


def rank(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.rank_unmeasured(*args, **{"n_samples": 40} | kwargs)


# Sums of pairs -----------------------------------------------------------------------------------


def brute_force(values, n_pairs, left_out):
    rows = [
        (-float(np.square(values[i] + values[j]).sum()), i, j)
        for i, j in combinations(range(len(values)), 2)
        if (i, j) not in {tuple(pair) for pair in left_out.tolist()}
    ]
    found = sorted(rows)
    rest = np.sqrt(-found[n_pairs][0]) if len(found) > n_pairs else 0.0
    return [(i, j) for _, i, j in found[:n_pairs]], rest


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
@pytest.mark.parametrize("n_pairs", [1, 7, 300, 5000])
def test_the_strongest_sums_are_those_of_all_pairs(monkeypatch, at_once, n_pairs):
    monkeypatch.setattr("scvi_sams.model._strongest_sums._NORMS_AT_ONCE", at_once)
    # Whole numbers, so that many norms are equal, and none is rounded.
    values = np.random.default_rng(n_pairs).integers(-2, 3, size=(40, 3)).astype(np.float32)
    left_out = np.array([[0, 1], [3, 20], [5, 39]])
    found = strongest_sums(values, n_pairs, left_out)
    expected, rest = brute_force(values, n_pairs, left_out)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    sums = values[found.first] + values[found.second]
    np.testing.assert_allclose(found.norms, np.linalg.norm(sums, axis=1), rtol=1e-6)
    assert found.largest_left_out == pytest.approx(rest)


def test_sums_that_cancel_have_no_norm():
    values = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=np.float32)
    found = strongest_sums(values, 3, NOTHING)
    assert list(zip(found.first, found.second, strict=True)) == [(0, 2), (1, 2), (0, 1)]
    assert found.norms.tolist() == [5.0, 5.0, 0.0]


# Expected reduction of variance ------------------------------------------------------------------


def test_the_reduction_of_variance_by_hand():
    """C = diag(4, 1): along the first axis 4^2 / (4 + 1) of 4, along the second 1 / (1 + 1)."""
    ones = np.ones((2, 1))
    regressions = Regressions(np.eye(2), np.diag([4.0, 1.0])[None], ones, ones)
    chosen, shares = most_telling(regressions, 5)
    assert chosen.tolist() == [0, 1]
    np.testing.assert_allclose(shares, [3.2 / 5, 0.5 / 5])


def test_choices_are_those_of_conditioning_one_by_one():
    rng = np.random.default_rng(0)
    n, n_features, n_regressions = 9, 3, 2
    features = rng.normal(size=(n, n_features))
    roots = rng.normal(size=(n_regressions, n_features, n_features))
    covariance = roots @ roots.swapaxes(1, 2)
    precision = rng.uniform(0, 3, size=(n, n_regressions))
    precision[4] = 0
    importance = rng.uniform(size=(n, n_regressions))
    chosen, shares = most_telling(
        Regressions(features, covariance.copy(), precision, importance), n
    )
    joint = features @ covariance @ features.T  # of all predictions, (R, N, N)
    total = (np.diagonal(joint, axis1=1, axis2=2) * importance.T).sum()
    left = list(range(n))
    for best, share in zip(chosen, shares, strict=True):
        gains = {}
        for t in left:
            known = joint[:, :, t] ** 2 / (joint[:, t, t] + 1 / (precision[t] + 1e-300))[:, None]
            gains[t] = (known * importance.T).sum() / total
        assert best == max(gains, key=gains.get)
        assert share == pytest.approx(gains[best], abs=1e-9)
        factor = precision[best] / (1 + precision[best] * joint[:, best, best])
        joint = joint - factor[:, None, None] * joint[:, :, [best]] * joint[:, [best], :]
        left.remove(best)
    assert chosen[-1] == 4  # measuring it tells nothing


def test_what_features_say_as_regressions():
    """One feature, one latent that is on with log-odds 2, and one that no mask is on in."""
    prior = FeaturePrior(
        np.array([[1.0], [-1.0]]), n_perturbations=1, n_latent=2, log_odds=-1.0, scale=2.0
    )
    prior.mask_weights.copy_(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    prior.effect_weights.copy_(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    prior.unexplained.fill_(0.25)
    prior.effect_covariance[:] = torch.eye(2)
    found = regressions_of_features(
        prior, np.array([0]), np.array([True, False]), np.array([9.0, 9.0])
    )
    on = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(found.features, [[1, 1]])
    np.testing.assert_allclose(found.precision, [[on, 0, np.tanh(1) / 4, 0]])
    np.testing.assert_allclose(
        found.importance, [[9 * on**2, 0, 9 * (on * (1 - on) * 0.5) ** 2, 0]]
    )
    nothing = np.zeros((2, 2))
    np.testing.assert_allclose(found.covariance, [np.eye(2), np.eye(2), nothing, nothing])


# What measured perturbations show ----------------------------------------------------------------


def test_the_nearest_effect_is_the_one_of_the_most_similar_direction():
    measured = np.array([[0.0, 2.0], [10.0, 0.0]], dtype=np.float32)
    effects = np.array([[3.0, 4.0], [-1.0, -2.0], [0.0, 0.0]], dtype=np.float32)
    found = _Nearest.of(effects, measured)
    assert found.place[0] == 0
    np.testing.assert_allclose(found.similarity[:2], [0.8, -1 / 5**0.5], rtol=1e-6)
    # The first is twice the first measured one and something else; the second is opposite to all.
    np.testing.assert_allclose(found.shown(measured, slice(None)), [[0, 4], [0, 0], [0, 0]])


# Rankings ----------------------------------------------------------------------------------------


def test_effects_are_ranked_by_their_norm(linear):
    model, weight, shifts, _ = linear
    found = rank(model, method="mean").set_index("perturbation")
    expected = pd.Series(np.linalg.norm(shifts[4:] @ weight.T, axis=1), index=UNMEASURED)
    assert list(found.index) == list(expected.sort_values(ascending=False).index)
    np.testing.assert_allclose(found["score"], expected[found.index], rtol=1e-4)
    for column in ("effect_norm", "effect_norm_low", "effect_norm_high"):
        np.testing.assert_allclose(found[column], found["score"], rtol=1e-3)


def test_novelty_is_what_no_measured_effect_shows(linear):
    model, weight, shifts, _ = linear
    found = rank(model, objective="novelty").set_index("perturbation")
    effects = shifts @ weight.T
    measured = effects[:4] / np.linalg.norm(effects[:4], axis=1, keepdims=True)
    for name, effect in zip(UNMEASURED, effects[4:], strict=True):
        along = effect @ measured.T
        rest = np.linalg.norm(effect - max(along.max(), 0) * measured[along.argmax()])
        assert found.loc[name, "score"] == pytest.approx(rest, rel=1e-3)
        assert found.loc[name, "nearest"] == model.perturbations[along.argmax()]
        cosine = along.max() / np.linalg.norm(effect)
        assert found.loc[name, "similarity"] == pytest.approx(cosine, rel=1e-3, abs=1e-4)
    assert found["score"].is_monotonic_decreasing


def test_uncertainty_is_of_the_weights_of_features(linear):
    model, weight, _, of_covariance = linear
    prior = model.module.features
    with torch.no_grad():
        prior.effect_covariance.copy_(of_covariance)
        prior.unexplained.fill_(0.5)
    try:
        found = rank(model, objective="uncertainty", top=1)
    finally:
        with torch.no_grad():
            prior.effect_covariance.zero_()
            prior.unexplained.fill_(1e-12)
    features = prior.features[4:].double().numpy()
    joint = features @ of_covariance.double().numpy() @ features.T
    sizes = np.square(weight).sum(axis=0)[:, None]
    noise = 0.5 * prior.variance
    gains = [
        (sizes * joint[:, :, t] ** 2 / (joint[:, t, t] + noise)[:, None]).sum() for t in range(5)
    ]
    assert found.loc[0, "perturbation"] == UNMEASURED[int(np.argmax(gains))]
    total = (sizes * np.diagonal(joint, axis1=1, axis2=2)).sum()
    assert found.loc[0, "score"] == pytest.approx(max(gains) / total, rel=1e-4)


@pytest.mark.parametrize("by", ["effect", "novelty"])
def test_pairs_are_ranked_among_all(linear, by):
    model, weight, shifts, _ = linear
    found = rank(model, pairs=True, objective=by, top=1000)
    names = [*model.perturbations, *UNMEASURED]
    measured = model.adata.obs["perturbation"].unique()
    pairs = {"+".join(pair) for pair in combinations(names, 2)} - set(measured)
    assert set(found["combination"]) == pairs
    assert found["score"].is_monotonic_decreasing
    effects = shifts @ weight.T
    if by == "novelty":
        directions = effects[:4] / np.linalg.norm(effects[:4], axis=1, keepdims=True)
        along = effects @ directions.T
        effects = effects - along.max(axis=1).clip(min=0)[:, None] * directions[along.argmax(1)]
    place = {name: row for row, name in enumerate(names)}
    sums = effects[found["first"].map(place)] + effects[found["second"].map(place)]
    expected = np.linalg.norm(sums, axis=1)
    np.testing.assert_allclose(found["score"], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["linear_score"], expected, rtol=1e-3, atol=1e-3)
    assert found.attrs == {
        "n_pairs": len(pairs),
        "n_predicted": len(pairs),
        "largest_linear_score_left_out": 0.0,
    }


def test_pairs_of_measured_perturbations_are_those_of_rank_unseen_pairs(linear):
    model = linear[0]
    found = rank(model, model.perturbations, pairs=True).set_index("combination")
    expected = model.rank_unseen_pairs(n_samples=40).set_index("combination")
    assert list(found.index) == list(expected.index)
    np.testing.assert_allclose(found["score"], expected["effect_norm"], rtol=1e-3)


def test_a_shortlist_says_what_it_left_out(linear, monkeypatch):
    model = linear[0]
    whole = rank(model, pairs=True, top=1000)
    monkeypatch.setattr("scvi_sams.model._ranking._SHORTLISTED", 2)
    found = rank(model, pairs=True, top=3)
    assert list(found["combination"]) == list(whole["combination"][:3])
    assert found.attrs["n_predicted"] == 6
    rest = whole.sort_values("linear_score", ascending=False)["linear_score"].iloc[6]
    assert found.attrs["largest_linear_score_left_out"] == pytest.approx(rest, rel=1e-4)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_order_of_candidates_plays_no_part(stacked, pairs):
    names = ["Q4", "Q1", "Q3"]
    whole = rank(stacked, names, pairs=pairs)
    pd.testing.assert_frame_equal(rank(stacked, names[::-1], pairs=pairs), whole)


@pytest.mark.parametrize("arguments", [{}, {"objective": "novelty"}, {"pairs": True}], ids=str)
def test_the_size_of_blocks_plays_no_part(stacked, monkeypatch, arguments):
    whole = rank(stacked, **arguments)
    monkeypatch.setattr("scvi_sams.model._ranking._ENTRIES_PER_BLOCK", 1)
    monkeypatch.setattr("scvi_sams.model._ranking._ROWS_AT_ONCE", 1)
    pd.testing.assert_frame_equal(rank(stacked, **arguments), whole, rtol=1e-3)


def test_norms_are_those_of_predict_ate(stacked):
    settings = {"method": "lograte", "n_samples": 400, "n_posterior_samples": 40}
    found = rank(stacked, **settings).set_index("perturbation").loc[UNMEASURED]
    torch.manual_seed(0)
    predicted = stacked.predict_ate(UNMEASURED, interval=0.9, **settings)
    for column in ("effect_norm", "effect_norm_low", "effect_norm_high"):
        np.testing.assert_allclose(found[column], predicted.obs[column], rtol=0.05)
    np.testing.assert_allclose(found["score"], np.linalg.norm(predicted.X, axis=1), rtol=0.05)


def test_what_was_estimated_for_a_ranking_is_forgotten(stacked):
    direct = stacked.module.direct
    stacked.predict_ate(["Q2"], n_samples=40)
    before = direct.answers
    assert len(before.effects) > 0
    rank(stacked, pairs=True, top=2)
    assert direct.answers is before


def test_what_cannot_be_ranked_says_why(stacked, default_model):
    with pytest.raises(UnknownPerturbationError, match="'Q9'"):
        stacked.rank_unmeasured(["Q1", "Q9"])
    with pytest.raises(InvalidArgumentError, match="'P001', which were measured"):
        stacked.rank_unmeasured(["Q1", "P001"])
    with pytest.raises(InvalidArgumentError, match="at least two"):
        stacked.rank_unmeasured(["Q1"], pairs=True)
    with pytest.raises(InvalidArgumentError, match="empty"):
        stacked.rank_unmeasured([])
    with pytest.raises(InvalidArgumentError, match=r"`top`.*at least 1, not 0"):
        stacked.rank_unmeasured(top=0)
    with pytest.raises(InvalidArgumentError, match="'norm'"):
        stacked.rank_unmeasured(objective="norm")
    with pytest.raises(InvalidArgumentError, match="pairs=False"):
        stacked.rank_unmeasured(objective="uncertainty", pairs=True)
    with pytest.raises(SAMSError, match="were measured"):
        stacked.rank_unmeasured(
            stacked.adata.obs["perturbation"].value_counts().filter(like="+").index[0].split("+"),
            pairs=True,
        )
    with pytest.raises(SAMSError, match="`perturbation_features`"):
        default_model.rank_unmeasured()
    untrained = SAMSVAE(stacked.adata, perturbation_features=feature_table())
    with pytest.raises(SAMSError, match="not trained"):
        untrained.rank_unmeasured()
    assert not hasattr(CPAVAE, "rank_unmeasured")


def test_features_that_say_nothing_tell_of_no_others():
    model = train_small(small_screen(), perturbation_features=feature_table())
    with pytest.raises(SAMSError, match="uninformative"):
        model.rank_unmeasured(objective="uncertainty", n_samples=40)
