"""Interactions that models predict: additive models, hand computations, pairs nobody measured."""

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    N_LATENT,
    VARIANTS,
    assert_within_error,
    decode_shares,
    linear_normal,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.model._contrast import Contrast

EFFECTS = np.random.default_rng(5).normal(scale=1.5, size=(4, N_LATENT))
PAIRS = {"P001+P002": (0, 1), "P003+P004": (2, 3)}
N_BY_HAND = 20_000


@pytest.fixture(scope="module")
def known():
    """Return a model whose effects are, to all intents, known: EFFECTS."""
    model = train_small(small_screen(), **VARIANTS["mean field"])
    set_effects(model, EFFECTS)
    return model


def interactions(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.predict_interactions(*args, **kwargs)


def measured(model):
    labels = model.adata.obs["perturbation"].astype(str)
    return sorted({label for label in labels if "+" in label})


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE])
def test_an_exactly_additive_model_has_no_interactions(model_cls):
    model, _ = linear_normal(model_cls)
    found = interactions(model, ["P001+P002", "P002+P003+P004"])
    assert np.abs(found.layers["effect"]).max() > 0.5
    np.testing.assert_allclose(found.X, 0, atol=1e-4)
    np.testing.assert_allclose(found.layers["effect"], found.layers["additive"], atol=1e-4)
    np.testing.assert_allclose(found.obs[["score", "score_low", "score_high"]], 0, atol=1e-3)
    assert found.uns["interaction"]["units"] == "units of the data"


def test_interactions_equal_a_hand_computation(known):
    basal = np.random.default_rng(0).normal(size=(N_BY_HAND, N_LATENT))

    def f(shift):
        return np.log2(1 + 1e3 * decode_shares(known, basal + shift))

    found = interactions(known, list(PAIRS), n_samples=N_BY_HAND, target_sum=1e3)
    for row, (first, second) in enumerate(PAIRS.values()):
        a, b = EFFECTS[first], EFFECTS[second]
        cells = f(a + b) - f(a) - f(b) + f(0)
        error = np.hypot(cells.std(axis=0) / N_BY_HAND**0.5, found.layers["standard_error"][row])
        assert_within_error(found.X[row], cells.mean(axis=0), error)
        assert np.abs(found.X[row]).max() > 20 * error.max()


def test_arms_are_those_of_predict_ate(known):
    found = interactions(known, list(PAIRS), n_samples=20_000)
    singles = ["P001", "P002", "P003", "P004"]
    ate = known.predict_ate(
        [*PAIRS, *singles], method="lograte", n_samples=20_000, key_added=None
    ).to_df()
    np.testing.assert_allclose(found.layers["effect"], ate.loc[list(PAIRS)], atol=0.1)
    additive = np.stack([ate.loc[pair.split("+")].sum() for pair in PAIRS])
    np.testing.assert_allclose(found.layers["additive"], additive, atol=0.15)


def test_scores_are_projections(known):
    found = interactions(known, list(PAIRS))
    additive = found.layers["additive"].astype(np.float64)
    unit = additive / np.linalg.norm(additive, axis=1, keepdims=True)
    np.testing.assert_allclose(found.obs["score"], (found.X * unit).sum(axis=1), rtol=1e-3)
    np.testing.assert_allclose(
        found.obs["additive_score"], np.linalg.norm(additive, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.obs["effect_norm"], np.linalg.norm(found.layers["effect"], axis=1), rtol=1e-4
    )
    np.testing.assert_allclose(
        found.obs["interaction_norm"], np.linalg.norm(found.X, axis=1), rtol=1e-3
    )
    assert (found.obs["score_low"] <= found.obs["score"]).all()
    assert (found.obs["score"] <= found.obs["score_high"]).all()


def width(table):
    return (table.obs["score_high"] - table.obs["score_low"]).to_numpy()


def test_the_interval_of_a_score_holds_what_is_not_known_of_effects():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    settings = {"n_posterior_samples": 400}
    set_effects(model, EFFECTS, 0.5)
    unsure = width(interactions(model, list(PAIRS), n_samples=8000, **settings))
    set_effects(model, EFFECTS, 1e-6)
    sure = interactions(model, list(PAIRS), n_samples=8000, **settings)
    assert (unsure > 1.5 * width(sure)).all()
    # Of a normal distribution the middle half is 0.344 times as wide as 95 %.
    half = width(interactions(model, list(PAIRS), n_samples=8000, interval=0.5, **settings))
    np.testing.assert_allclose(half / width(sure), 0.344, atol=0.1)
    # What is left is the noise of averages over basal states, and falls with their number.
    more = width(interactions(model, list(PAIRS), n_samples=16 * 8000, **settings))
    np.testing.assert_allclose(more / width(sure), 0.25, atol=0.06)


def test_the_order_of_names_and_the_size_of_chunks_play_no_part(known, monkeypatch):
    found = interactions(known, ["P001+P002", "P003+P004"])
    swapped = interactions(known, ["P002+P001", "P004+P003"])
    np.testing.assert_allclose(swapped.X, found.X, atol=1e-5)
    assert list(swapped.obs_names) == ["P001+P002", "P003+P004"]
    monkeypatch.setattr("scvi_sams.model._counterfactual._PAIRS_PER_CHUNK", 1)
    np.testing.assert_allclose(interactions(known, list(PAIRS)).X, found.X, atol=1e-3)


@pytest.mark.parametrize(("n_kept", "n_effects"), [(2**26, 4 + 3), (1, 5 + 3)])
def test_effects_of_single_perturbations_are_kept_for_later_pairs(
    known, n_kept, n_effects, monkeypatch
):
    pairs = ["P001+P002", "P003+P004", "P001+P003"]
    expected = interactions(known, pairs, n_samples=200)
    asked = []
    effect = Contrast.effect
    monkeypatch.setattr(Contrast, "effect", lambda *args: asked.append(1) or effect(*args))
    monkeypatch.setattr("scvi_sams.model._counterfactual._PAIRS_PER_CHUNK", 1)
    monkeypatch.setattr("scvi_sams.model._counterfactual._VALUES_KEPT", n_kept)
    found = interactions(known, pairs, n_samples=200)
    assert len(asked) == n_effects
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.obs["score_low"], expected.obs["score_low"], rtol=1e-4)


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, ConditionalVAE, SVAEPlus])
def test_all_measured_combinations_by_default(model_cls):
    model = train_small(small_screen(), model_cls=model_cls)
    found = interactions(model)
    assert list(found.obs_names) == measured(model)
    assert np.isfinite(found.X).all()
    assert np.abs(found.X).max() > 0


def test_wrong_combinations_are_refused(known):
    with pytest.raises(SAMSError, match="'P001' is not a combination"):
        known.predict_interactions(["P001"])
    with pytest.raises(SAMSError, match="not a combination"):
        known.predict_interactions(["P001+control"])
    with pytest.raises(UnknownPerturbationError, match="'P1'"):
        known.predict_interactions(["P1+P002"])
    with pytest.raises(SAMSError, match="'posterior'"):
        known.predict_interactions(["P001+P002"], basal="posterior")
    with pytest.raises(SAMSError, match="no combinations"):
        train_small(small_screen(n_combinations=0)).predict_interactions()


def unseen(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.rank_unseen_pairs(*args, **kwargs)


def test_unseen_pairs_are_all_but_the_measured_ones(known):
    found = unseen(known)
    names = known.perturbations
    pairs = {f"{a}+{b}" for i, a in enumerate(names) for b in names[i + 1 :]}
    assert set(found["combination"]) == pairs - set(measured(known))
    assert not found["combination"].duplicated().any()
    assert (found["first"] + "+" + found["second"] == found["combination"]).all()


def test_unseen_pairs_have_the_numbers_of_predict_interactions(known):
    settings = {"n_samples": 4000, "n_posterior_samples": 20}
    found = unseen(known, **settings).set_index("combination")
    expected = interactions(known, list(found.index), **settings).obs
    for column in ("effect_norm", "score", "additive_score", "interaction_norm"):
        np.testing.assert_allclose(found[column], expected[column], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("by", ["effect", "interaction"])
def test_unseen_pairs_are_ranked_by_what_is_asked_for(default_model, by):
    found = unseen(default_model, by=by)
    column = found["effect_norm"] if by == "effect" else found["score"].abs()
    assert (np.diff(column) <= 0).all()
    assert (found["score_low"] <= found["score_high"]).all()


def test_the_size_of_blocks_plays_no_part(default_model, monkeypatch):
    whole = unseen(default_model)
    monkeypatch.setattr("scvi_sams.model._ranking._PERTURBATIONS_PER_BLOCK", 1)
    pd.testing.assert_frame_equal(unseen(default_model), whole, rtol=1e-4)


def test_some_perturbations_in_any_order(default_model):
    found = unseen(default_model, ["P004", "P001", "P002"])
    assert set(found["first"]) | set(found["second"]) <= {"P001", "P002", "P004"}
    again = unseen(default_model, ["P001", "P002", "P004"])
    pd.testing.assert_frame_equal(found, again)
    counts = default_model.adata.obs["perturbation"].astype(str).str.split("+").explode()
    n_cells = counts.value_counts()
    expected = found.apply(lambda row: min(n_cells[row["first"]], n_cells[row["second"]]), axis=1)
    assert list(found["n_cells"]) == list(expected)


def test_pairs_that_cannot_be_ranked_are_refused(default_model):
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        default_model.rank_unseen_pairs(["P001", "P9"])
    with pytest.raises(SAMSError, match="two"):
        default_model.rank_unseen_pairs(["P001"])
    with pytest.raises(SAMSError, match="measured"):
        default_model.rank_unseen_pairs(measured(default_model)[0].split("+"))
    with pytest.raises(SAMSError, match="'norm'"):
        default_model.rank_unseen_pairs(by="norm")
    assert not hasattr(SVAEPlus, "rank_unseen_pairs")


def test_perturbations_never_measured_alone_are_named_when_pairs_are_ranked(caplog):
    adata = small_screen()
    labels = adata.obs["perturbation"].astype(str)
    only_in_pairs = next(label for label in labels if "+" in label).split("+")[0]
    model = train_small(adata[(labels != only_in_pairs).to_numpy()].copy())
    caplog.clear()
    ranked = unseen(model, n_samples=20)
    (message,) = [text for text in caplog.messages if "alone" in text]
    assert f"1 of 4 perturbations has no cells with them alone: {only_in_pairs!r}." in message
    assert only_in_pairs in {*ranked["first"], *ranked["second"]}
    caplog.clear()
    unseen(model, [name for name in model.perturbations if name != only_in_pairs], n_samples=20)
    assert not any("alone" in text for text in caplog.messages)
