"""Direct effects in the module: what they add to the loss, their sums, and their tables on disk."""

import numpy as np
import pytest
import torch

from module.builders import (
    CODES,
    DOSES,
    LIKELIHOODS,
    N_GENES,
    make_module,
    make_tensors,
    score,
)
from scvi_sams.module import ConditionalVAEModule, CPAVAEModule, SAMSVAEModule
from scvi_sams.module._direct_effects import COMPONENTS, DirectEffects, Residuals

N_PERTURBATIONS = 5
ADDED = np.array([0.7, -1.2, 0.0, 2.0, -0.3])


def with_tables(direct, mean, *, genes=None):
    """Fill tables: ``mean``, and multiples of it for the others."""
    mean = torch.as_tensor(mean, dtype=torch.float32)
    if genes is None:
        genes = torch.arange(mean.shape[1]).expand(mean.shape)
    others = (factor * mean.abs() for factor in (0.1, 0.01))
    spread = torch.linspace(0.2, 1, len(mean))
    correction, uncertainty = 0.5 * mean, mean.abs()
    tables = Residuals(spread, genes.int(), mean, *others, correction, uncertainty)
    direct.fill(tables, torch.tensor([0.5, 0.3, 0.2]))
    return direct


def random_tables(**changes):
    mean = np.random.default_rng(0).normal(size=(N_PERTURBATIONS, N_GENES))
    settings = {"is_stacked": True} | changes
    return with_tables(DirectEffects(N_PERTURBATIONS, N_GENES, **settings), mean)


@pytest.mark.parametrize(("likelihood", "size_factor"), LIKELIHOODS)
def test_the_loss_is_that_of_a_decoder_whose_bias_is_moved(likelihood, size_factor):
    """All cells carry one perturbation; gradients are the same too."""
    settings = {"gene_likelihood": likelihood, "uses_size_factor": size_factor}
    with_direct = make_module(**settings, direct_effects=True)
    moved = make_module(**settings)
    mean = np.zeros((N_PERTURBATIONS, N_GENES))
    mean[1] = ADDED
    with_tables(with_direct.direct, mean)
    with torch.no_grad():
        moved.decoder.to_genes.bias += torch.as_tensor(2 * ADDED).float()
    tensors = make_tensors(
        codes=[[1]] * 6, doses=[[2.0]] * 6, counts=likelihood != "normal", size_factor=size_factor
    )
    losses = []
    for module in (with_direct, moved):
        torch.manual_seed(0)
        losses.append(score(module, tensors).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    expected = dict(moved.named_parameters())
    for name, parameter in with_direct.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name
        )
    with torch.no_grad():
        with_direct.direct.mean.zero_()
    torch.manual_seed(0)
    assert abs(score(with_direct, tensors).loss - losses[0]) > 0.1


def test_before_training_there_are_none():
    module, plain = make_module(direct_effects=True, stacking=True), make_module()
    losses = []
    for each in (module, plain):
        torch.manual_seed(0)
        losses.append(score(each, make_tensors()).loss)
    assert losses[0] == losses[1]
    assert not module.direct.is_estimated
    assert plain.direct is None


def test_effects_of_cells_are_sums_over_perturbations_times_doses():
    direct = random_tables()
    codes = torch.tensor(CODES)
    found = direct.of_cells(codes, torch.tensor(DOSES, dtype=torch.float32), codes)
    expected = np.zeros((len(CODES), N_GENES))
    for cell, (codes, doses) in enumerate(zip(CODES, DOSES, strict=True)):
        for code, dose in zip(codes, doses, strict=True):
            if code >= 0:
                expected[cell] += dose * direct.mean[code].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0].any()


def test_the_row_of_a_measured_combination_takes_the_place_of_the_sum():
    direct = DirectEffects(2, N_GENES, is_stacked=True)
    direct.measure(torch.tensor([[0, 1]] * 5 + [[0, -1]] * 5), torch.tensor([[2.0, 0.5]] * 10))
    assert direct.n_rows == 3
    assert not direct.is_estimated
    mean = np.random.default_rng(1).normal(size=(3, N_GENES)).astype(np.float32)
    with_tables(direct, mean)
    codes = torch.tensor([[1, 0], [0, 1], [0, 1], [1, -1], [-1, -1]])
    doses = torch.tensor([[0.5, 2.0], [1.0, 1.0], [2.0, 0.5], [0.5, 0.0], [0.0, 0.0]])
    expected = [mean[2], mean[0] + mean[1], mean[2], 0.5 * mean[1], 0 * mean[0]]
    np.testing.assert_allclose(direct.of_cells(codes, doses, codes), expected, rtol=1e-5, atol=1e-6)
    rows, weights = direct.rows_of_cells(codes, doses, codes)
    assert rows.tolist() == [[2, -1], [0, 1], [2, -1], [1, -1], [-1, -1]]
    assert weights.tolist() == [[1, 0], [1, 1], [1, 0], [0.5, 0], [0, 0]]


def test_a_combination_of_few_cells_has_no_row():
    direct = DirectEffects(2, N_GENES, is_stacked=True)
    direct.measure(torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert direct.n_rows == 2


def test_predictions_add_the_correction_only_where_they_are_stacked():
    rows = torch.tensor([3, 1])
    stacked, plain = random_tables(), random_tables(is_stacked=False)
    mean, sd = plain.in_predictions(rows)
    torch.testing.assert_close(mean, plain.mean[rows])
    torch.testing.assert_close(sd, plain.sd[rows])
    mean, sd = stacked.in_predictions(rows)
    torch.testing.assert_close(mean, (stacked.mean + stacked.correction)[rows])
    torch.testing.assert_close(sd, stacked.uncertainty[rows])


@pytest.mark.parametrize("module_cls", [SAMSVAEModule, CPAVAEModule, ConditionalVAEModule])
@pytest.mark.parametrize("for_predictions", [True, False])
def test_samples_of_shifts_have_the_posterior_mean(module_cls, for_predictions):
    module = make_module(module_cls, direct_effects=True, stacking=True)
    with_tables(module.direct, np.ones((N_PERTURBATIONS, N_GENES)))
    rows = torch.tensor([3, 0, 1])
    mean, _ = module.shift_moments(rows)
    shifts = module.sampled_shifts(rows, 6, for_predictions=for_predictions)
    torch.testing.assert_close(shifts.mean(dim=0), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_samples", [1, 40])
def test_shifts_are_narrowed_around_their_mean_for_stacked_predictions_only(n_samples):
    module = make_module(correlated_effects=False, direct_effects=True, stacking=True)
    rows = torch.tensor([4, 0, 2])
    mean, _ = module.shift_moments(rows)

    def sampled(*, for_predictions):
        torch.manual_seed(0)
        return module.sampled_shifts(rows, n_samples, for_predictions=for_predictions)

    before = sampled(for_predictions=True)
    with_tables(module.direct, np.ones((N_PERTURBATIONS, N_GENES)))
    plain, narrow = (sampled(for_predictions=narrows) for narrows in (False, True))
    torch.testing.assert_close(plain, before)
    assert plain.shape[0] == n_samples
    spread = module.direct.spread[rows]
    assert spread.tolist() == pytest.approx([1, 0.2, 0.6])
    torch.testing.assert_close(narrow - mean, spread[:, None] * (plain - mean))
    assert ((narrow - plain)[:, 1:].abs().amax(dim=(0, 2)) > 0.02).all()
    module.direct.stacked.fill_(False)
    torch.testing.assert_close(sampled(for_predictions=True), plain)


def test_genes_that_are_not_kept_have_no_effect():
    direct = DirectEffects(2, N_GENES, is_stacked=False)
    with_tables(direct, [[1.0, -2.0], [3.0, 4.0]], genes=torch.tensor([[0, 3], [2, 4]]))
    expected = [[0, 0, 3, 0, 4], [1, 0, 0, -2, 0]]
    assert direct.of_rows(torch.tensor([1, 0]), "mean").tolist() == expected
    codes = torch.tensor([[0, 1]])
    both = direct.of_cells(codes, torch.tensor([[2.0, 0.5]]), codes)
    assert both.tolist() == [[2, 0, 1.5, -4, 2]]


def test_tables_of_any_width_are_read_from_a_state():
    saved = make_module(direct_effects=True, stacking=True)
    genes = torch.tensor([[0, 3]] * N_PERTURBATIONS)
    with_tables(saved.direct, np.arange(10.0).reshape(5, 2), genes=genes)
    loaded = make_module(direct_effects=True, stacking=True, seed=1)
    loaded.load_state_dict(saved.state_dict())
    for name, values in saved.direct.state_dict().items():
        assert torch.equal(loaded.direct.state_dict()[name], values), name
    assert loaded.direct.weights.shape == (len(COMPONENTS),)
    assert loaded.direct.weights.tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_a_state_of_an_earlier_version_has_none():
    loaded = make_module(direct_effects=True, stacking=True)
    loaded.load_state_dict(make_module(seed=1).state_dict())
    assert not loaded.direct.is_estimated
    torch.testing.assert_close(
        loaded.decoder.to_genes.bias, make_module(seed=1).decoder.to_genes.bias
    )
