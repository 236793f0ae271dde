"""Conditional VAE: the look-up of rows against one-hot inputs, and what zero rows mean."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from module.builders import CODES, COVARIATE_SIZES, DOSES, all_of, make_module, make_tensors, score
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import ConditionalVAEModule


def dosage_matrix():
    """Cells x perturbations."""
    dense = torch.zeros(len(CODES), 5)
    for cell, (codes, doses) in enumerate(zip(CODES, DOSES, strict=True)):
        for code, dose in zip(codes, doses, strict=True):
            if code >= 0:
                dense[cell, code] += dose
    return dense


def wide_layer(layers):
    """Concatenate layers without further biases to one over concatenated inputs."""
    weight = torch.cat(layers[1:], dim=1)
    first = layers[0]
    wide = nn.Linear(first.in_features + weight.shape[1], first.out_features)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([first.weight, weight], dim=1))
        wide.bias.copy_(first.bias)
    return wide


@pytest.mark.parametrize("n_layers", [1, 3])
def test_networks_of_dense_dosages(n_layers):
    """encoder([x, covariates, d]) and decoder([z, covariates, d]) with d written out."""
    module = make_module(ConditionalVAEModule, n_layers=n_layers, **COVARIATE_SIZES)
    tensors = make_tensors(covariates=True)
    cells = module.read_batch(tensors)
    d = dosage_matrix()
    from_inputs = wide_layer(
        [
            module.encoder.from_x,
            module.encoder.from_covariates.weight,
            module.encoder_rows.T,
        ]
    )
    x = (torch.log1p(cells.x) - module.input_mean) / module.input_sd
    first = from_inputs(torch.cat([x, cells.covariates, d], dim=1))
    q_z = module.encoder.head(module.encoder.hidden_layers(first))
    torch.manual_seed(0)
    outputs = module.inference(cells)
    torch.testing.assert_close(outputs["qz"].loc[0], q_z.loc, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["qz"].scale[0], q_z.scale, rtol=1e-5, atol=1e-5)

    from_state = wide_layer(
        [module.decoder.from_z, module.decoder.from_covariates.weight, module.decoder_rows.T]
    )
    z = outputs["z_basal"]
    assert z.shape == (3, 7, 3)
    inputs = torch.cat([z, *(t.expand(3, -1, -1) for t in (cells.covariates, d))], dim=-1)
    logits = module.decoder.to_genes(module.decoder.hidden_layers(from_state(inputs)))
    decoded = module.decode(z, outputs["shift"], cells.covariates)
    torch.testing.assert_close(decoded, logits, rtol=1e-5, atol=1e-5)


def test_there_are_no_global_terms():
    module = make_module(ConditionalVAEModule)
    output = score(module, make_tensors())
    assert set(output.kl_local) == {"kl_z_basal"}
    assert module.global_posterior(torch.tensor([1, 3]), 4).kl == {}
    reconstruction = output.reconstruction_loss["reconstruction_loss"].mean()
    expected = reconstruction + output.kl_local["kl_z_basal"].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_zero_rows_make_every_cell_a_control():
    module = make_module(ConditionalVAEModule)
    with torch.no_grad():
        module.encoder_rows.zero_()
        module.decoder_rows.zero_()
    tensors = make_tensors()
    controls = tensors[REGISTRY_KEYS.PERTURBATIONS].clone()
    controls[:, :3], controls[:, 3:] = -1, 0
    with mock.patch.object(torch, "randn", all_of(torch.ones)):
        own = score(module, tensors)
        as_control = score(module, tensors | {REGISTRY_KEYS.PERTURBATIONS: controls})
    assert torch.equal(own.kl_local["kl_z_basal"], as_control.kl_local["kl_z_basal"])
    for name, value in own.reconstruction_loss.items():
        assert torch.equal(value, as_control.reconstruction_loss[name])


def test_an_untrained_module_starts_without_differences_between_perturbations():
    module = make_module(ConditionalVAEModule, seed=None)
    assert not module.encoder_rows.any()
    assert not module.decoder_rows.any()
    assert module.n_shift == 12


def test_a_likelihood_of_many_particles_draws_as_many_states():
    """Rows are the same for all particles; the states must not be."""
    module = make_module(ConditionalVAEModule)
    cells = module.read_batch(make_tensors())
    torch.manual_seed(0)
    shift = module.inference(cells, n_particles=1)["shift"]
    noise = torch.randn(50, 7, module.n_latent)
    weights = module.log_importance_weights(cells, shift, noise)
    assert weights.shape == (50, 7)
    assert (weights.std(0) > 0).all()


def test_ordering_changes_nothing():
    module = make_module(ConditionalVAEModule)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.order_latents()
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
