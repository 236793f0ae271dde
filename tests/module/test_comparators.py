"""What holds for the modules of all comparators: invariances, gradients, ordering."""

from unittest import mock

import numpy as np
import pytest
import torch

from module.builders import COVARIATE_SIZES, all_of, make_module, make_tensors, score, take_cells
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import ConditionalVAEModule, CPAVAEModule, SVAEPlusModule
from scvi_sams.module._rotation import canonical_order

SETTINGS = {
    "cpa mean field": (CPAVAEModule, {"correlated_basal": False}),
    "cpa correlated": (CPAVAEModule, {"correlated_basal": True}),
    "svae+": (SVAEPlusModule, {}),
    "conditional": (ConditionalVAEModule, {}),
}
ALL = pytest.mark.parametrize("name", SETTINGS)
WITH_LATENT_SHIFTS = pytest.mark.parametrize("name", [n for n in SETTINGS if n != "conditional"])
CODES = [[0, -1], [0, 1], [1, 0], [2, -1], [-1, -1], [1, 2], [0, 3], *[[-1, -1]] * 5]
DOSES = [[1, 0], [2, 0.5], [1, 3], [0.1, 0], [0, 0], [1, 1], [1, 7], *[[0, 0]] * 5]
N_T = [4.0, 3.0, 2.0, 1.0, 0.0]


def make(name, **changes):
    module_cls, settings = SETTINGS[name]
    return make_module(module_cls, **(settings | changes))


def make_epoch(name, **changes):
    module = make(name, **changes).double()
    module.cells_per_perturbation.copy_(torch.tensor(N_T))
    tensors = make_tensors(codes=CODES, doses=DOSES)
    return module, {key: value.double() for key, value in tensors.items()}


@pytest.fixture
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


def per_cell(output):
    terms = {name: value.detach() for name, value in output.kl_local.items()}
    return terms | {"reconstruction": output.reconstruction_loss["reconstruction_loss"].detach()}


def assert_same(terms, others, cells=slice(None)):
    assert terms.keys() == others.keys()
    for name, value in terms.items():
        np.testing.assert_allclose(others[name], value[cells], rtol=1e-10, atol=1e-12)


@ALL
def test_a_cell_does_not_depend_on_its_batch_nor_on_the_order_of_cells(name, fixed_draws):
    module, tensors = make_epoch(name)
    whole = per_cell(score(module, tensors))
    order = np.random.default_rng(1).permutation(12)
    for cells in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [6], [4, 8], order):
        assert_same(whole, per_cell(score(module, take_cells(tensors, cells))), cells)


@ALL
@pytest.mark.parametrize("batch_size", [6, 1])
def test_losses_of_parts_average_to_the_loss_of_the_whole(name, batch_size, fixed_draws):
    module, tensors = make_epoch(name)
    whole = score(module, tensors).loss.item()
    order = torch.as_tensor(np.random.default_rng(0).permutation(12))
    parts = [
        score(module, take_cells(tensors, cells)).loss.item() for cells in order.split(batch_size)
    ]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)


@ALL
def test_order_of_perturbations_and_empty_slots_play_no_part(name, fixed_draws):
    module, tensors = make_epoch(name)
    codes, doses = tensors[REGISTRY_KEYS.PERTURBATIONS].chunk(2, dim=1)
    empty = torch.ones(12, 2)
    turned = torch.cat([-empty, codes.flip(1), 0 * empty, doses.flip(1)], dim=1)
    other = score(module, tensors | {REGISTRY_KEYS.PERTURBATIONS: turned})
    assert_same(per_cell(score(module, tensors)), per_cell(other))


@ALL
@pytest.mark.parametrize("likelihood", ["nb", "normal"])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_gradients_reach_every_parameter(name, likelihood, estimator):
    """From the module's own start; a parameter left out would stop plain distributed training."""
    module = make(
        name,
        seed=None,
        gene_likelihood=likelihood,
        kl_estimator=estimator,
        n_layers=2,
        **COVARIATE_SIZES,
    )
    module.cells_per_perturbation.fill_(3)
    tensors = make_tensors(counts=likelihood != "normal", covariates=True)
    torch.manual_seed(0)
    score(module, tensors).loss.backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@ALL
def test_a_batch_of_controls_moves_no_perturbation(name):
    module, tensors = make_epoch(name)
    output = score(module, take_cells(tensors, [4, 7, 8]))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for term, value in output.kl_local.items():
        assert (value == 0).all() == (term != "kl_z_basal")
    tables = ("effects", "masks", "means", "encoder_rows", "decoder_rows")
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        if parameter_name.startswith((*tables, "encoder.from_shift")):
            assert not parameter.grad.any(), parameter_name


@ALL
def test_only_rows_of_the_batch_have_gradients(name):
    module, tensors = make_epoch(name)
    score(module, take_cells(tensors, [0, 3, 4])).loss.backward()
    tables = {
        "cpa mean field": ["effects.loc", "effects.log_scale"],
        "cpa correlated": ["effects.loc", "effects.log_scale"],
        "svae+": ["means", "masks.logits"],
        "conditional": ["encoder_rows", "decoder_rows"],
    }[name]
    gradients = {n: parameter.grad for n, parameter in module.named_parameters()}
    for table in tables:
        moved = (gradients[table] != 0).any(dim=1)
        assert moved.tolist() == [True, False, True, False, False]


@ALL
def test_tables_have_no_weights_of_networks(name):
    """Rows of the conditional VAE are columns of its first layers: they take small steps."""
    module = make(name)
    tables = module.table_parameters()
    by_identity = {id(parameter): n for n, parameter in module.named_parameters()}
    names = {by_identity[id(table)] for table in tables}
    networks = {n for n in by_identity.values() if n.startswith(("encoder", "decoder"))}
    assert names == set(by_identity.values()) - networks
    assert len(tables) == len(names)


@WITH_LATENT_SHIFTS
def test_moments_are_those_of_draws(name):
    module = make(name)
    rows = torch.tensor([0, 2, 3])
    n = 40_000
    torch.manual_seed(0)
    with torch.no_grad():
        draws = module.global_posterior(rows, n).shifts
        mean, sd = module.shift_moments(rows)
    error = draws.std(0) / n**0.5
    assert ((mean - draws.mean(0)).abs() <= 5 * error + 1e-6).all()
    squares = (draws - draws.mean(0)).square()
    assert ((sd.square() - squares.mean(0)).abs() <= 5 * squares.std(0) / n**0.5 + 1e-6).all()


@WITH_LATENT_SHIFTS
def test_ordering_changes_names_and_nothing_else(name):
    module, tensors = make_epoch(name)
    rows = torch.arange(5)
    with torch.no_grad(), mock.patch.object(torch, "randn", all_of(torch.zeros)):
        mean, sd = module.shift_moments(rows)
        order, signs = canonical_order(mean)
        before = _terms_with_masks(module, tensors, torch.arange(3))
        module.order_latents()
        ordered_mean, ordered_sd = module.shift_moments(rows)
        after = _terms_with_masks(module, tensors, order)
    assert order.tolist() != [0, 1, 2] or (signs < 0).any()
    torch.testing.assert_close(ordered_mean, mean[:, order] * signs)
    torch.testing.assert_close(ordered_sd, sd[:, order])
    assert_same(before, after)


def _terms_with_masks(module, tensors, order):
    """Terms per cell with masks that are on or off by the name that a dimension first had."""

    def masks(posterior, rows, n_particles):
        return _masks_of_rows(posterior, rows, n_particles)[..., order]

    with mock.patch("scvi_sams.module._masks.MaskPosterior.sample", masks):
        return per_cell(score(module, tensors))
