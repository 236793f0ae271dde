"""Cells that may have escaped their perturbations, as users see it."""

import logging

import numpy as np
import pandas as pd
import pytest
import scvi
from scipy.stats import rankdata

from model.builders import TRAINING, small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.evaluation import observed_ate
from scvi_sams.exceptions import InvalidArgumentError, SAMSError

TRAINED = {
    "max_epochs": 32,
    "batch_size": 128,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "plan_kwargs": {"lr": 5e-3},
}


def screen(**changes):
    settings = {
        "n_genes": 120,
        "n_controls": 400,
        "n_perturbations": 8,
        "cells_per_perturbation": 130,
        "n_combinations": 2,
        "cells_per_combination": 60,
        "n_latent": 5,
        "mask_probability": 0.3,
        "library_size": 2500.0,
        "guides_per_perturbation": 2,
    }
    return simulate_screen(**(settings | changes))


def trained(adata, *, responses=True, **setup):
    scvi.settings.seed = 0
    SAMSVAE.setup_anndata(adata, **setup)
    model = SAMSVAE(adata, n_latent=8, n_hidden=48, effect_n_hidden=16, responses=responses)
    model.train(**TRAINED)
    return model


def slope(model, **arguments):
    """Of predicted effects on the true ones, those on cells that respond."""
    truth = simulated_ate(model.adata, model.perturbations, n_samples=1000).X
    found = model.predict_ate(n_samples=500, key_added=None, **arguments).X
    return float((truth * found).sum() / np.square(truth).sum())


@pytest.fixture(scope="module")
def escaped():
    """A screen of which 40 % of the cells escaped; trained once."""
    return trained(screen(escape_rate=0.4), guide_key="guide")


@pytest.fixture(scope="module")
def probability(escaped):
    return escaped.get_response_probability()


@pytest.fixture(scope="module")
def plain():
    return train_small(small_screen(), spread=False)


# What is recovered -------------------------------------------------------------------------------


def test_effects_are_those_on_cells_that_respond(escaped):
    assert 0.85 <= slope(escaped) <= 1.1
    assert slope(escaped, among="all") < 0.8


def test_escaped_cells_are_told_with_calibrated_probabilities(escaped, probability):
    known = np.isfinite(probability)
    responded, found = ~escaped.adata.obs["true_escaped"].to_numpy()[known], probability[known]
    assert known.sum() > 500
    n = responded.sum()
    auc = (rankdata(found)[responded].sum() - n * (n + 1) / 2) / (n * (~responded).sum())
    assert auc >= 0.85
    tenth = np.minimum((found * 10).astype(int), 9)
    table = pd.DataFrame({"said": found, "true": responded}).groupby(tenth)
    off = (table["said"].mean() - table["true"].mean()).abs()
    assert float((off * table.size()).sum() / len(found)) <= 0.06


def test_rates_are_near_the_true_one(escaped):
    responses = escaped.module.responses
    sure = (responses.acts & (responses.evidence > 3)).numpy()
    assert sure.sum() >= 3
    np.testing.assert_allclose(responses.rates.numpy()[sure], 0.6, atol=0.15)
    assert len(responses.of_guides) == 16


def test_observed_effects_weighted_by_responses_agree_with_the_predicted(escaped):
    """Of perturbations that the model knows, whose cells all have a probability."""
    escaped.get_response_probability()
    responses = escaped.module.responses
    known = (responses.acts & (responses.evidence > 3)).numpy()
    names = [name for name, k in zip(escaped.perturbations, known, strict=True) if k]
    truth = simulated_ate(escaped.adata, names, n_samples=1000).X
    slopes = []
    for weights in (None, "sams_response"):
        effect = observed_ate(escaped.adata, perturbations=names, weights=weights).X
        slopes.append((truth * effect).sum() / np.square(truth).sum())
    assert slopes[0] < 0.8
    assert 0.85 < slopes[1] < 1.15


def test_where_no_cell_escaped_nearly_all_respond():
    """Slopes of effects were within .08 of those of a model in which all cells respond."""
    model = trained(screen(escape_rate=0.0))
    responses = model.module.responses
    # Rates of weak effects are those that are expected a priori.
    sure = (responses.acts & (responses.evidence > 5)).numpy()
    assert sure.sum() >= 3
    assert (responses.rates.numpy()[sure] > 0.9).all()
    assert 0.9 <= slope(model) <= 1.15


# What is written ---------------------------------------------------------------------------------


def test_probabilities_are_written_beside_the_cells(escaped, probability):
    adata = escaped.adata
    np.testing.assert_array_equal(adata.obs["sams_response"], probability)
    assert np.isnan(probability[adata.obs["perturbation"] == "control"]).all()
    known = probability[np.isfinite(probability)]
    assert ((known >= 0) & (known <= 1)).all()
    del adata.obs["sams_response"]
    some = [950, 3, 600]
    np.testing.assert_allclose(
        escaped.get_response_probability(indices=some, key_added="p", batch_size=2),
        probability[some],
        atol=1e-4,
    )
    assert "sams_response" not in adata.obs
    assert adata.obs["p"].notna().sum() == np.isfinite(probability[some]).sum()
    del adata.obs["p"]


def test_saved_and_loaded_it_says_the_same(escaped, probability, tmp_path):
    escaped.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", escaped.adata, accelerator="cpu")
    assert loaded.module.has_branches
    np.testing.assert_array_equal(loaded.get_response_probability(key_added=None), probability)


def test_cells_of_other_data_are_told_by_their_guides_or_without(escaped, probability):
    other = screen(escape_rate=0.4)
    chosen = np.flatnonzero(np.isfinite(probability))[:200]
    other = other[chosen].copy()
    np.testing.assert_allclose(
        escaped.get_response_probability(other), probability[chosen], atol=1e-3
    )
    del other.obs["guide"]
    without = other[:, :].copy()
    for slot in (without.obs, without.obsm, without.uns):
        for key in [key for key in slot if str(key).startswith("_scvi")]:
            del slot[key]
    found = escaped.get_response_probability(without)
    assert np.isfinite(found).all()
    # The prior of the perturbation is in place of the guide's.
    assert np.abs(found - probability[chosen]).mean() < 0.1


# Which cells effects are of ----------------------------------------------------------------------


def test_effects_among_all_are_those_on_responding_cells_times_their_rate(escaped):
    labels = ["control", *escaped.perturbations, escaped.adata.obs["perturbation"].iloc[-1]]
    labels = labels[1:]
    tables = []
    for among in ("responding", "all"):
        scvi.settings.seed = 5
        tables.append(escaped.predict_ate(labels, n_samples=300, among=among, key_added=None))
    scvi.settings.seed = None
    responding, everyone = tables
    rates = escaped.module.responses.rates.numpy()
    names, acts = escaped.perturbations, escaped.module.responses.acts.numpy()
    pair = [names.index(name) for name in labels[-1].split("+")]
    log_odds = [np.log(rates[i] / (1 - rates[i])) for i in pair if acts[i]]
    of_pair = 1 / (1 + np.exp(-np.mean(log_odds))) if log_odds else 1.0
    expected = np.append(rates, of_pair)[:, None]
    np.testing.assert_allclose(everyone.X, responding.X * expected, rtol=1e-3, atol=1e-5)
    for layer in ("standard_error", "interval_low", "interval_high"):
        np.testing.assert_allclose(
            everyone.layers[layer], responding.layers[layer] * expected, rtol=1e-3, atol=1e-5
        )
    np.testing.assert_allclose(
        everyone.obs["effect_norm"], responding.obs["effect_norm"] * expected[:, 0], rtol=1e-3
    )
    assert (responding.uns["ate"]["among"], everyone.uns["ate"]["among"]) == ("responding", "all")


def test_cells_among_all_respond_as_often_as_those_that_carry_the_label(escaped):
    responses = escaped.module.responses
    place = int(np.argmax(np.where(responses.acts, responses.evidence, 0)))
    name, rate = escaped.perturbations[place], float(responses.rates[place])
    tables = {}
    for among in ("responding", "all"):
        scvi.settings.seed = 5
        tables[among] = escaped.predict(["control", name], among=among)
        assert tables[among].uns["prediction"]["among"] == among
    scvi.settings.seed = None
    n = len(tables["all"]) // 2
    base, moved = tables["responding"].X[:n], tables["responding"].X[n:]
    np.testing.assert_array_equal(tables["all"].X[:n], base)
    changed = np.abs(tables["all"].X[n:] - base).max(axis=1) > 1e-6
    assert changed.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / n))
    np.testing.assert_array_equal(tables["all"].X[n:][changed], moved[changed])


def test_posterior_means_are_in_the_likelier_branch_and_samples_in_either(escaped, probability):
    cells = np.flatnonzero(np.isfinite(probability))
    respond = {}
    for sampled in (False, True):
        scvi.settings.seed = 2
        reader = escaped._read(None, cells, None)
        shifts = escaped.module.shift_moments(reader.effects)[0][None]
        respond[sampled] = np.zeros(len(cells), dtype=bool)
        for found in reader.encoded(shifts, sampled=sampled):
            respond[sampled][found.place] = (found.shift[0] != 0).any(dim=1).cpu().numpy()
    scvi.settings.seed = None
    # Of fewer samples of basal states than the probability itself.
    assert (respond[False] == (probability[cells] > 0.5)).mean() > 0.95
    assert respond[True].mean() == pytest.approx(probability[cells].mean(), abs=0.04)
    unsure = np.abs(probability[cells] - 0.5) < 0.4
    differ = (respond[True] != respond[False])[unsure].mean()
    expected = np.minimum(probability[cells], 1 - probability[cells])[unsure].mean()
    assert differ == pytest.approx(expected, abs=0.1)


def test_without_responses_among_changes_nothing(plain):
    tables = []
    for among in ("responding", "all"):
        scvi.settings.seed = 5
        tables.append(plain.predict_ate(n_samples=200, among=among, key_added=None))
        cells = plain.predict(["P001"], among=among)
        assert "among" not in cells.uns["prediction"]
    scvi.settings.seed = None
    np.testing.assert_array_equal(tables[0].X, tables[1].X)
    assert "among" not in tables[1].uns["ate"]


def test_errors_name_what_is_wrong(escaped, plain):
    with pytest.raises(SAMSError, match="responses=True"):
        plain.get_response_probability()
    assert "sams_response" not in plain.adata.obs
    with pytest.raises(SAMSError, match="'responded'"):
        escaped.predict_ate(["P001"], among="responded")
    with pytest.raises(SAMSError, match="'escaped'"):
        escaped.predict(["P001"], among="escaped")
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    with pytest.raises(InvalidArgumentError, match="responses"):
        SAMSVAE(adata, responses="yes")
    with pytest.raises(SAMSError, match="not trained"):
        SAMSVAE(adata, n_latent=2, responses=True).get_response_probability()
    CPAVAE.setup_anndata(adata)
    with pytest.raises((SAMSError, TypeError), match="responses"):
        CPAVAE(adata, responses=True)


def test_a_perturbation_without_training_cells(caplog):
    """It is not known to act, so that all of its cells count as responding."""
    adata = small_screen()
    carries = adata.obs["perturbation"].astype(str).str.contains("P004").to_numpy()
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=3, n_hidden=8, effect_n_hidden=6, responses=True)
    keep = np.flatnonzero(~carries)
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        model.train(
            **(TRAINING | {"max_epochs": 3}),
            datasplitter_kwargs={
                "external_indexing": [keep[:-10], keep[-10:], np.flatnonzero(carries)]
            },
        )
    place = model.perturbations.index("P004")
    assert model.module.cells_per_perturbation[place] == 0
    assert not model.module.responses.acts[place]
    assert model.module.responses.rates[place] == 1
    alone = np.flatnonzero(adata.obs["perturbation"] == "P004")
    assert np.isnan(model.get_response_probability(indices=alone, key_added=None)).all()
    table = model.predict_ate(["P004"], n_samples=100, among="all", key_added=None)
    assert np.isfinite(table.X).all()
