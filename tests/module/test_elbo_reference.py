"""The objective against a slow implementation with one loop per cell and per particle."""

from itertools import product

import numpy as np
import pytest
import torch

from module.builders import COVARIATE_SIZES, LIKELIHOODS, VARIANTS, make_module, make_tensors
from module.reference import ReferenceELBO, recorded_draws
from scvi_sams._constants import REGISTRY_KEYS


def assert_agrees_in_float64(module, tensors):
    tensors = {key: value.double() for key, value in tensors.items()}
    assert_agrees(module.double(), tensors, rtol=1e-9, atol=1e-11)


def assert_agrees(module, tensors, *, kl_weight=1.0, rtol=1e-4, atol=2e-5):
    torch.manual_seed(3)
    with recorded_draws(module) as draws:
        output = module(tensors, loss_kwargs={"kl_weight": kl_weight})[2]
    reference = ReferenceELBO(module, tensors, draws, kl_weight)
    assert output.kl_local.keys() == reference.kl.keys()
    for name, expected in reference.kl.items():
        actual = output.kl_local[name].detach().numpy()
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)
    reconstruction = output.reconstruction_loss["reconstruction_loss"].detach().numpy()
    np.testing.assert_allclose(reconstruction, reference.reconstruction, rtol=rtol)
    assert output.loss.item() == pytest.approx(reference.loss, rel=rtol)


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize(("likelihood", "size_factor"), LIKELIHOODS)
@pytest.mark.parametrize("concentration", [None, 2.5], ids=["bernoulli", "beta"])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_every_term_of_every_cell(
    correlated_basal, correlated_effects, likelihood, size_factor, concentration, estimator
):
    module = make_module(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        gene_likelihood=likelihood,
        uses_size_factor=size_factor,
        mask_prior_probability=0.4,
        mask_prior_concentration=concentration,
        kl_estimator=estimator,
        global_kl_weight=2.5,
        **COVARIATE_SIZES,
    )
    tensors = make_tensors(counts=likelihood != "normal", size_factor=size_factor, covariates=True)
    assert_agrees(module, tensors, kl_weight=0.7)


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
def test_deep_networks_and_no_covariates(correlated_basal, correlated_effects):
    module = make_module(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        n_layers=3,
        effect_n_layers=4,
    )
    assert_agrees_in_float64(module, make_tensors())


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
def test_no_axis_is_taken_for_another_where_all_sizes_are_equal(
    correlated_basal, correlated_effects, likelihood
):
    """Cells = genes = particles = latents = perturbations: a wrong broadcast would go unnoticed."""
    n = 5
    codes = [[0, 3], [1, 2], [2, 4], [3, -1], [4, 0]]
    doses = [[1, 2], [0.5, 1], [1, 3], [1, 0], [2, 0.7]]
    module = make_module(
        n_latent=n,
        n_hidden=n,
        effect_n_hidden=n,
        n_particles=n,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        gene_likelihood=likelihood,
    )
    tensors = make_tensors(codes=codes, doses=doses, counts=likelihood != "normal")
    assert tensors[REGISTRY_KEYS.X].shape == (n, n)
    assert_agrees_in_float64(module, tensors)


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize("n_cells", [1, 7])
def test_one_particle(correlated_basal, correlated_effects, n_cells):
    module = make_module(
        n_particles=1, correlated_basal=correlated_basal, correlated_effects=correlated_effects
    )
    cells = {key: value[-1 - n_cells : -1] for key, value in make_tensors().items()}
    assert_agrees_in_float64(module, cells)


def test_the_configurations_differ():
    """The agreement above would mean little if variants and options had the same loss."""
    losses = []
    for (basal, effects), concentration, estimator in product(
        VARIANTS, [None, 2.5], ["closed_form", "monte_carlo"]
    ):
        module = make_module(
            correlated_basal=basal,
            correlated_effects=effects,
            mask_prior_concentration=concentration,
            kl_estimator=estimator,
        )
        torch.manual_seed(3)
        losses.append(module(make_tensors())[2].loss.item())
    assert len(np.unique(np.round(losses, 3))) == len(losses)
