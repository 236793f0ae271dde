"""Latent dimensions that are bends of the others, and how perturbations are kept off them."""

import math

import numpy as np
import pytest
import torch

from module.builders import CODES, make_module, make_tensors
from scvi_sams.module._curvature import curvature


def independent_states(n_cells=4000, n_latent=6, seed=0):
    return torch.randn(n_cells, n_latent, generator=torch.Generator().manual_seed(seed))


def groups_of(n_cells, n_groups):
    return torch.arange(n_cells) % n_groups


def test_independent_dimensions_bend_nowhere():
    basal = independent_states()
    shares = curvature(basal, torch.zeros_like(basal), groups_of(4000, 10))
    assert shares.abs().max() < 0.03


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_share_of_a_sum_of_squares_is_that_of_its_variance(noise):
    """sum of 5 squares has variance 10, so 10 / (10 + noise variance) of the column is a bend."""
    basal = independent_states()
    spread = noise * math.sqrt(10) * independent_states(seed=1)[:, 0]
    basal[:, 3] = basal[:, [0, 1, 2, 4, 5]].square().sum(dim=1) + spread
    shares = curvature(basal, torch.zeros_like(basal), groups_of(4000, 10))
    assert shares[3].item() == pytest.approx(1 / (1 + noise**2), abs=0.03)


def test_a_linear_function_of_the_others_is_no_bend():
    basal = independent_states()
    basal[:, 3] = basal[:, 0] - 2 * basal[:, 1] + 0.5 * independent_states(seed=1)[:, 0]
    shares = curvature(basal, torch.zeros_like(basal), groups_of(4000, 10))
    assert shares.max() < 0.05


def test_bends_are_seen_where_perturbations_have_put_the_cells():
    """|b + s|^2 within a group is linear in b, too; without the shifts it is no square of b."""
    basal = independent_states()
    groups = groups_of(4000, 20)
    shift = (3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(2)))[groups]
    shift[:, 3] = 0
    state = basal + shift
    basal[:, 3] = state[:, [0, 1, 2, 4, 5]].square().sum(dim=1) / 10
    with_shifts = curvature(basal, shift, groups)
    without = curvature(basal, torch.zeros_like(shift), groups)
    assert with_shifts[3] > 0.99
    assert without[3] < 0.5


def test_what_groups_have_in_common_does_not_count():
    basal = independent_states()
    groups = groups_of(4000, 20)
    shift = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))[groups]
    moved = basal.clone()
    moved[:, 3] += 10 * shift.square().sum(dim=1)
    torch.testing.assert_close(
        curvature(moved, shift, groups)[3], curvature(basal, shift, groups)[3], atol=1e-4, rtol=0
    )


def test_dimensions_that_never_vary_are_no_bends():
    basal = independent_states(n_cells=500)
    basal[:, 2] = 0.25
    shares = curvature(basal, torch.zeros_like(basal), torch.zeros(500, dtype=torch.long))
    assert torch.isfinite(shares).all()
    assert shares[2] == 0


def test_order_of_the_dimensions_does_not_matter():
    basal = independent_states()
    basal[:, 3] = basal[:, :3].square().sum(dim=1)
    groups, order = groups_of(4000, 10), torch.tensor([4, 3, 0, 5, 2, 1])
    shares = curvature(basal, torch.zeros_like(basal), groups)
    again = curvature(basal[:, order], torch.zeros_like(basal), groups)
    torch.testing.assert_close(again, shares[order])


# In the module ----------------------------------------------------------------------------------


def test_the_module_passes_states_shifts_and_groups(monkeypatch):
    """Mean shifts weighted by dose; cells with the same perturbations in any order are a group."""
    module = make_module(correlated_effects=False).eval()
    passed = []
    monkeypatch.setattr(
        "scvi_sams.module._sams_vae.curvature",
        lambda *arguments: passed.extend(arguments) or torch.zeros(3),
    )
    batches = [module.read_batch(make_tensors()), module.read_batch(make_tensors())]
    batches[1] = batches[1]._replace(codes=batches[1].codes.flip(1), doses=batches[1].doses.flip(1))
    module.curvature(batches)
    basal, shift, groups = passed
    n_cells = len(CODES)
    means = module.shift_moments(torch.arange(5))[0].numpy()
    for cell, (codes, doses) in enumerate(zip(batches[0].codes, batches[0].doses, strict=True)):
        is_carried = codes.numpy() >= 0
        expected = doses.numpy()[is_carried] @ means[codes.numpy()[is_carried]]
        np.testing.assert_allclose(shift[cell].numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basal[:n_cells], basal[n_cells:])
    assert torch.equal(groups[:n_cells], groups[n_cells:])
    assert len(set(groups.tolist())) == len({tuple(sorted(codes)) for codes in CODES})


@pytest.mark.parametrize("correlated_effects", [False, True])
def test_no_perturbation_moves_an_excluded_dimension(correlated_effects):
    module = make_module(correlated_effects=correlated_effects)
    rows = torch.arange(5)
    before = module.shift_moments(rows)[0]
    assert (before[:, 1] != 0).all()
    module.exclude_latents(torch.tensor([False, True, False]))
    assert (module.global_posterior(rows, 50).shifts[..., 1] == 0).all()
    assert module.masks.inclusion_probability[:, 1].max() < 1e-8
    assert (module.shift_moments(rows)[0][:, 1].abs() < 1e-6).all()
    assert (module.shift_moments(rows)[0][:, [0, 2]] != 0).any()


def test_price_of_an_excluded_entry_is_that_of_a_mask_that_is_off():
    module = make_module(correlated_effects=False, mask_prior_probability=0.2)
    rows = torch.arange(5)
    with torch.no_grad():
        module.masks.logits.fill_(-40.0)
    off = module.global_posterior(rows, 1).kl["masks"]
    with torch.no_grad():
        module.masks.logits.fill_(3.0)
    module.exclude_latents(torch.tensor([True, True, True]))
    excluded = module.global_posterior(rows, 1).kl["masks"]
    torch.testing.assert_close(excluded, off, rtol=1e-5, atol=0)
    assert excluded[0, 0].item() == pytest.approx(-3 * math.log(0.8), rel=1e-5)
    excluded.sum().backward()
    assert (module.masks.logits.grad == 0).all()


def test_excluded_dimensions_keep_their_place_when_latents_are_ordered():
    module = make_module(correlated_effects=False)
    with torch.no_grad():
        module.masks.logits.fill_(40.0)
        module.effects.loc.copy_(torch.tensor([1.0, 9.0, 3.0]).expand(5, 3))
    module.exclude_latents(torch.tensor([False, True, False]))
    module.order_latents()
    assert module.masks.is_excluded.tolist() == [False, False, True]
    mean = module.shift_moments(torch.arange(5))[0]
    torch.testing.assert_close(mean[:, :2], torch.tensor([3.0, 1.0]).expand(5, 2))
