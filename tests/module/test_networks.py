"""Encoder, decoder and covariates against the same written with concatenated inputs."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from module.builders import COVARIATE_SIZES, make_module, make_tensors
from scvi_sams.module._minibatch import CovariateEncoding
from scvi_sams.module._networks import BasalEncoder, Decoder, HiddenLayers

N_PARTICLES, N_CELLS, N_GENES, N_LATENT, N_COVARIATES = 4, 6, 9, 3, 2


def make_inputs():
    torch.manual_seed(1)
    x = torch.randn(N_CELLS, N_GENES)
    shift = torch.randn(N_PARTICLES, N_CELLS, N_LATENT)
    return x, shift, torch.randn(N_CELLS, N_COVARIATES)


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("n_covariates", [0, N_COVARIATES])
def test_encoder_is_one_network_over_concatenated_inputs(n_layers, n_covariates):
    """The product with x is computed once; the result is that of each particle on its own."""
    torch.manual_seed(0)
    encoder = BasalEncoder(
        N_GENES, N_LATENT, n_covariates, n_layers=n_layers, n_hidden=8, sees_shift=True
    )
    x, shift, covariates = make_inputs()
    weights = [encoder.from_x.weight, encoder.from_shift.weight]
    if n_covariates:
        weights.append(encoder.from_covariates.weight)
    weight = torch.cat(weights, dim=1)
    posterior = encoder(x, shift, covariates if n_covariates else None)
    assert posterior.loc.shape == (N_PARTICLES, N_CELLS, N_LATENT)
    for particle in range(N_PARTICLES):
        inputs = torch.cat([x, shift[particle], covariates[:, :n_covariates]], dim=1)
        first = functional.linear(inputs, weight, encoder.from_x.bias)
        state = encoder.head(encoder.hidden_layers(first))
        expected = state.loc - shift[particle]
        np.testing.assert_allclose(posterior.loc[particle].detach(), expected.detach(), atol=1e-5)
        np.testing.assert_allclose(
            posterior.scale[particle].detach(), state.scale.detach(), rtol=1e-5
        )


def test_encoder_that_does_not_see_the_shift():
    encoder = BasalEncoder(N_GENES, N_LATENT, 0, n_layers=1, n_hidden=8, sees_shift=False)
    x, shift, _ = make_inputs()
    posterior = encoder(x, shift, None)
    assert posterior.loc.shape == (1, N_CELLS, N_LATENT)
    assert torch.equal(posterior.loc, encoder(x, shift + 5, None).loc)


@pytest.mark.parametrize("n_covariates", [0, N_COVARIATES])
def test_decoder_is_one_network_over_concatenated_inputs(n_covariates):
    torch.manual_seed(0)
    decoder = Decoder(N_LATENT, N_GENES, n_covariates, n_layers=2, n_hidden=8)
    _, z, covariates = make_inputs()
    weights = [decoder.from_z.weight]
    if n_covariates:
        weights.append(decoder.from_covariates.weight)
    inputs = torch.cat([z, covariates[:, :n_covariates].expand(N_PARTICLES, -1, -1)], dim=-1)
    first = functional.linear(inputs, torch.cat(weights, dim=1), decoder.from_z.bias)
    expected = decoder.hidden_layers(first)
    actual = decoder(z, covariates if n_covariates else None)
    np.testing.assert_allclose(actual.detach(), expected.detach(), atol=1e-5)


def test_deeper_networks_add_to_what_went_before():
    layers = HiddenLayers(2, 2)
    with torch.no_grad():
        layers.blocks[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        layers.blocks[0].bias.copy_(torch.tensor([0.5, 0.0]))
    # leaky_relu(1, -100) = (1, -1); block: (1.5, 1); sum: (2.5, 0)
    np.testing.assert_allclose(layers(torch.tensor([1.0, -100.0])).detach(), [2.5, 0.0], atol=1e-6)


def test_covariates_are_one_hot_and_then_continuous():
    encoding = CovariateEncoding(2, [3, 2], 1)
    actual = encoding(
        torch.tensor([[0.0], [1.0]]),
        torch.tensor([[2.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[-0.5], [4.0]]),
    )
    expected = [[1, 0, 0, 0, 1, 1, 0, -0.5], [0, 1, 0, 1, 0, 0, 1, 4]]
    assert actual.tolist() == expected
    assert encoding.n_out == 8


def test_a_single_batch_is_no_covariate():
    assert CovariateEncoding(1, [], 0)(torch.zeros(3, 1), None, None) is None
    only = CovariateEncoding(1, [2], 0)(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), None)
    assert only.tolist() == [[0, 1], [1, 0]]


def test_covariates_act_on_encoder_and_decoder():
    module = make_module(**COVARIATE_SIZES)
    cells = module.read_batch(make_tensors(covariates=True))
    assert cells.covariates.shape == (len(cells.x), 6)
    other = cells.covariates.flip(0)
    z = torch.zeros(1, len(cells.x), 3)
    encoded = [module.encode(cells.x, z, c).loc for c in (cells.covariates, other)]
    decoded = [module.decode(z, z, c) for c in (cells.covariates, other)]
    assert not torch.allclose(*encoded)
    assert not torch.allclose(*decoded)


def test_encoder_input_is_standardised_log_counts():
    module = make_module(seed=None, correlated_basal=False)
    x = torch.tensor([[0.0, 1.0, 2.0, 30.0, 7.0]])
    mean, sd = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0])
    module.input_mean.copy_(mean)
    module.input_sd.copy_(sd)
    shift = torch.zeros(1, 1, 3)
    expected = module.encoder((torch.log1p(x) - mean) / sd, shift, None).loc
    np.testing.assert_allclose(
        module.encode(x, shift, None).loc.detach(), expected.detach(), rtol=1e-6
    )
