"""Global divergences: each perturbation is paid for exactly once per epoch, by its own cells."""

from unittest import mock

import numpy as np
import pytest
import torch

from module.builders import VARIANTS, all_of, make_module, make_tensors, score, take_cells
from scvi_sams._constants import REGISTRY_KEYS

GLOBAL_TERMS = ("kl_masks", "kl_effects")
ALL_VARIANTS = pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
# 12 cells of a whole training set: perturbations 0 to 3 are carried by 4, 3, 2 and 1 of them.
EPOCH_CODES = [[0, -1], [0, 1], [1, 0], [2, -1], [-1, -1], [1, 2], [0, 3], *[[-1, -1]] * 5]
EPOCH_DOSES = [[1, 0], [2, 0.5], [1, 3], [0.1, 0], [0, 0], [1, 1], [1, 7], *[[0, 0]] * 5]
N_T = [4.0, 3.0, 2.0, 1.0, 0.0]


@pytest.fixture(autouse=True)
def fixed_draws():
    """Masks by a rule and noise of zero, so that no term depends on which cells are together."""
    with (
        mock.patch("scvi_sams.module._masks.MaskPosterior.sample", _masks_of_rows),
        mock.patch.object(torch, "randn", all_of(torch.zeros)),
    ):
        yield


def _masks_of_rows(posterior, rows, n_particles):
    particles = torch.arange(n_particles)[:, None, None]
    latents = torch.arange(posterior.logits.shape[1])
    return ((rows[:, None] + latents + particles) % 3 != 0).to(posterior.logits.dtype)


def make_epoch(correlated_basal, correlated_effects, **changes):
    module = make_module(
        correlated_basal=correlated_basal, correlated_effects=correlated_effects, **changes
    ).double()
    module.cells_per_perturbation.copy_(torch.tensor(N_T))
    tensors = make_tensors(codes=EPOCH_CODES, doses=EPOCH_DOSES)
    return module, {key: value.double() for key, value in tensors.items()}


def per_cell(output):
    terms = {name: value.detach() for name, value in output.kl_local.items()}
    return terms | {"reconstruction": output.reconstruction_loss["reconstruction_loss"].detach()}


def divergences(module):
    """Per perturbation, mean over particles, (T,) by name."""
    kl = module.global_posterior(torch.arange(5), module.n_particles).kl
    return {f"kl_{name}": value.mean(0).detach() for name, value in kl.items()}


@ALL_VARIANTS
@pytest.mark.parametrize("concentration", [None, 3.0])
@pytest.mark.parametrize("batch_size", [12, 4, 1])
def test_an_epoch_pays_for_every_perturbation_once(
    correlated_basal, correlated_effects, concentration, batch_size
):
    module, tensors = make_epoch(
        correlated_basal, correlated_effects, mask_prior_concentration=concentration
    )
    paid = dict.fromkeys(GLOBAL_TERMS, 0.0)
    order = torch.as_tensor(np.random.default_rng(0).permutation(12))
    for cells in order.split(batch_size):
        output = score(module, take_cells(tensors, cells))
        for name in GLOBAL_TERMS:
            paid[name] += output.kl_local[name].sum().item()
    for name, each in divergences(module).items():
        assert paid[name] == pytest.approx(each[:4].sum().item(), rel=1e-9)


@ALL_VARIANTS
def test_minibatch_losses_average_to_the_bound_of_all_data(correlated_basal, correlated_effects):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    batches = torch.arange(12).split(3)
    losses = [score(module, take_cells(tensors, cells)).loss.item() for cells in batches]
    whole = score(module, tensors)
    expected = (
        whole.reconstruction_loss["reconstruction_loss"].sum()
        + whole.kl_local["kl_z_basal"].sum()
        + sum(each[:4].sum() for each in divergences(module).values())
    )
    assert 12 * np.mean(losses) == pytest.approx(expected.item(), rel=1e-9)
    assert 12 * whole.loss.item() == pytest.approx(expected.item(), rel=1e-9)


@ALL_VARIANTS
def test_share_of_each_cell(correlated_basal, correlated_effects):
    """None for controls, 1 / N_a + 1 / N_b for a pair, whatever the dose."""
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    output = score(module, tensors)
    for name, each in divergences(module).items():
        share = output.kl_local[name].detach()
        assert (share[[4, 7, 8, 9, 10, 11]] == 0).all()
        expected = {0: each[0] / 4, 3: each[2] / 2, 6: each[0] / 4 + each[3]}
        expected |= {1: each[0] / 4 + each[1] / 3, 2: each[0] / 4 + each[1] / 3}
        for cell, value in expected.items():
            assert share[cell].item() == pytest.approx(value.item(), rel=1e-9)


@ALL_VARIANTS
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_a_perturbation_without_training_cells_pays_nothing(
    correlated_basal, correlated_effects, estimator
):
    module, tensors = make_epoch(correlated_basal, correlated_effects, kl_estimator=estimator)
    codes, doses = [[4, -1], [0, 4]], [[1, 0], [1, 2]]
    tensors = take_cells(tensors, [0, 1])
    tensors[REGISTRY_KEYS.PERTURBATIONS] = torch.tensor(
        np.concatenate([codes, doses], axis=1), dtype=torch.float64
    )
    output = score(module, tensors)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    for name, each in divergences(module).items():
        assert output.kl_local[name][0] == 0
        assert output.kl_local[name][1].item() == pytest.approx(each[0].item() / 4, rel=1e-9)


def test_before_training_no_perturbation_pays():
    module = make_module(seed=None)
    output = score(module, make_tensors())
    assert all((output.kl_local[name] == 0).all() for name in GLOBAL_TERMS)


# Invariances --------------------------------------------------------------------------------------


def assert_same(terms, others, cells=slice(None)):
    assert terms.keys() == others.keys()
    for name, value in terms.items():
        np.testing.assert_allclose(others[name], value[cells], rtol=1e-10, atol=1e-12)


@ALL_VARIANTS
def test_order_of_slots_plays_no_part(correlated_basal, correlated_effects):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    codes, doses = tensors[REGISTRY_KEYS.PERTURBATIONS].chunk(2, dim=1)
    turned = torch.cat([codes.flip(1), doses.flip(1)], dim=1)
    other = score(module, tensors | {REGISTRY_KEYS.PERTURBATIONS: turned})
    assert_same(per_cell(score(module, tensors)), per_cell(other))


@ALL_VARIANTS
@pytest.mark.parametrize("n_empty", [1, 3])
def test_empty_slots_play_no_part(correlated_basal, correlated_effects, n_empty):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    codes, doses = tensors[REGISTRY_KEYS.PERTURBATIONS].chunk(2, dim=1)
    empty = torch.ones(12, n_empty)
    padded = torch.cat([codes, -empty, doses, 0 * empty], dim=1)
    other = score(module, tensors | {REGISTRY_KEYS.PERTURBATIONS: padded})
    assert_same(per_cell(score(module, tensors)), per_cell(other))


@ALL_VARIANTS
def test_permuted_cells(correlated_basal, correlated_effects):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    order = np.random.default_rng(1).permutation(12)
    other = score(module, take_cells(tensors, order))
    assert_same(per_cell(score(module, tensors)), per_cell(other), order)


@ALL_VARIANTS
def test_a_cell_does_not_depend_on_its_batch(correlated_basal, correlated_effects):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    whole = per_cell(score(module, tensors))
    for cells in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [6], [4, 8]):
        assert_same(whole, per_cell(score(module, take_cells(tensors, cells))), cells)


@ALL_VARIANTS
def test_a_pair_is_the_dosed_sum_of_its_shifts(correlated_basal, correlated_effects):
    module, tensors = make_epoch(correlated_basal, correlated_effects)
    shifts = module.global_posterior(torch.arange(5), 3).shifts
    shift = module.inference(module.read_batch(tensors))["shift"]
    np.testing.assert_allclose(
        shift[:, 2].detach(), (shifts[:, 1] + 3 * shifts[:, 0]).detach(), rtol=1e-9
    )
    np.testing.assert_allclose(shift[:, 3].detach(), 0.1 * shifts[:, 2].detach(), rtol=1e-6)
    assert (shift[:, 4] == 0).all()
