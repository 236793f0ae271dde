"""Latent dimensions that are bends of the others, and how they are switched off."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from module.builders import CODES, make_module, make_tensors
from scvi_sams.module._curvature import LatentSurvey, curvature, following


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


@pytest.mark.parametrize("n_latent", [1, 2, 7])
def test_each_dimension_is_left_out_of_its_own_regression(n_latent):
    """Against one regression after the other."""
    generator = torch.Generator().manual_seed(3)
    basal = torch.randn(300, n_latent, generator=generator)
    basal[:, 0] += basal.square().sum(dim=1)
    shift = torch.randn(300, n_latent, generator=generator)
    found = curvature(basal, shift, groups_of(300, 1))
    state = (basal + shift).double()
    target, predictors = basal.double(), torch.cat([state, state.square()], dim=1)
    target, predictors = target - target.mean(dim=0), predictors - predictors.mean(dim=0)
    predictors = predictors / predictors.square().mean(dim=0).sqrt()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    first, second = order[:150], order[150:]
    for latent in range(n_latent):
        errors = []
        for n_columns in (n_latent, 2 * n_latent):
            kept = [c for c in range(n_columns) if c % n_latent != latent]
            x, y = predictors[first][:, kept], target[first, latent]
            weights = torch.linalg.solve(x.T @ x + 0.15 * torch.eye(len(kept)).double(), x.T @ y)
            residual = target[second, latent] - predictors[second][:, kept] @ weights
            errors.append(residual.square().mean())
        assert found[latent].item() == pytest.approx(1 - (errors[1] / errors[0]).item(), abs=1e-5)


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


def test_dimensions_that_tell_less_than_a_bend_could_replace_it():
    """1, 1.05, .95 and .05 nats."""
    variance = torch.tensor([-2.0, -2.1, -1.9, -0.1]).exp()
    survey = LatentSurvey(torch.tensor([0.3, 0.0, 0.0, 0.0]), variance, torch.zeros(4))
    curved = survey.curved(0.2)
    assert curved.tolist() == [True, False, False, False]
    assert survey.redundant(curved).tolist() == [False, False, True, True]


def test_weak_dimensions_stay_where_nothing_bends():
    survey = LatentSurvey(torch.tensor([0.19, 0.0]), torch.tensor([0.01, 0.99]), torch.zeros(2))
    assert not survey.redundant(survey.curved(0.2)).any()


def test_what_tells_next_to_nothing_is_no_bend():
    """.49 and .51 nats; a variance above that of the prior tells nothing."""
    variance = torch.tensor([-0.98, -1.02, 0.5]).exp()
    survey = LatentSurvey(torch.tensor([0.9, 0.9, 0.9]), variance, torch.zeros(3))
    torch.testing.assert_close(survey.information, torch.tensor([0.49, 0.51, 0.0]))
    assert survey.curved(0.2).tolist() == [False, True, False]


def test_what_tells_less_than_the_strongest_of_the_bends_could_replace_it():
    """1.5, .8, 1.6 and 1.4 nats."""
    variance = torch.tensor([-3.0, -1.6, -3.2, -2.8]).exp()
    survey = LatentSurvey(torch.tensor([0.3, 0.4, 0.0, 0.0]), variance, torch.zeros(4))
    curved = survey.curved(0.2)
    assert curved.tolist() == [True, True, False, False]
    assert survey.redundant(curved).tolist() == [False, False, False, True]


def test_half_the_curvature_is_enough_where_effects_follow_the_others():
    survey = LatentSurvey(
        torch.tensor([0.11, 0.11, 0.11, 0.09]),
        torch.full((4,), 0.05),
        torch.tensor([0.7, -0.7, 0.5, 0.9]),
    )
    assert survey.curved(0.2).tolist() == [True, True, False, False]


def effects_with_a_bend(n_repeats):
    """The third is minus the length of the other two; signs of the first are as often + as -."""
    rows = [[3.0, 4, -5], [-3, 4, -5], [6, 8, -10], [-6, 8, -10], [0, 0, 0]]
    return torch.tensor(rows * n_repeats)


def test_effects_on_a_bend_follow_the_length_of_the_others():
    effects = effects_with_a_bend(4)
    first, second, third = following(effects).tolist()
    assert first == pytest.approx(0, abs=1e-6)
    assert third == pytest.approx(-1)
    lengths = effects[:, [0, 2]].norm(dim=1)
    correlation = torch.corrcoef(torch.stack([effects[:, 1], lengths]))[0, 1]
    assert second == pytest.approx(correlation.item())


def test_effects_of_few_perturbations_follow_nothing():
    assert following(effects_with_a_bend(3)).tolist() == [0, 0, 0]


def test_what_no_perturbation_moves_follows_nothing():
    effects = torch.stack([torch.zeros(20), torch.arange(20.0)], dim=1)
    assert following(effects).tolist() == [0, 0]


def test_half_of_what_is_known_can_be_spared_and_not_more():
    """1, .5, .3 and .2 nats."""
    variance = torch.tensor([-2.0, -1.0, -0.6, -0.4]).exp()
    survey = LatentSurvey(torch.zeros(4), variance, torch.zeros(4))
    assert survey.can_spare(torch.tensor([False, False, True, True]))
    assert survey.can_spare(torch.tensor([False, True, True, False]))
    assert not survey.can_spare(torch.tensor([True, False, False, True]))


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
    survey = module.survey_latents(batches)
    basal, shift, groups = passed
    n_cells = len(CODES)
    means = module.shift_moments(torch.arange(5))[0].numpy()
    for cell, (codes, doses) in enumerate(zip(batches[0].codes, batches[0].doses, strict=True)):
        is_carried = codes.numpy() >= 0
        expected = doses.numpy()[is_carried] @ means[codes.numpy()[is_carried]]
        np.testing.assert_allclose(shift[cell].numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basal[:n_cells], basal[n_cells:])
    posterior = module.encode(batches[0].x, shift[None, :n_cells], None)
    torch.testing.assert_close(survey.variance, posterior.variance[0].mean(dim=0))
    assert torch.equal(groups[:n_cells], groups[n_cells:])
    assert len(set(groups.tolist())) == len({tuple(sorted(codes)) for codes in CODES})


@pytest.mark.parametrize("correlated_effects", [False, True])
def test_no_perturbation_moves_a_dimension_that_is_off(correlated_effects):
    module = make_module(correlated_effects=correlated_effects)
    rows = torch.arange(5)
    before = module.shift_moments(rows)[0]
    assert (before[:, 1] != 0).all()
    module.switch_off_latents(torch.tensor([False, True, False]))
    assert (module.global_posterior(rows, 50).shifts[..., 1] == 0).all()
    assert module.masks.inclusion_probability[:, 1].max() < 1e-8
    assert (module.shift_moments(rows)[0][:, 1].abs() < 1e-6).all()
    assert (module.shift_moments(rows)[0][:, [0, 2]] != 0).any()


def test_price_of_an_entry_that_is_switched_off_is_that_of_a_mask_that_is_off():
    module = make_module(correlated_effects=False, mask_prior_probability=0.2)
    rows = torch.arange(5)
    with torch.no_grad():
        module.masks.logits.fill_(-40.0)
    off = module.global_posterior(rows, 1).kl["masks"]
    with torch.no_grad():
        module.masks.logits.fill_(3.0)
    module.switch_off_latents(torch.tensor([True, True, True]))
    excluded = module.global_posterior(rows, 1).kl["masks"]
    torch.testing.assert_close(excluded, off, rtol=1e-5, atol=0)
    assert excluded[0, 0].item() == pytest.approx(-3 * math.log(0.8), rel=1e-5)
    excluded.sum().backward()
    assert (module.masks.logits.grad == 0).all()


def test_dimensions_that_are_off_keep_their_place_when_latents_are_ordered():
    module = make_module(correlated_effects=False)
    with torch.no_grad():
        module.masks.logits.fill_(40.0)
        module.effects.loc.copy_(torch.tensor([1.0, 9.0, 3.0]).expand(5, 3))
    module.switch_off_latents(torch.tensor([False, True, False]))
    module.order_latents()
    assert module.masks.is_excluded.tolist() == [False, False, True]
    mean = module.shift_moments(torch.arange(5))[0]
    torch.testing.assert_close(mean[:, :2], torch.tensor([3.0, 1.0]).expand(5, 2))


@pytest.mark.parametrize("correlated_basal", [False, True])
def test_a_dimension_that_is_off_says_nothing_of_cells(correlated_basal):
    module = make_module(correlated_basal=correlated_basal)
    cells = module.read_batch(make_tensors())
    module.switch_off_latents(torch.tensor([False, True, False]))
    shift = torch.tensor([1.0, 0.0, -1.0]).expand(2, len(cells.x), 3)
    posterior = module.encode(cells.x, shift, cells.covariates)
    assert (posterior.loc[..., 1] == 0).all()
    assert (posterior.scale[..., 1] == 1).all()
    basal = posterior.rsample()
    kl = module.normal_kl(posterior, basal)
    others = Normal(posterior.loc[..., [0, 2]], posterior.scale[..., [0, 2]])
    torch.testing.assert_close(kl, kl_divergence(others, Normal(0.0, 1.0)).sum(-1))
    moved = basal + torch.tensor([0.0, 5.0, 0.0])
    logits = module.decode(basal, shift, cells.covariates)
    assert torch.equal(module.decode(moved, shift, cells.covariates), logits)
    logits.square().sum().backward()
    assert (module.decoder.from_z.weight.grad[:, 1] == 0).all()
    assert (module.encoder.head.loc.weight.grad[1] == 0).all()
    assert (module.encoder.head.loc.weight.grad[0] != 0).any()
