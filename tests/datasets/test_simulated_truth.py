import numpy as np
import pytest
from anndata import AnnData
from scipy.special import gammaln

from scvi_sams.datasets import (
    _simulated_truth,
    simulate_screen,
    simulated_ate,
    simulated_log_likelihood,
    simulated_rates,
)
from scvi_sams.exceptions import MissingKeyError, UnknownPerturbationError


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(
        n_genes=30,
        n_controls=4000,
        n_perturbations=4,
        cells_per_perturbation=4000,
        n_combinations=1,
        cells_per_combination=4000,
        n_latent=6,
        n_hidden=16,
        library_size=1e4,
        library_log_sd=0.0,
    )


def test_rates_by_hand(screen):
    decoder = screen.uns["simulation"]["decoder"]
    latent = np.array([[0.3, -1.0, 2.0, 0.0, 0.5, -0.2], [0.0] * 6])
    activity = []
    for weights in decoder["hidden_weight"]:
        value = sum(w * z for w, z in zip(weights, latent[0], strict=True))
        activity.append(value if value > 0 else 0.2 * value)
    unnormalised = np.exp(decoder["gene_weight"] @ np.array(activity) + decoder["gene_bias"])
    rates = simulated_rates(screen, latent)
    np.testing.assert_allclose(rates[0], unnormalised / unnormalised.sum(), rtol=1e-12)
    at_zero = np.exp(decoder["gene_bias"])
    np.testing.assert_allclose(rates[1], at_zero / at_zero.sum(), rtol=1e-12)


def test_rates_of_some_genes_are_shares_among_them(screen):
    latent = screen.obsm["true_latent"][:20]
    some = screen[:, [5, 3, 17]]
    expected = simulated_rates(screen, latent)[:, [5, 3, 17]]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(simulated_rates(some, latent), expected, rtol=1e-12)


def test_log_likelihood_by_hand(screen):
    some = screen[::997]
    x = some.X.toarray().astype(np.float64)
    theta = some.var["true_inverse_dispersion"].to_numpy()
    mean = x.sum(axis=1, keepdims=True) * simulated_rates(some, some.obsm["true_latent"])
    expected = (
        gammaln(x + theta)
        - gammaln(theta)
        - gammaln(x + 1)
        + theta * np.log(theta / (theta + mean))
        + x * np.log(mean / (theta + mean))
    ).sum(axis=1)
    np.testing.assert_allclose(simulated_log_likelihood(some), expected, rtol=1e-9)


def test_log_likelihood_does_not_depend_on_chunks(screen, monkeypatch):
    some = screen[:500]
    expected = simulated_log_likelihood(some)
    monkeypatch.setattr(_simulated_truth, "_ENTRIES_PER_CHUNK", 30 * 77)
    np.testing.assert_allclose(simulated_log_likelihood(some), expected, rtol=1e-12)


def test_true_latent_explains_the_counts_best(screen):
    some = screen[::40].copy()
    truth = simulated_log_likelihood(some)
    carried = some.obs["n_perturbations"].to_numpy() > 0
    some.obsm["true_latent"] = some.obsm["true_basal"]
    gain = truth - simulated_log_likelihood(some)
    assert gain[carried].mean() > 4 * gain[carried].std() / np.sqrt(carried.sum())
    np.testing.assert_array_equal(gain[~carried], 0)


def test_ate_agrees_with_the_cells_drawn(screen):
    pair = next(x for x in screen.obs["perturbation"].cat.categories if "+" in x)
    labels = ["P001", "P004", pair]
    truth = simulated_ate(screen, labels, n_samples=8000)
    assert list(truth.obs_names) == labels
    assert truth.var_names.equals(screen.var_names)
    x = screen.X.toarray().astype(np.float64)
    values = np.log2(1 + 1e4 * x / x.sum(axis=1, keepdims=True))
    of = {label: values[(screen.obs["perturbation"] == label).to_numpy()] for label in labels}
    control = values[(screen.obs["perturbation"] == "control").to_numpy()]
    for row, label in enumerate(labels):
        observed = of[label].mean(axis=0) - control.mean(axis=0)
        variance = (of[label].var(axis=0) + control.var(axis=0)) / 4000
        error = np.sqrt(variance + truth.layers["standard_error"][row] ** 2)
        z = (observed - truth.X[row]) / error
        assert np.abs(z).max() < 4.5
        assert np.abs(observed).max() > 8 * error.max()  # so the comparison has power


def test_ate_standard_error_is_the_spread_between_seeds(screen, monkeypatch):
    monkeypatch.setattr(
        _simulated_truth, "_ENTRIES_PER_CHUNK", 30 * 50
    )  # chunks must be independent
    draws = [simulated_ate(screen, ["P002"], n_samples=200, seed=seed) for seed in range(60)]
    spread = np.std([draw.X[0] for draw in draws], axis=0, ddof=1)
    stated = np.mean([draw.layers["standard_error"][0] for draw in draws], axis=0)
    assert np.mean(spread / stated) == pytest.approx(1, abs=0.05)


def test_ate_does_not_depend_on_order_or_company(screen):
    labels = ["P003", "control", "P002+P001", "P001+P002"]
    together = simulated_ate(screen, labels, n_samples=50)
    alone = simulated_ate(screen, ["P001+P002"], n_samples=50)
    np.testing.assert_array_equal(together.X[1], 0)
    np.testing.assert_allclose(together.X[2], together.X[3], atol=1e-12)
    np.testing.assert_array_equal(together.X[3], alone.X[0])
    assert not np.allclose(together.X[0], together.X[3])


def test_ate_uses_every_chunk(screen, monkeypatch):
    whole = simulated_ate(screen, ["P001"], n_samples=4000)
    monkeypatch.setattr(
        _simulated_truth, "_ENTRIES_PER_CHUNK", 30 * 900
    )  # 4 chunks of 900, one of 400
    parts = simulated_ate(screen, ["P001"], n_samples=4000)
    error = np.hypot(whole.layers["standard_error"], parts.layers["standard_error"])
    assert np.abs((whole.X - parts.X) / error).max() < 4
    np.testing.assert_allclose(
        whole.layers["standard_error"], parts.layers["standard_error"], rtol=0.1
    )


def test_unknown_perturbation(screen):
    with pytest.raises(UnknownPerturbationError, match=r"'P001\+P999' names \['P999'\]"):
        simulated_ate(screen, ["P001+P999"])


def test_screens_without_truth():
    adata = AnnData(np.ones((2, 3)))
    with pytest.raises(MissingKeyError, match="simulate_screen"):
        simulated_log_likelihood(adata)


def test_genes_that_were_not_simulated(screen):
    renamed = screen[:5].copy()
    renamed.var_names = ["ACTB", *renamed.var_names[1:]]
    with pytest.raises(MissingKeyError, match=r"\['ACTB'\]"):
        simulated_rates(renamed, renamed.obsm["true_latent"])
