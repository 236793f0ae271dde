"""What cells show of every gene: closed forms under constant and linear decoders."""

import numpy as np
import pytest
import torch

from model.builders import (
    N_LATENT,
    VARIANTS,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)
from module.builders import N_GENES, make_module
from scvi_sams.module import ConditionalVAEModule
from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.train._gene_sums import gene_sums
from scvi_sams.train._observed_effects import (
    Expected,
    ObservedEffects,
    expected_rates,
    over_processes,
)

N_PERTURBATIONS = 3
SIZE = 500.0
BIAS = np.array([1.0, 0.0, -1.0, 2.0, 0.5])


def constant_module(likelihood="nb"):
    """Make a module that expects the same of every cell."""
    module = make_module(
        ConditionalVAEModule, gene_likelihood=likelihood, n_perturbations=N_PERTURBATIONS
    )
    with torch.no_grad():
        module.decoder.to_genes.weight.zero_()
        module.decoder.to_genes.bias.copy_(torch.as_tensor(BIAS))
    module.cell_sizes.copy_(torch.tensor([[SIZE, SIZE, SIZE], [1.0, 0.0, 0.0]]))
    return module


def batch(x, codes, doses=None, size=SIZE):
    """Make a mini-batch; doses are 1, and all cells of one size."""
    codes = torch.as_tensor(codes)
    doses = (codes >= 0).float() if doses is None else torch.as_tensor(doses).float()
    x = torch.as_tensor(x, dtype=torch.float32)
    return CellBatch(x, codes, doses, None, torch.full((len(x),), float(size)))


def sums_of(batches, stands_alone, *, is_count=True):
    tables = DirectEffects(len(stands_alone), batches[0].x.shape[1], is_stacked=True)
    return gene_sums(batches, tables, torch.tensor(stands_alone), is_count=is_count)


def observed(module, sums, *, n_perturbations=N_PERTURBATIONS):
    """All perturbations in one block."""
    effects = ObservedEffects(
        sums,
        expected_rates(module, sums.cells, n_perturbations + 1),
        module.cell_sizes.double().numpy(),
        is_count=module.likelihood.is_count_likelihood,
    )
    (block,) = effects.blocks(range(n_perturbations))
    return block


def few_counts(*, controls=True, dose=1.0, size=SIZE):
    """Draw at most two counts of a gene in six cells each of P0 and P1, eight controls, no P2."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, -1], [6, 6, 8 * controls])[:, None]
    x = rng.integers(0, 3, size=(len(codes), N_GENES))
    return batch(x, codes, dose * (codes >= 0), size)


def totals(cells, code):
    carried = cells.codes[:, 0] == code
    return cells.x[carried].sum(dim=0).double().numpy(), float(cells.size[carried].sum())


def test_of_few_counts_effects_are_log_ratios_of_sums():
    cells = few_counts()
    block = observed(constant_module(), sums_of([cells], [True, True, False]))
    of_controls, size_of_controls = totals(cells, -1)
    for code in (0, 1):
        x, size = totals(cells, code)
        expected = size * (of_controls + 0.5) / size_of_controls
        by_hand = np.log(x + 0.5) - np.log(expected + 0.5)
        np.testing.assert_allclose(block.observed[code], by_hand, rtol=1e-6, atol=2e-7)
        # Such counts vary less than Poisson ones, of which errors are never less.
        fewer = np.minimum(x, expected)
        poisson = 1 / (fewer + 0.5) + 1 / (of_controls + 0.5 + 0.5)
        np.testing.assert_allclose(block.error[code], np.sqrt(poisson), rtol=1e-6)
    np.testing.assert_allclose(block.of_model, 0, atol=1e-6)


def test_strong_knockdowns_are_read_off_sums():
    """Of few counts, means of logarithms have too curved an inverse."""
    rng = np.random.default_rng(0)
    n_cells, n_controls = 29, 600
    left = np.array([1, 19, 60, 87])  # of 87 expected ones
    x = np.zeros((n_cells + n_controls, N_GENES))
    x[n_cells:] = rng.poisson(3, size=(n_controls, N_GENES))
    x[:n_cells, 4] = 3
    for gene, count in enumerate(left):
        x[:n_cells, gene] = np.bincount(np.arange(count) % n_cells, minlength=n_cells)
    codes = np.repeat([0, -1], [n_cells, n_controls])[:, None]
    cells = batch(x, codes)
    block = observed(constant_module(), sums_of([cells], [True, False, False]))
    of_controls, size_of_controls = totals(cells, -1)
    expected = n_cells * SIZE * (of_controls + 0.5) / size_of_controls
    by_sums = np.log(left + 0.5) - np.log(expected[:4] + 0.5)
    np.testing.assert_allclose(expected, 87, rtol=0.05)
    np.testing.assert_allclose(block.observed[0, :2], by_sums[:2], rtol=1e-5)
    assert block.observed[0, 0] == pytest.approx(np.log(1.5 / 87.5), abs=0.05)
    assert block.error[0, 0] > np.sqrt(1 / 1.5)
    # Of more counts, cells are compared by their logarithms as well.
    assert (np.abs(block.observed[0, 2:4] - by_sums[2:]) > 1e-3).all()
    np.testing.assert_allclose(block.observed[0, 2:4], by_sums[2:], atol=0.25)


def test_mini_batches_and_halves_of_the_cells_add_up():
    cells = few_counts()
    whole = sums_of([cells], [True, True, False])
    halves = [CellBatch(*(None if p is None else p[i::2] for p in cells)) for i in (0, 1)]
    one, other = (sums_of([half], [True, True, False]) for half in halves)
    for sums in (sums_of(halves, [True, True, False]), one + other):
        for found, expected in zip(sums.totals(), whole.totals(), strict=True):
            torch.testing.assert_close(found, expected)
        assert sorted(sums.cells.group.tolist()) == sorted(whole.cells.group.tolist())


def test_effects_are_per_unit_dose():
    one, two = (
        observed(constant_module(), sums_of([few_counts(dose=dose)], [True, True, False]))
        for dose in (1.0, 2.0)
    )
    np.testing.assert_allclose(two.observed, one.observed / 2, rtol=1e-6)
    np.testing.assert_allclose(two.error[:2], one.error[:2] / 2, rtol=1e-6)


def test_a_perturbation_without_cells_has_no_effect_and_no_end_of_error():
    block = observed(constant_module(), sums_of([few_counts()], [True, True, False]))
    assert not block.observed[2].any()
    assert not block.of_model[2].any()
    assert np.isinf(block.error[2]).all()


def test_without_controls_effects_are_relative_to_the_decoder():
    cells = few_counts(controls=False, size=5.0)
    block = observed(constant_module(), sums_of([cells], [True, True, False]))
    share = np.exp(BIAS) / np.exp(BIAS).sum()
    for code in (0, 1):
        x, size = totals(cells, code)
        by_hand = np.log(x + 0.5) - np.log(size * share + 0.5)
        np.testing.assert_allclose(block.observed[code], by_hand, rtol=1e-5)


def test_controls_alone_leave_every_effect_unknown():
    rng = np.random.default_rng(0)
    cells = batch(rng.integers(0, 3, size=(8, N_GENES)), np.full((8, 1), -1))
    block = observed(constant_module(), sums_of([cells], [False, False, False]))
    assert np.isinf(block.error).all()
    assert not block.observed.any()


@pytest.mark.parametrize("mean_count", [0.4, 5.0], ids=["few counts", "many counts"])
def test_known_changes_of_gamma_poisson_counts_are_found_with_honest_errors(mean_count):
    """The ratio of deviation and error has a standard deviation of about one."""
    rng = np.random.default_rng(1)
    n_genes, n_cells, n_controls, dispersion = 60, 150, 600, 0.4
    change = rng.normal(scale=0.3, size=(N_PERTURBATIONS, n_genes))
    log_fold = np.repeat(np.vstack([change, np.zeros(n_genes)]), [n_cells] * 3 + [n_controls], 0)
    mean = mean_count * np.exp(log_fold)
    x = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, size=mean.shape))
    codes = np.repeat([0, 1, 2, -1], [n_cells] * 3 + [n_controls])[:, None]
    module = make_module(ConditionalVAEModule, n_genes=n_genes, n_perturbations=N_PERTURBATIONS)
    with torch.no_grad():
        module.decoder.to_genes.weight.zero_()
        module.decoder.to_genes.bias.zero_()
    module.cell_sizes.copy_(torch.tensor([[SIZE, SIZE, SIZE], [1.0, 0.0, 0.0]]))
    block = observed(module, sums_of([batch(x, codes)], [True] * 3))
    ratio = (block.observed - change) / block.error
    assert abs(ratio.mean()) < 0.35  # controls are the same for all three
    assert 0.85 < ratio.std() < 1.15
    assert np.corrcoef(block.observed.ravel(), change.ravel())[0, 1] > 0.8


@pytest.fixture(scope="module")
def linear():
    """Return a model that lets shifts add ``weight @ shift`` to expression, the weight, effects."""
    adata = small_screen()
    model = train_small(
        adata, {"layer": "normalised"}, gene_likelihood="normal", **VARIANTS["mean field"]
    )
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(adata.n_vars, N_LATENT))
    effects = rng.normal(size=(4, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, adata.n_vars))
    set_effects(model, effects)
    return model.module, effects @ weight.T


def test_a_perturbation_seen_in_pairs_only_is_what_its_partner_leaves(linear):
    """P0 stands with P1 only; P1 has cells of its own, which speak for it."""
    module, of_model = linear
    rng = np.random.default_rng(2)
    codes = np.repeat([[1, 0], [1, -1], [-1, -1]], [9, 5, 7], axis=0)
    doses = np.where(codes >= 0, [2.0, 0.5], 0.0)
    x = rng.normal(size=(21, of_model.shape[1]))
    sums = sums_of([batch(x, codes, doses)], [False, True, False, False], is_count=False)
    assert sums.n.tolist() == [9, 5, 0, 0, 7]
    block = observed(module, sums, n_perturbations=4)
    pairs, alone, controls = x[:9].mean(axis=0), x[9:14].mean(axis=0), x[14:].mean(axis=0)
    by_hand = (pairs - controls - 2 * of_model[1]) / 0.5
    np.testing.assert_allclose(block.observed[0], by_hand, atol=2e-4)
    np.testing.assert_allclose(block.observed[1], (alone - controls) / 2, atol=2e-4)
    np.testing.assert_allclose(block.of_model[:2], of_model[:2], atol=2e-4)


def test_the_effect_of_a_combination_is_that_of_all_its_perturbations(linear):
    """At their doses, against control cells; its cells do not speak for P0 and P1."""
    module, of_model = linear
    rng = np.random.default_rng(7)
    codes = np.repeat([[1, 0], [1, -1], [0, -1], [-1, -1]], [9, 5, 6, 7], axis=0)
    doses = np.where(codes >= 0, [2.0, 0.5], 0.0)
    x = rng.normal(size=(27, of_model.shape[1]))
    cells = batch(x, codes, doses)
    tables = DirectEffects(4, x.shape[1], is_stacked=True)
    tables.measure(cells.codes, cells.doses)
    sums = gene_sums([cells], tables, torch.tensor([True, True, False, False]), is_count=False)
    assert sums.n.tolist() == [6, 5, 0, 0, 9, 7]
    effects = ObservedEffects(
        sums, expected_rates(module, sums.cells, 6), np.ones((2, 3)), is_count=False
    )
    (block,) = effects.blocks(range(4, 5))
    together, controls = x[:9].mean(axis=0), x[20:].mean(axis=0)
    np.testing.assert_allclose(block.observed[0], together - controls, atol=2e-4)
    np.testing.assert_allclose(block.of_model[0], 2 * of_model[1] + 0.5 * of_model[0], atol=2e-4)


def test_errors_of_means_are_those_of_control_cells(linear):
    module, of_model = linear
    rng = np.random.default_rng(3)
    codes = np.repeat([0, -1], [40, 100])[:, None]
    x = rng.normal(size=(140, of_model.shape[1]))
    sums = sums_of([batch(x, codes)], [True, False, False, False], is_count=False)
    block = observed(module, sums, n_perturbations=4)
    by_hand = x[40:].std(axis=0) * np.sqrt(1 / 40 + 1 / 100)
    np.testing.assert_allclose(block.error[0], by_hand, rtol=1e-5)


def test_processes_average_what_each_expects_of_its_own_cells():
    """Of a group without cells of its own a process has nothing to say."""
    cells = sums_of([few_counts()], [True, True, False]).cells
    tables = [np.full((4, 2), value, dtype=np.float32) for value in (2.0, 4.0, 3.0, 0.5)]
    mine = Expected(*tables, np.full(4, 3.0))
    others = torch.tensor([2.0, 0.0, 0.0, 8.0])  # cells of the groups elsewhere, all of value 10

    def total(values):
        if values.ndim == 1 and values.tolist() == [6, 6, 0, 8]:
            return values + others
        return values + 10 * (others[:, None] if values.ndim == 2 else others)

    found = over_processes(mine, cells, total)
    for table, own in zip(found[:4], (2, 4, 3, 0.5), strict=True):
        by_hand = [(6 * own + 2 * 10) / 8, own, own, (8 * own + 80) / 16]
        np.testing.assert_allclose(table, np.repeat(np.transpose([by_hand]), 2, axis=1))
    np.testing.assert_allclose(found.dose, [(6 * 3 + 20) / 8, 3, 3, (8 * 3 + 80) / 16])
