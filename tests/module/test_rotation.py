"""The rotation to sparse axes: found, folded in exactly, and started from."""

import math

import pytest
import torch

from module.builders import COVARIATE_SIZES, VARIANTS, make_module, make_tensors
from scvi_sams.module import sum_over_slots
from scvi_sams.module._networks import NormalHead
from scvi_sams.module._rotation import sparsest_rotation


def sparse_effects(n_perturbations: int, n_latent: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_perturbations, n_latent)
    masks = torch.rand(shape, generator=generator) < 0.15
    return masks * 2 * torch.randn(shape, generator=generator)


def random_rotation(n_latent: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n_latent, n_latent, generator=generator)).Q


def test_sparse_axes_are_found_up_to_order_and_sign():
    effects = sparse_effects(60, 8, seed=0)
    turned = effects @ random_rotation(8, seed=1)
    rotation = sparsest_rotation(turned)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), atol=1e-5, rtol=0)
    # |correlation| of found axes with true ones is a permutation matrix if they are the same.
    likeness = torch.corrcoef(torch.cat([effects, turned @ rotation], dim=1).T)[:8, 8:].abs()
    matches = likeness > 0.97
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) == 1).all()


def test_rotation_never_raises_the_sum_of_sizes():
    effects = torch.randn(20, 5, generator=torch.Generator().manual_seed(3))
    turned = effects @ sparsest_rotation(effects)
    assert turned.abs().sum() <= effects.abs().sum() * 1.001
    torch.testing.assert_close(turned.square().sum(1), effects.square().sum(1))


def test_same_effects_give_the_same_rotation_and_leave_the_random_state_alone():
    effects = sparse_effects(30, 6, seed=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sparsest_rotation(effects)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, sparsest_rotation(effects))


@pytest.mark.parametrize("n_perturbations", [1, 5])
def test_fewer_perturbations_than_latents(n_perturbations: int):
    effects = torch.randn(n_perturbations, 12, generator=torch.Generator().manual_seed(0))
    turned = effects @ sparsest_rotation(effects)
    # Every row of at most n axes can be turned onto few of them.
    assert turned.abs().sum() < effects.abs().sum()


def test_no_effects_at_all():
    rotation = sparsest_rotation(torch.zeros(4, 3))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-6, rtol=0)


def means_and_logits(module, batch):
    """Mean effects, mean basal states and decoded logits with all masks on."""
    rows = torch.arange(len(module.masks.logits))
    effects = module.effects(rows, torch.ones_like(module.masks.logits)[None]).loc
    cells = module.read_batch(batch)
    slots = torch.where(cells.codes < 0, len(rows), cells.codes)
    shift = sum_over_slots(effects, slots, cells.doses)
    basal = module.encode(cells.x, shift, cells.covariates).loc
    logits = module.decode(basal, shift, cells.covariates)
    return effects[0], basal, logits, module.likelihood.log_prob(cells.x, logits, cells.size)


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize("covariates", [False, True])
def test_fold_leaves_likelihood_and_basal_norms_alone(
    correlated_basal: bool, correlated_effects: bool, covariates: bool
):
    changes = COVARIATE_SIZES if covariates else {}
    module = make_module(
        correlated_basal=correlated_basal, correlated_effects=correlated_effects, **changes
    )
    batch = make_tensors(covariates=covariates)
    rotation = random_rotation(module.n_latent, seed=4)
    with torch.no_grad():
        effects, basal, logits, log_px = means_and_logits(module, batch)
        module.rotate(rotation)
        turned_effects, turned_basal, turned_logits, turned_log_px = means_and_logits(module, batch)
    torch.testing.assert_close(turned_effects, effects @ rotation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_basal, basal @ rotation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_log_px, log_px, atol=1e-4, rtol=1e-5)


def test_equal_variances_turn_exactly():
    head = NormalHead(4, 3)
    with torch.no_grad():
        head.log_variance.weight.copy_(head.log_variance.weight[:1].expand(3, 4))
        head.log_variance.bias.fill_(-1.0)
    hidden = torch.randn(6, 4)
    before = head(hidden).scale.detach()
    head.rotate(random_rotation(3, seed=0))
    torch.testing.assert_close(head(hidden).scale, before)


def test_dense_phase_has_every_mask_on_at_no_cost():
    module = make_module(mask_initial_probability=0.2)
    module.begin_dense_phase()
    draw = module.global_posterior(torch.arange(5), 3)
    assert (draw.shifts != 0).all()
    assert (draw.kl["masks"] == 0).all()
    assert (module.masks.inclusion_probability == 1).all()


def test_masks_start_from_the_evidence_for_each_effect():
    module = make_module(
        correlated_effects=False, mask_prior_probability=0.1, effect_prior_scale=1.0
    )
    with torch.no_grad():
        module.effects.loc.copy_(
            torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0], [0.3, 0, 0]])
        )
        module.effects.log_scale.fill_(math.log(0.1))
    module.begin_dense_phase()
    module.find_sparse_axes()
    assert not module.masks.is_dense
    # log(.1 / .9) + 0 - log(10) for no effect, clamped at -3; far above 3 for the others.
    on = module.masks.logits > 0
    assert (on.sum(dim=1) == 1).all()
    assert (on[:3].sum(dim=0) == 1).all()
    torch.testing.assert_close(module.masks.logits[on][:3], torch.full((3,), 3.0))
    torch.testing.assert_close(module.masks.logits[~on], torch.full((10,), -3.0))
    # e = 0.3, s = 0.1: log(.1 / .9) + 4.5 - log(10) = 0.0002
    assert module.masks.logits[4].max().item() == pytest.approx(0.0002, abs=0.05)
