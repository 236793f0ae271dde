"""CPA-VAE: SAMS-VAE without masks, term by term."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from module.builders import make_module, make_tensors, score
from scvi_sams.module import CPAVAEModule

EITHER_BASAL = pytest.mark.parametrize("correlated_basal", [False, True])


def make_pair(**changes):
    """Make a CPA-VAE, and a mean-field SAMS-VAE with the same parameters and any masks."""
    sams = make_module(correlated_effects=False, **changes)
    cpa = make_module(CPAVAEModule, seed=None, **changes)
    missing = cpa.load_state_dict(sams.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert set(missing.unexpected_keys) == {
        "masks.logits",
        "masks.is_dense",
        "masks.is_excluded",
    }
    return cpa, sams


def seeded(module, tensors):
    torch.manual_seed(3)
    return score(module, tensors)


@EITHER_BASAL
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_bound_is_that_of_sams_vae_with_all_masks_on(correlated_basal, estimator):
    cpa, sams = make_pair(correlated_basal=correlated_basal, kl_estimator=estimator)
    tensors = make_tensors()
    mine = seeded(cpa, tensors)

    def all_on(posterior, rows, n_particles):
        return torch.ones(n_particles, len(rows), posterior.logits.shape[1])

    with mock.patch("scvi_sams.module._masks.MaskPosterior.sample", all_on):
        theirs = seeded(sams, tensors)
    # Not to the last bit: processors differ in how they add up the products with masks.
    for name in ("kl_z_basal", "kl_effects"):
        torch.testing.assert_close(mine.kl_local[name], theirs.kl_local[name])
    assert set(mine.kl_local) == {"kl_z_basal", "kl_effects"}
    for name, value in theirs.reconstruction_loss.items():
        torch.testing.assert_close(mine.reconstruction_loss[name], value)
    masks = theirs.kl_local["kl_masks"].mean().item()
    assert abs(masks) > 0.01
    assert mine.loss.item() == pytest.approx(theirs.loss.item() - masks, rel=1e-6)


@EITHER_BASAL
def test_training_starts_as_that_of_sams_vae_does_with_all_masks_on(correlated_basal):
    """In the dense phase masks cost nothing, so loss and gradients are the same."""
    cpa, sams = make_pair(correlated_basal=correlated_basal)
    sams.begin_dense_phase()
    tensors = make_tensors()
    losses = [seeded(module, tensors).loss for module in (cpa, sams)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in sams.named_parameters()}
    for name, parameter in cpa.named_parameters():
        np.testing.assert_allclose(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)


def test_divergence_of_effects_by_torch():
    module = make_module(CPAVAEModule, effect_prior_scale=1.7)
    rows = torch.tensor([0, 3])
    kl = module.global_posterior(rows, 2).kl
    assert set(kl) == {"effects"}
    posterior = Normal(module.effects.loc[rows], module.effects.log_scale[rows].exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.7)).sum(-1)
    torch.testing.assert_close(kl["effects"], expected[None])


def test_evidence_of_many_cells_is_charged_more():
    """A single's divergence costs (1 + N_t / evidence_cells) / N_t; N_t is 13 here."""
    tensors = make_tensors(codes=[[0]], doses=[[1.0]])
    plain = seeded(make_module(CPAVAEModule), tensors)
    coarse = seeded(make_module(CPAVAEModule, evidence_cells=26.0), tensors)
    added = 0.5 * plain.kl_local["kl_effects"].item()
    assert coarse.loss.item() == pytest.approx(plain.loss.item() + added, rel=1e-5)
    assert torch.equal(coarse.kl_local["kl_effects"], plain.kl_local["kl_effects"])
