"""The rotation to sparse axes: found, folded in exactly, and started from."""

import math

import pytest
import torch

from module.builders import COVARIATE_SIZES, VARIANTS, make_module, make_tensors
from scvi_sams.module import sum_over_slots
from scvi_sams.module._networks import NormalHead
from scvi_sams.module._rotation import (
    canonical_order,
    signed_permutation,
    sparsest_rotation,
)


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


def test_the_truth_is_recovered_from_noisy_effects():
    effects = sparse_effects(300, 20, seed=4)
    noise = 0.1 * torch.randn(300, 20, generator=torch.Generator().manual_seed(5))
    turned = effects @ random_rotation(20, seed=6) + noise
    found = turned @ sparsest_rotation(turned)
    likeness = effects.T @ found
    order = likeness.abs().argmax(dim=1)
    assert sorted(order.tolist()) == list(range(20))
    matched = found[:, order] * likeness[torch.arange(20), order].sign()
    # Noise of 0.1 is all that is left, but for what it moves the axes.
    assert (matched - effects).square().mean().sqrt() < 0.13


@pytest.mark.parametrize("shape", [(2500, 12), (60, 8), (12, 12), (5, 12), (1, 12), (1, 1)])
def test_the_rotation_is_orthogonal_to_the_last_digit(shape):
    effects = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    rotation = sparsest_rotation(effects)
    identity = torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, identity, atol=1e-14, rtol=0)
    torch.testing.assert_close(rotation.T @ rotation, identity, atol=1e-14, rtol=0)
    single = sparsest_rotation(effects.float())
    assert single.dtype == torch.float32


def test_perturbations_without_effect_do_not_hide_the_axes():
    """More than the 2,000 that are looked at, nearly all of them noise."""
    effects = sparse_effects(80, 8, seed=0)
    noise = 0.1 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    turned = torch.cat([noise[:3920], effects @ random_rotation(8, seed=1) + noise[3920:]])
    found = (turned @ sparsest_rotation(turned))[3920:]
    likeness = torch.corrcoef(torch.cat([effects, found], dim=1).T)[:8, 8:].abs()
    matches = likeness > 0.97
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) == 1).all()


@pytest.mark.parametrize("n_perturbations", [2, 5])
def test_fewer_perturbations_than_latents(n_perturbations: int):
    """Random rows are nearly at right angles, so each can all but have an axis of its own."""
    effects = torch.randn(n_perturbations, 50, generator=torch.Generator().manual_seed(0))
    turned = effects @ sparsest_rotation(effects)
    torch.testing.assert_close(turned.norm(dim=1), effects.norm(dim=1))
    strongest = turned.abs().max(dim=1)
    assert strongest.indices.unique().numel() == n_perturbations
    assert (strongest.values > 0.9 * effects.norm(dim=1)).all()


def test_a_single_perturbation_gets_one_axis_of_its_own():
    effects = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    turned = (effects @ sparsest_rotation(effects)).abs().squeeze(0)
    assert turned.max() == pytest.approx(float(effects.norm()), rel=1e-3)
    assert (turned > 0.05 * effects.norm()).sum() == 1


def test_without_effects_the_axes_stay():
    assert torch.equal(sparsest_rotation(torch.zeros(4, 3)), torch.eye(3))


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


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize("covariates", [False, True])
def test_moving_the_origin_leaves_what_is_decoded_alone(
    correlated_basal: bool, correlated_effects: bool, covariates: bool
):
    """Of cells with a unit dose of one perturbation."""
    changes = COVARIATE_SIZES if covariates else {}
    module = make_module(
        correlated_basal=correlated_basal, correlated_effects=correlated_effects, **changes
    )
    batch = make_tensors(covariates=covariates)
    cells = module.read_batch(batch)
    carried = cells.codes >= 0
    cells_of_one = (carried.sum(dim=1) == 1) & (cells.doses.where(carried, 1.0) == 1).all(dim=1)
    assert cells_of_one.any()
    origin = torch.tensor([0.7, -0.4, 0.2])
    with torch.no_grad():
        effects, basal, logits, log_px = means_and_logits(module, batch)
        module.translate(origin)
        moved_effects, moved_basal, moved_logits, moved_log_px = means_and_logits(module, batch)
    torch.testing.assert_close(moved_effects, effects - origin)
    for moved, before in (
        (moved_basal, basal),
        (moved_logits, logits),
        (moved_log_px, log_px),
    ):
        torch.testing.assert_close(
            moved[:, cells_of_one], before[:, cells_of_one], atol=1e-4, rtol=1e-5
        )


def test_controls_are_at_the_origin_once_it_is_where_they_are():
    """An encoder that ignores the shift it is given: controls move by the origin, to the digit."""
    module = make_module(correlated_basal=True)
    torch.nn.init.zeros_(module.encoder.from_shift.weight)
    batch = make_tensors()
    is_control = (module.read_batch(batch).codes < 0).all(dim=1)
    with torch.no_grad():
        _, basal, logits, _ = means_and_logits(module, batch)
        origin = basal[0, is_control].mean(dim=0)
        module.translate(origin)
        _, moved_basal, moved_logits, _ = means_and_logits(module, batch)
    torch.testing.assert_close(
        moved_basal[0, is_control].mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(moved_logits, logits, atol=1e-4, rtol=1e-5)


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
    module.start_masks()
    assert not module.masks.is_dense
    # log(.1 / .9) + 0 - log(101) / 2 for no effect; for the others far above 4.6, the limit.
    strong = module.masks.logits[:4]
    on = strong > 0
    assert (on.sum(dim=1) == 1).all()
    assert (on[:3].sum(dim=0) == 1).all()
    torch.testing.assert_close(strong[on], torch.full((4,), 4.6))
    torch.testing.assert_close(
        strong[~on], torch.full((8,), math.log(1 / 9) - math.log(101) / 2), rtol=0, atol=0.01
    )
    # e = 0.3, v = 0.01: log(.1 / .9) + 9 / 2.02 - log(101) / 2 = -0.0493
    assert module.masks.logits[4].max().item() == pytest.approx(-0.0493, abs=0.05)


def test_masks_start_from_coarsened_evidence():
    module = make_module(
        correlated_effects=False,
        mask_prior_probability=0.1,
        effect_prior_scale=2.0,
        evidence_cells=25.0,
    )
    with torch.no_grad():
        module.effects.loc.zero_()
        module.effects.loc[0, 0] = 0.5
        module.effects.log_scale.fill_(math.log(0.1))
    module.begin_dense_phase()
    module.find_sparse_axes()
    module.start_masks()
    # v = 0.01 + 1 / 25 = 0.05: log(.1 / .9) + 5 / (2 + 0.025) - log(81) / 2 = -1.9253
    assert module.masks.logits[0].max().item() == pytest.approx(-1.9253, abs=0.02)


def test_canonical_order_by_hand():
    effects = torch.tensor([[1.0, -3.0, 0.0, 2.0], [0.0, 1.0, 0.0, 2.0]])
    order, signs = canonical_order(effects)
    assert order.tolist() == [1, 3, 0, 2]
    assert signs.tolist() == [-1, 1, 1, 1]
    ordered = effects @ signed_permutation(order, signs)
    assert ordered.tolist() == [[3, 2, 1, 0], [-1, 2, 0, 0]]


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
def test_ordering_changes_names_and_nothing_else(correlated_basal: bool, correlated_effects: bool):
    """Objective, masks, effects and variances move with their dimension; a second call is idle."""
    module = make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    batch = make_tensors()
    rows = torch.arange(5)
    dense = torch.ones(1, 5, module.n_latent)
    with torch.no_grad():
        before = module.masks.inclusion_probability.clone()
        q_before = module.effects(rows, dense)
        state_before = module.encode(batch["X"], torch.zeros(1, 7, 3), None)
        order, signs = canonical_order(module.shift_moments(rows)[0])
        module.order_latents()
        q_after = module.effects(rows, dense)
        state_after = module.encode(batch["X"], torch.zeros(1, 7, 3), None)
        mean, _ = module.shift_moments(rows)
    assert order.tolist() != [0, 1, 2] or (signs < 0).any()
    torch.testing.assert_close(module.masks.inclusion_probability, before[:, order])
    torch.testing.assert_close(q_after.loc, q_before.loc[..., order] * signs)
    torch.testing.assert_close(q_after.scale, q_before.scale[..., order])
    torch.testing.assert_close(state_after.loc, state_before.loc[..., order] * signs)
    torch.testing.assert_close(state_after.scale, state_before.scale[..., order])
    # Other draws of masks estimate the means of correlated effects, so up to its noise.
    norms = mean.norm(dim=0)
    assert (norms[:-1] >= norms[1:] - 0.2).all()
    if not correlated_effects:
        assert canonical_order(mean)[0].tolist() == [0, 1, 2]
        assert canonical_order(mean)[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
def test_ordering_leaves_the_decoded_cells_alone(correlated_basal: bool, correlated_effects: bool):
    module = make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    batch = make_tensors()
    with torch.no_grad():
        _, _, logits, log_px = means_and_logits(module, batch)
        module.order_latents()
        _, _, ordered_logits, ordered_log_px = means_and_logits(module, batch)
    torch.testing.assert_close(ordered_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ordered_log_px, log_px, atol=1e-4, rtol=1e-5)
