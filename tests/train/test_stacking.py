"""What direct effects and stacking make of cells: variances, weights and tables by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from module.builders import make_module
from scvi_sams._shrinkage import Shrunken, shrink_entries
from scvi_sams.module import ConditionalVAEModule, SAMSVAEModule
from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.train import _stacking
from scvi_sams.train._compared_scale import SameScale
from scvi_sams.train._direct_effects import fit_direct_effects
from scvi_sams.train._expected_rates import expected_rates
from scvi_sams.train._gene_sums import gene_sums
from scvi_sams.train._observed_effects import Block, ObservedEffects
from scvi_sams.train._stacking import (
    Components,
    Scored,
    Start,
    _design_effect,
    _posterior_mode,
    _products,
    components,
    inflation_of_variance,
    stacked,
    stacking_weights,
)

N_GENES = 5
PRIOR_INFLATION = 1.0
EQUAL = np.full(3, 1 / 3)
ROWS = range(1)


def block_of(observed, error, of_model=0.0, of_controls=0.0):
    observed = np.atleast_2d(np.asarray(observed, dtype=float))
    error, of_model = (np.broadcast_to(part, observed.shape) for part in (error, of_model))
    return Block(
        ROWS,
        np.ones((len(observed), 1)),
        observed,
        error,
        np.full((len(observed), 1), of_controls),
        of_model,
        of_model,
        np.zeros_like(observed),
    )


def scale_of(slope):
    """Linear, but genes weigh differently."""
    scale = SameScale(len(slope))
    scale.slope = np.asarray(slope, dtype=float)
    return scale


def cells_that_show(*blocks, slope):
    """Effects as :class:`ObservedEffects` yields them."""
    return SimpleNamespace(scale=scale_of(slope), blocks=lambda _: iter(blocks))


def components_of(means, variances):
    """Three estimates of the effects, ``(3, rows, genes)``, and their variances."""
    nothing = Shrunken(*np.zeros((4, *np.shape(means)[1:])))
    return Components(nothing, np.asarray(means, float), np.asarray(variances, float))


def test_the_stacked_effect_has_mean_and_variance_of_a_mixture():
    found = components_of(
        [[[1.0, 2.0]], [[3.0, 2.0]], [[5.0, 2.0]]], [[[0.1, 1]], [[0.2, 2]], [[0.4, 4]]]
    )
    whole, variance = stacked(found, np.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(whole, [[2.5, 2.0]])
    within = 0.5 * 0.1 + 0.25 * 0.2 + 0.25 * 0.4
    apart = 0.5 * 1.5**2 + 0.25 * 0.5**2 + 0.25 * 2.5**2
    np.testing.assert_allclose(variance, [[within + apart, 0.5 + 0.5 + 1]])


def test_of_one_component_mean_and_variance_are_its_own():
    rng = np.random.default_rng(0)
    found = components_of(rng.normal(size=(3, 4, 6)), rng.uniform(size=(3, 4, 6)))
    for which, weights in enumerate(np.eye(3)):
        whole, variance = stacked(found, weights)
        np.testing.assert_allclose(whole, found.means[which])
        np.testing.assert_allclose(variance, found.variances[which])


def test_components_by_hand():
    block = block_of([[1.0, -2.0, 0.0, 0.3]], [0.5, 0.5, np.inf, 0.5], [0.8, -1.0, 0.2, 0.0])
    slope = np.array([1.0, 2.0, 1.0, 0.5])
    found = components(block, Start(), scale_of(slope), None, fits_direct=True)
    lacking = shrink_entries(block.observed - block.of_model, block.error)
    np.testing.assert_allclose(found.means[0], block.of_model + lacking.mean)
    np.testing.assert_allclose(found.variances[0], lacking.sd**2)
    own = shrink_entries(block.observed, block.error)
    np.testing.assert_allclose(found.means[1], own.mean)
    np.testing.assert_allclose(found.variances[1], own.sd**2)
    noise = 0.25 * (1 + 4 + 0.25)
    kept = 1 - noise / (1 + 16 + 0.0225)
    np.testing.assert_allclose(found.means[2], kept * block.observed)
    # Of three genes that weigh differently the share is not known for sure.
    squared = 0.25 * np.array([1, 4, 0.25])
    sd = (1 - kept) * np.sqrt(2 * (squared**2).sum()) / squared.sum()
    share = kept * norm.cdf(kept / sd) + sd * norm.pdf(kept / sd)
    np.testing.assert_allclose(found.variances[2], share * np.array([[0.25, 0.25, 0, 0.25]]))
    without = components(block, Start(), scale_of(slope), None, fits_direct=False)
    np.testing.assert_allclose(without.means[0], block.of_model)
    np.testing.assert_allclose(without.variances[0], 0)
    np.testing.assert_allclose(without.means[1:], found.means[1:])


def test_combinations_are_shrunken_towards_the_sum_of_their_perturbations():
    block = block_of([[1.0, -2.0, 0.3]], 0.5, [0.8, -1.0, 0.0])
    start = Start(np.array([[0.1, 0.0, 0.2]]), np.array([[1.5, -1.5, 0.0]]), np.ones((1, 1)))
    slope = np.array([1.0, 2.0, 0.5])
    found = components(block, start, scale_of(slope), None, fits_direct=True)
    lacking = shrink_entries(block.observed - block.of_model - start.direct, block.error)
    np.testing.assert_allclose(found.means[0], block.of_model + start.direct + lacking.mean)
    rest = block.observed - start.centre
    np.testing.assert_allclose(
        found.means[1], start.centre + shrink_entries(rest, block.error).mean
    )
    kept = 1 - 0.25 * (1 + 4 + 0.25) / (np.square(slope * rest).sum())
    np.testing.assert_allclose(found.means[2], start.centre + max(kept, 0) * rest)
    uncertain = block._replace(error=np.full_like(block.error, 1e3))
    found = components(uncertain, start, scale_of(slope), None, fits_direct=True)
    np.testing.assert_allclose(found.means[1], start.centre, atol=1e-3)
    np.testing.assert_allclose(found.means[2], start.centre)


def test_the_error_of_the_model_is_that_of_its_shifts_and_of_what_is_added():
    block = block_of([[1.0, -2.0, 0.3]], 0.5, [0.8, -1.0, 0.0])
    block = block._replace(variance_of_model=np.array([[0.04, 0.09, 0.01]]))
    slope = np.ones(3)
    found = components(block, Start(), scale_of(slope), None, fits_direct=True)
    lacking = shrink_entries(block.observed - block.of_model, block.error)
    np.testing.assert_allclose(found.variances[0], lacking.sd**2 + [[0.04, 0.09, 0.01]])


def test_effects_that_are_shrunken_to_nothing_are_not_known_to_be_nothing():
    """As a whole, of many genes: half of the time noise alone is larger than it is on average."""
    rng = np.random.default_rng(0)
    shares = []
    for observed in rng.normal(scale=0.5, size=(200, 1, 80)):
        found = components(
            block_of(observed, 0.5), Start(), scale_of(np.ones(80)), None, fits_direct=True
        )
        shares.append(found.variances[2].mean() / 0.25)
    # The positive part of a normal deviate is on average .4 times its standard deviation.
    assert 0.3 < np.mean(shares) / np.sqrt(2 / 80) < 0.8
    assert np.min(shares) > 0


def inflation(held_out, *, means, variances, slope):
    found = components_of([means] * 3, [variances] * 3)
    training = cells_that_show(block_of(means, 0.1), slope=slope)
    of_held_out = cells_that_show(held_out, slope=slope)
    return inflation_of_variance([Scored(training, of_held_out, ROWS, lambda _: found)], EQUAL)


def test_inflation_is_squared_error_per_variance_near_what_it_is_a_priori():
    held_out = block_of([[2.0, 1.0, 7.0]], [0.5, 0.5, np.inf])
    found = inflation(
        held_out, means=[[0.0, 0.0, 0.0]], variances=[[0.5, 0.25, 9.0]], slope=[1, 2, 1]
    )
    # As effects are compared; the gene without cells says nothing.
    per_variance = ((4 - 0.25) + 4 * (1 - 0.25)) / (0.5 + 4 * 0.25)
    of_held_out_cells = 0.25 + 4 * 0.25
    squared_error = (2 * (0.25**2 + (4 * 0.25) ** 2) + (0.15 * of_held_out_cells) ** 2) / 1.5**2
    precision, prior_precision = 1 / squared_error, 1 / 0.5**2
    by_hand = precision * per_variance + prior_precision * PRIOR_INFLATION
    assert found == pytest.approx(by_hand / (precision + prior_precision))


def test_precise_held_out_cells_decide_on_inflation_alone():
    held_out = block_of([[1.0, -1.0]], 1e-4)
    found = inflation(held_out, means=[[0.0, 0.0]], variances=[[0.5, 0.3]], slope=[1, 1])
    assert found == pytest.approx(2 / 0.8, rel=1e-4)


@pytest.mark.parametrize(("observed", "expected"), [(0.5, 1.0), (50.0, 4.0)])
def test_inflation_is_at_least_one_and_not_without_end(observed, expected):
    """Estimates that hit held-out effects exactly may have done so by chance."""
    held_out = block_of([[observed, observed]], 0.01)
    found = inflation(held_out, means=[[0.5, 0.5]], variances=[[0.5, 0.5]], slope=[1, 1])
    assert found == expected


def test_inflation_is_the_prior_one_where_no_cells_were_held_out():
    nothing = block_of([[0.0, 0.0]], np.inf)
    found = inflation(nothing, means=[[1.0, 2.0]], variances=[[0.5, 0.5]], slope=[1, 1])
    assert found == PRIOR_INFLATION


def test_weights_are_equal_where_held_out_cells_say_nothing_and_else_of_what_is_right():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 10, 40))
    found = components_of(means, np.full(means.shape, 0.1))
    training = cells_that_show(block_of(means[0], 0.1), slope=np.ones(40))

    def weights(observed, error):
        held_out = cells_that_show(block_of(observed, error), slope=np.ones(40))
        return stacking_weights([Scored(training, held_out, ROWS, lambda _: found)])

    np.testing.assert_allclose(weights(0 * means[0], np.inf), EQUAL, atol=1e-6)
    mixed = np.einsum("i,itg->tg", [0.7, 0.3, 0.0], means)
    np.testing.assert_allclose(weights(mixed, 0.1), [0.7, 0.3, 0.0], atol=0.05)
    np.testing.assert_allclose(weights(means[1], 0.1), [0.0, 1.0, 0.0], atol=0.05)


def test_effects_of_other_cells_are_weighed_by_their_errors():
    """One held-out effect of 400 cells counts as four hundred of one cell."""
    means = np.zeros((3, 1, 2))
    means[0, 0, 0] = means[1, 0, 1] = 1
    found = components_of(means, np.ones(means.shape))
    training = cells_that_show(block_of(means[0], 0.1), slope=np.ones(2))
    by_error = []
    for error in ([0.01, 10.0], [10.0, 0.01]):
        held_out = cells_that_show(block_of([[1.0, 1.0]], error), slope=np.ones(2))
        by_error.append(stacking_weights([Scored(training, held_out, ROWS, lambda _: found)]))
    assert by_error[0][0] > by_error[0][1] + 0.1
    assert by_error[1][1] > by_error[1][0] + 0.1


def test_the_error_of_control_cells_is_one_error(monkeypatch):
    """Weights are those of generalised least squares with the covariance written out."""
    monkeypatch.setattr(_stacking, "_design_effect", lambda *_: 1.0)
    rng = np.random.default_rng(4)
    slope, of_controls = np.array([1.0, 0.4, 2.0]), 0.7
    means = rng.normal(size=(3, 6, 3))
    error = rng.uniform(0.2, 0.6, size=(6, 3))
    observed = 0.5 * means[0] + 0.5 * means[2] + rng.normal(size=3) + rng.normal(size=(6, 3)) / 5
    held_out = cells_that_show(block_of(observed, error, of_controls=of_controls), slope=slope)
    training = cells_that_show(block_of(means[0], 0.1), slope=slope)
    found = components_of(means, np.ones(means.shape))
    weights = stacking_weights([Scored(training, held_out, ROWS, lambda _: found)])
    signal = np.square(slope * means.mean(axis=0)).mean()
    products, targets = np.eye(3) / 0.5**2, np.full(3, 1 / 3 / 0.5**2)
    for gene in range(3):
        sd = slope[gene] * error[:, gene]
        covariance = np.diag((1 - of_controls) * sd**2 + signal)
        covariance += of_controls * np.outer(sd, sd)
        columns = slope[gene] * means[..., gene].T
        products += columns.T @ np.linalg.solve(covariance, columns)
        targets += columns.T @ np.linalg.solve(covariance, slope[gene] * observed[:, gene])
    # At the minimum over weights that add up to one, the slope is the same for all that are on.
    gradient = products @ weights - targets
    on = weights > 1e-6
    assert on.sum() >= 2
    np.testing.assert_allclose(gradient[on], gradient[on].mean(), atol=1e-3)
    assert (gradient[~on] >= gradient[on].mean() - 1e-3).all()


def held_out_and_scored(means, observed, error):
    slope = np.ones(means.shape[-1])
    training = cells_that_show(block_of(means[0], 0.1), slope=slope)
    held_out = cells_that_show(block_of(observed, error), slope=slope)
    found = components_of(means, np.full(means.shape, 0.1))
    return [Scored(training, held_out, ROWS, lambda _: found)]


def test_the_same_error_in_many_genes_counts_as_one():
    """40 copies of one gene say as much of the weights as that gene, not 40 times as much."""
    rng = np.random.default_rng(5)
    means, noise = rng.normal(size=(3, 10, 1)), 0.8 * rng.normal(size=(10, 1))
    copies = np.ones((1, 40))
    observed = 0.6 * means[0] + 0.4 * means[1] + noise
    (part,) = held_out_and_scored(means * copies, observed * copies, 0.8)
    of_all, of_rows = _products(part)
    weights = stacking_weights([part])
    effect = _design_effect(of_rows, _posterior_mode(of_all, EQUAL, 0.5), 0.5)
    # Errors are smaller than stated by chance and because the signal counts as error.
    assert 8 < effect < 40
    assert np.abs(weights - EQUAL).max() < np.abs(_posterior_mode(of_all, EQUAL, 0.5) - EQUAL).max()
    np.testing.assert_allclose(weights, _posterior_mode(of_all / effect, EQUAL, 0.5), atol=1e-9)
    independent = observed * copies + 0.8 * rng.normal(size=(10, 40)) - noise
    (part,) = held_out_and_scored(means * copies, independent, 0.8)
    of_all, of_rows = _products(part)
    assert _design_effect(of_rows, _posterior_mode(of_all, EQUAL, 0.5), 0.5) < 2


def test_combinations_are_weighed_as_single_perturbations_unless_many_say_otherwise():
    rng = np.random.default_rng(6)
    means, of_singles = rng.normal(size=(3, 10, 40)), np.array([0.0, 0.3, 0.7])
    observed = means[0] + 0.1 * rng.normal(size=(10, 40))
    nothing = held_out_and_scored(means, observed, np.inf)
    found = stacking_weights(nothing, of_singles=of_singles)
    np.testing.assert_allclose(found, of_singles, atol=1e-6)
    sure = held_out_and_scored(means, observed, 0.1)
    found = stacking_weights(sure, of_singles=of_singles)
    np.testing.assert_allclose(found, [1, 0, 0], atol=0.1)


def few_cells(n_perturbations, *, without, is_count):
    """40 cells of each perturbation, but for one, and 80 controls."""
    rng = np.random.default_rng(3)
    has_cells = np.arange(n_perturbations) != without
    codes = np.append(np.repeat(np.flatnonzero(has_cells), 40), np.full(80, -1))[:, None]
    change = np.vstack([rng.normal(scale=0.7, size=(n_perturbations, N_GENES)), np.zeros(N_GENES)])
    mean = change[codes[:, 0]]
    x = rng.poisson(4 * np.exp(mean)) if is_count else rng.normal(mean)
    codes = torch.as_tensor(codes)
    size = torch.full((len(x),), 500.0)
    x = torch.as_tensor(x, dtype=torch.float32)
    cells = CellBatch(x, codes, (codes >= 0).float(), None, size)
    tables = DirectEffects(n_perturbations, N_GENES, is_stacked=True)
    return gene_sums([cells], tables, torch.as_tensor(has_cells), is_count=is_count)


def fitted(module, sums):
    """Fit without held-out cells; returns the tables and what they are to be made of."""
    fit_direct_effects(module, sums)
    expected = expected_rates(module, sums.cells, module.direct)
    sizes = module.cell_sizes.double().numpy()
    effects = ObservedEffects(sums, expected, sizes, module.likelihood)
    (block,) = effects.blocks(range(module.direct.n_perturbations))
    found = components(block, Start(), effects.scale, None, fits_direct=True)
    return module.direct, block, found, effects.scale


def test_tables_without_held_out_cells_average_the_components_equally():
    """Shifts of this model are known for certain, so that what is added holds at their mean."""
    module = make_module(
        ConditionalVAEModule, direct_effects=True, stacking=True, n_perturbations=3
    )
    module.cell_sizes.copy_(torch.tensor([[500.0, 500.0, 500.0], [1.0, 0.0, 0.0]]))
    direct, block, found, scale = fitted(module, few_cells(3, without=1, is_count=True))
    whole, variance = stacked(found, EQUAL)
    has_cells = [0, 2]
    assert np.abs(whole[has_cells]).max() > 0.5
    mean, sd = direct.in_predictions(torch.arange(3))
    on_logits = block.of_model + mean.numpy()
    predicted = scale.compared(on_logits)
    np.testing.assert_allclose(predicted[has_cells], whole[has_cells], atol=1e-5)
    sampled = direct.spread.numpy()[:, None] ** 2 * block.variance_of_model
    sampled *= scale.relative_slope(block.of_model) ** 2
    by_hand = np.sqrt(np.maximum(PRIOR_INFLATION * variance - sampled, 0))
    # Lognormal of this mean, whose upper quantile is that of the effect.
    upper = scale.log_change(whole + 1.96 * by_hand) - scale.log_change(whole)
    by_hand = 1.96 - np.sqrt(np.maximum(1.96**2 - 2 * upper, 0))
    np.testing.assert_allclose(sd.numpy()[has_cells], by_hand[has_cells], rtol=1e-4)
    assert sd.numpy()[has_cells].min() > 0.01
    assert not mean[1].any()
    assert not sd[1].any()
    assert direct.spread[1] == 1


@pytest.mark.parametrize("likelihood", ["normal", "nb"])
def test_samples_are_as_wide_as_the_whole_varies(likelihood):
    """Their share of the model's variance, in the units in which effects are compared."""
    is_count = likelihood == "nb"
    module = make_module(
        SAMSVAEModule, direct_effects=True, stacking=True, gene_likelihood=likelihood
    )
    module.cell_sizes.copy_(torch.tensor([[500.0, 500.0, 500.0], [1.0, 0.0, 0.0]]))
    direct, block, found, scale = fitted(module, few_cells(5, without=3, is_count=is_count))
    of_shifts = scale.relative_slope(block.of_model) ** 2 * block.variance_of_model
    variance = PRIOR_INFLATION * stacked(found, EQUAL)[1]
    has_cells = np.arange(5) != 3
    of_whole, of_model = (
        (scale.slope**2 * values[has_cells]).sum(axis=1) for values in (variance, of_shifts)
    )
    by_hand = np.minimum(np.sqrt(of_whole / of_model), 1)
    spread = direct.spread.numpy()
    np.testing.assert_allclose(spread[has_cells], by_hand, rtol=1e-4)
    assert (spread <= 1).all()
    assert spread.min() < 0.9
    assert spread[3] == 1
    # Together samples of shifts and of what is added to them vary no less than the whole does.
    whole = scale.relative_slope(scale.log_change(stacked(found, EQUAL)[0]))
    in_all = spread[:, None] ** 2 * of_shifts + (whole * direct.uncertainty.numpy()) ** 2
    assert (in_all[has_cells] > 0.999 * variance[has_cells]).all()
