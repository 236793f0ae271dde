"""Far from the data results are finite: rates are bounded as the means in likelihoods are."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from model.builders import small_screen, train_small
from scvi_sams.model._contrast import norms, summary
from scvi_sams.module._likelihoods import LIKELIHOODS

FEW = {"n_samples": 40, "n_posterior_samples": 20}
LARGEST_RATE = np.exp(60)
SIZES = {"size factors": {"size_factor_key": "transcriptome"}, "sums of counts": {}}


def finite(values):
    values = values.toarray() if sparse.issparse(values) else np.asarray(values, dtype=np.float64)
    assert np.isfinite(values).all()
    return values


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def setup(request):
    return request.param


@pytest.mark.parametrize("gene_likelihood", ["nb", "poisson"])
def test_effects_and_cells_at_doses_far_above_those_measured(setup, gene_likelihood):
    adata = small_screen(dosages=[0.5, 1.0])
    model = train_small(adata, setup | {"dosage_key": "dosage"}, gene_likelihood=gene_likelihood)
    for dose in (1e3, 1e9):
        for method in ("lognorm", "lograte", "mean"):
            ate = model.predict_ate(["P001", "P002"], dosages=[dose] * 2, method=method, **FEW)
            for values in (ate.X, *ate.layers.values(), ate.obs.select_dtypes("number")):
                finite(values)
        rate = finite(model.predict(["P001"], dosages=[dose], output="rate").X)
        assert rate.max() <= LARGEST_RATE * 1.001
        counts = finite(model.predict(["P001"], dosages=[dose], output="counts").X)
        assert counts.min() >= 0
        finite(model.predict(["P001"], dosages=[dose]).X)
    finite(model.predict_dose_response(["P001"], [0.0, 1e6], n_samples=40).X)


def test_covariates_as_large_as_are_accepted(setup):
    adata = small_screen()
    adata.obs["age"] = np.where(np.arange(adata.n_obs) % 2, 1e9, 0.0)
    model = train_small(adata, setup | {"continuous_covariate_keys": ["age"]}, spread=False)
    finite(model.get_normalized_expression(return_numpy=True))
    finite(model.posterior_predictive_sample())
    finite(model.predict_ate(["P001"], **FEW).X)
    finite(model.get_latent_programs())
    genes = model.differential_expression(group1="P001", n_samples=20)
    finite(genes[["lfc_mean", "scale1", "scale2", "proba_de"]])
    assert np.isfinite(model.get_elbo())


@pytest.mark.parametrize("log_theta", [-90.0, 90.0])
def test_dispersions_beyond_single_precision(setup, log_theta):
    model = train_small(small_screen(), setup)
    with torch.no_grad():
        model.module.likelihood.log_inverse_dispersion.fill_(log_theta)
    finite(model.get_elbo(return_mean=False))
    finite(model.posterior_predictive_sample())
    finite(model.predict_ate(["P001"], **FEW).X)


def test_rates_within_the_bounds_are_exact_and_never_zero():
    for name in ("nb", "poisson"):
        likelihood = LIKELIHOODS[name](3, uses_size_factor=True)
        rate = likelihood.rate(torch.tensor([-50.0, 0.5, 50.0]))
        np.testing.assert_allclose(rate, np.exp([-50, 0.5, 50]), rtol=1e-5)
        extreme = likelihood.rate(torch.tensor([-500.0, 0.0, 500.0]))
        np.testing.assert_allclose(extreme, [1 / LARGEST_RATE, 1, LARGEST_RATE], rtol=1e-5)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_drawn_counts_of_huge_means_are_those_means(name):
    """torch draws whole numbers of 64 bits: beyond, they would be negative."""
    likelihood = LIKELIHOODS[name](2, uses_size_factor=True)
    if name == "nb":
        likelihood.log_inverse_dispersion.data.fill_(25.0)
    logits = torch.log(torch.tensor([3e22, 50.0])).expand(1, 2000, 2)
    with torch.no_grad():
        drawn = likelihood.sample(logits, torch.ones(2000))[0].double()
    np.testing.assert_allclose(drawn[:, 0].mean(), 3e22, rtol=1e-4)
    assert abs(drawn[:, 1].mean() - 50) < 1
    assert (drawn >= 0).all()


def test_errors_and_norms_of_effects_whose_squares_are_too_large():
    draws = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    huge = draws * 1e25
    mean, error, low, high = summary(huge, 0.9)
    expected = pd.DataFrame(draws.numpy()).sem() * 1e25
    np.testing.assert_allclose(error, expected, rtol=1e-4)
    assert (low < mean).all()
    assert (mean < high).all()
    np.testing.assert_allclose(norms(huge), norms(draws) * 1e25, rtol=1e-5)
