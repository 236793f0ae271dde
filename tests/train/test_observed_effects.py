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
from scvi_sams.train._expected_rates import Expected, expected_rates, over_processes
from scvi_sams.train._gene_sums import gene_sums
from scvi_sams.train._observed_effects import ObservedEffects

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


def effects_in(module, sums, tables=None):
    """What the cells show, by default of perturbations alone."""
    if tables is None:
        tables = DirectEffects(sums.n_rows, sums.x.shape[1], is_stacked=True)
    expected = expected_rates(module, sums.cells, tables)
    sizes = module.cell_sizes.double().numpy()
    return ObservedEffects(sums, expected, sizes, module.likelihood)


def observed(module, sums, *, n_perturbations=N_PERTURBATIONS):
    """All perturbations in one block."""
    (block,) = effects_in(module, sums).blocks(range(n_perturbations))
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


def test_estimates_by_sums_and_by_logs_are_combined_by_their_errors():
    """Written out for each gene; the decoder expects the same of all cells."""
    cells = few_counts()
    effects = effects_in(constant_module(), sums_of([cells], [True, True, False]))
    (block,) = effects.blocks(range(N_PERTURBATIONS))
    scale = effects.scale
    controls = cells.x[cells.codes[:, 0] < 0].double().numpy()
    logs = np.log2(1 + 1e4 / SIZE * controls)
    mean = controls.mean(axis=0) + 0.5 / 8
    residual = controls - mean
    of_sums = (residual**2).mean(axis=0) / mean**2
    of_logs = logs.var(axis=0) / scale.slope**2
    of_both = (residual * logs).mean(axis=0) / mean / scale.slope
    for code in (0, 1):
        own = cells.x[cells.codes[:, 0] == code].double().numpy()
        per_cell = 1 / 6 + 1 / 8
        # Such counts vary less than Poisson ones, of which errors are never less.
        poisson = 1 / (6 * mean + 0.5) + 1 / (8 * mean + 0.5)
        of_all = [np.maximum(part * per_cell, poisson) for part in (of_sums, of_logs, of_both)]
        change = (np.log(own.sum(axis=0) + 0.5) - np.log(6 * mean + 0.5))[None]
        share = 1 / (8 * mean + 0.5) / poisson
        slope = 1 + share * (np.maximum(scale.relative_slope(change)[0], 1) - 1)
        spread = slope**2 * of_all[0] + of_all[1] - 2 * slope * of_all[2]
        weight = np.clip((of_all[1] - slope * of_all[2]) / np.maximum(spread, 1e-12), 0, 1)
        weight = np.where(spread > 1e-12, weight, 1)
        by_sums = scale.compared(np.log(own.sum(axis=0) + 0.5) - np.log(6 * mean + 0.5))
        by_logs = (np.log2(1 + 1e4 / SIZE * own).mean(axis=0) - logs.mean(axis=0)) / scale.slope
        by_hand = weight * by_sums + (1 - weight) * by_logs
        np.testing.assert_allclose(block.observed[code], by_hand, rtol=1e-4, atol=1e-5)
        variance = (
            weight**2 * of_all[0]
            + (1 - weight) ** 2 * of_all[1]
            + 2 * weight * (1 - weight) * of_all[2]
        )
        dispersion = np.maximum(of_sums - 1 / mean, 1e-3)
        level = scale.relative_slope(change)[0] ** 2 * (dispersion + np.exp(-change[0]) / mean)
        treated = 1 / 6 / per_cell
        factor = (1 + treated * level / (dispersion + 1 / mean) + 1 - treated) / 2
        np.testing.assert_allclose(block.error[code], np.sqrt(variance * factor), rtol=1e-4)
    np.testing.assert_allclose(block.of_model, 0, atol=1e-6)


def test_effects_on_the_compared_scale_are_those_on_log_rates_where_they_are_small():
    scale = effects_in(constant_module(), sums_of([few_counts()], [True, True, False])).scale
    small, share = np.full((1, N_GENES), 0.02), np.exp(BIAS) / np.exp(BIAS).sum()
    np.testing.assert_allclose(scale.compared(small), small, rtol=0.05)
    np.testing.assert_allclose(scale.relative_slope(0 * small), 1)
    # Shares of the library: two of the genes have a third of it and more.
    changes = np.linspace(-4, 1, 11)[:, None] + np.zeros(N_GENES)
    np.testing.assert_allclose(
        scale.log_change(scale.compared(changes))[:7], changes[:7], atol=1e-6
    )
    assert (scale.log_change(scale.compared(changes + 9)) < np.log(1 / share) + 0.1).all()
    step = 1e-3
    slope = (scale.compared(changes + step) - scale.compared(changes - step)) / (2 * step)
    np.testing.assert_allclose(scale.relative_slope(changes), slope, rtol=0.05, atol=0.03)


def test_the_compared_scale_is_the_mean_of_logs_that_the_decoder_expects():
    """Counts are sampled at one rate and at a fourfold one."""
    module = constant_module()
    scale = effects_in(module, sums_of([few_counts()], [True, True, False])).scale
    torch.manual_seed(0)
    means = []
    for log_change in (0.0, np.log(4)):
        share = torch.as_tensor(np.exp(BIAS) / np.exp(BIAS).sum() * np.exp(log_change))
        mean = (SIZE / 100 * share).expand(200_000, -1)
        inverse = module.likelihood.log_inverse_dispersion.exp().detach().double()
        x = torch.poisson(torch.distributions.Gamma(inverse, inverse / mean).sample())
        means.append(np.log2(1 + 1e4 / SIZE * x.numpy()).mean(axis=0))
    change = np.full((1, N_GENES), np.log(4))
    assert (scale.compared(change) * scale.slope > 0).all()
    found = scale.compared(change + np.log(1e-2)) - scale.compared(0 * change + np.log(1e-2))
    np.testing.assert_allclose(found[0] * scale.slope, means[1] - means[0], rtol=0.05, atol=0.01)


def test_a_gene_that_rises_from_almost_nothing_is_known_to_what():
    """The control cells say little of the ratio, and much of the difference in means of logs."""
    rng = np.random.default_rng(0)
    x = rng.poisson(3, size=(110, N_GENES)).astype(float)
    x[:, 0] = np.append(rng.poisson(60, size=60), np.zeros(50))
    x[60:64, 0] = 1
    cells = batch(x, np.repeat([0, -1], [60, 50])[:, None])
    module = constant_module()
    with torch.no_grad():
        module.decoder.to_genes.bias[0] = np.log(4 / 50 / SIZE * np.exp(BIAS[1:]).sum())
    effects = effects_in(module, sums_of([cells], [True, False, False]))
    (block,) = effects.blocks(range(1))
    logs = np.log2(1 + 1e4 / SIZE * x[:, 0])
    difference = logs[:60].mean() - logs[60:].mean()
    assert block.observed[0, 0] * effects.scale.slope[0] == pytest.approx(difference, rel=0.15)
    assert block.error[0, 0] < 0.2 * block.observed[0, 0]


def test_a_gene_of_a_few_control_cells_that_all_treated_cells_express_rises_by_what_is_seen():
    """If counts varied as in control cells, most treated cells would still not express it."""
    rng = np.random.default_rng(0)
    x = rng.poisson(3, size=(100, N_GENES)).astype(float)
    x[:, 0] = np.append(rng.poisson(60, size=50), np.zeros(50))
    x[50, 0] = 8  # one control cell
    cells = batch(x, np.repeat([0, -1], 50)[:, None])
    module = constant_module()
    with torch.no_grad():
        module.decoder.to_genes.bias[0] = np.log(8 / 50 / SIZE * np.exp(BIAS[1:]).sum())
        module.likelihood.log_inverse_dispersion[0] = np.log(0.02)
    effects = effects_in(module, sums_of([cells], [True, False, False]))
    (block,) = effects.blocks(range(1))
    logs = np.log2(1 + 1e4 / SIZE * x)
    seen = logs[:50].mean(axis=0) - logs[50:].mean(axis=0)
    found = effects.scale.slope * block.observed[0]
    error = effects.scale.slope * block.error[0]
    assert found[0] == pytest.approx(seen[0], rel=0.05)
    assert error[0] < 0.2 * seen[0]


def test_few_counts_of_controls_do_not_become_large_increases():
    """Two counts where 24 are expected: the log ratio is far off, the difference of logs is not."""
    rng = np.random.default_rng(2)
    found, seen = [], []
    for _ in range(60):
        x = rng.poisson(3, size=(100, N_GENES)).astype(float)
        x[:, 0] = rng.poisson(0.24, size=100) * rng.integers(0, 2, size=100)
        controls = x[50:, 0]
        controls[np.flatnonzero(controls)[2:]] = 0  # by chance, two control cells express it
        cells = batch(x, np.repeat([0, -1], 50)[:, None])
        module = constant_module()
        with torch.no_grad():
            module.decoder.to_genes.bias[0] = np.log(0.1 / SIZE * np.exp(BIAS[1:]).sum())
        effects = effects_in(module, sums_of([cells], [True, False, False]))
        (block,) = effects.blocks(range(1))
        logs = np.log2(1 + 1e4 / SIZE * x[:, 0])
        found.append(effects.scale.slope[0] * block.observed[0, 0])
        seen.append(logs[:50].mean() - logs[50:].mean())
    np.testing.assert_allclose(np.mean(found), np.mean(seen), rtol=0.1)


def test_strong_knockdowns_are_seen_for_sure():
    rng = np.random.default_rng(0)
    n_cells, n_controls = 29, 600
    left = np.array([1, 19, 60, 87])  # of 87 expected ones
    x = np.zeros((n_cells + n_controls, N_GENES))
    x[n_cells:] = rng.poisson(3, size=(n_controls, N_GENES))
    x[:n_cells, 4] = 3
    for gene, count in enumerate(left):
        x[:n_cells, gene] = np.bincount(np.arange(count) % n_cells, minlength=n_cells)
    cells = batch(x, np.repeat([0, -1], [n_cells, n_controls])[:, None])
    effects = effects_in(constant_module(), sums_of([cells], [True, False, False]))
    (block,) = effects.blocks(range(1))
    ratio = block.observed[0] / block.error[0]
    assert ratio[0] < -6
    assert ratio[1] < -4
    assert abs(ratio[3]) < 1
    np.testing.assert_allclose(
        effects.scale.log_change(block.observed)[0, 1:4], np.log(left[1:] / 87), atol=0.35
    )


def test_of_a_gene_without_counts_nothing_is_known():
    """Control cells that do not vary in it must not pass for ones that are sure."""
    rng = np.random.default_rng(0)
    x = rng.poisson(3, size=(110, N_GENES)).astype(float)
    x[:, 0] = 0
    cells = batch(x, np.repeat([0, -1], [60, 50])[:, None])
    module = constant_module()
    with torch.no_grad():
        module.decoder.to_genes.bias[0] = -20
    effects = effects_in(module, sums_of([cells], [True, False, False]))
    (block,) = effects.blocks(range(1))
    assert block.error[0, 0] > 1
    assert abs(block.observed[0, 0]) < block.error[0, 0]
    assert effects.scale.log_change(np.zeros((1, N_GENES)))[0, 0] == pytest.approx(0, abs=1e-6)


def test_few_counts_that_are_missing_by_chance_are_no_knockdown():
    """Of one expected count none is left in a third of all cases."""
    x = np.ones((110, N_GENES))
    x[::5, 0], x[1::2, 0] = 1, 0
    x[:10, 0] = 0
    x[10:, 0] = np.arange(100) % 10 == 0  # a tenth of a count per cell
    cells = batch(x, np.repeat([0, -1], [10, 100])[:, None])
    block = observed(constant_module(), sums_of([cells], [True, False, False]))
    assert -1.5 < block.observed[0, 0] / block.error[0, 0] < 0


def test_mini_batches_and_halves_of_the_cells_add_up():
    cells = few_counts()
    whole = sums_of([cells], [True, True, False])
    halves = [CellBatch(*(None if p is None else p[i::2] for p in cells)) for i in (0, 1)]
    one, other = (sums_of([half], [True, True, False]) for half in halves)
    for sums in (sums_of(halves, [True, True, False]), one + other):
        for found, expected in zip(sums.totals(), whole.totals(), strict=True):
            torch.testing.assert_close(found, expected)
        assert sorted(sums.cells.group.tolist()) == sorted(whole.cells.group.tolist())


def test_effects_are_those_at_the_doses_of_the_cells():
    one, two = (
        observed(constant_module(), sums_of([few_counts(dose=dose)], [True, True, False]))
        for dose in (1.0, 2.0)
    )
    assert two.dose[:2].ravel().tolist() == [2, 2]
    np.testing.assert_allclose(two.observed, one.observed)
    np.testing.assert_allclose(two.error[:2], one.error[:2])


def test_a_perturbation_without_cells_has_no_effect_and_no_end_of_error():
    block = observed(constant_module(), sums_of([few_counts()], [True, True, False]))
    assert not block.observed[2].any()
    assert not block.of_model[2].any()
    assert np.isinf(block.error[2]).all()


def test_without_controls_effects_are_relative_to_the_decoder():
    cells = few_counts(controls=False)
    effects = effects_in(constant_module(), sums_of([cells], [True, True, False]))
    (block,) = effects.blocks(range(N_PERTURBATIONS))
    share = np.exp(BIAS) / np.exp(BIAS).sum()
    for code in (0, 1):
        x, size = totals(cells, code)
        by_sums = effects.scale.compared(np.log(x + 0.5) - np.log(size * share + 0.5))
        logs = np.log2(1 + 1e4 / SIZE * cells.x[cells.codes[:, 0] == code].numpy()).mean(axis=0)
        by_logs = (logs - effects.scale.unchanged) / effects.scale.slope
        low, high = np.minimum(by_sums, by_logs), np.maximum(by_sums, by_logs)
        assert (block.observed[code] >= low - 1e-5).all()
        assert (block.observed[code] <= high + 1e-5).all()
        assert (high < -0.1).any()


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
        module.likelihood.log_inverse_dispersion.fill_(-np.log(dispersion))
    size = mean_count * n_genes
    module.cell_sizes.copy_(torch.tensor([[size, size, size], [1.0, 0.0, 0.0]]))
    effects = effects_in(module, sums_of([batch(x, codes, size=size)], [True] * 3))
    (block,) = effects.blocks(range(N_PERTURBATIONS))
    ratio = (block.observed - effects.scale.compared(change)) / block.error
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


def test_cells_of_the_model_itself_lack_nothing():
    """Genes that some cells express, and more with P0: the log of the mean rate says too much."""
    adata = small_screen()
    model = train_small(adata, **VARIANTS["mean field"])
    module, rng = model.module, np.random.default_rng(8)
    n_genes = adata.n_vars
    weight, effects = np.zeros((n_genes, N_LATENT)), np.zeros((4, N_LATENT))
    induced = np.arange(5)
    weight[induced, 0], effects[0, 0] = 2.0, 1.5
    bias = np.where(np.isin(np.arange(n_genes), induced), -6.0, 0.0)
    make_decoder_linear(model, weight, bias)
    set_effects(model, effects)
    codes = np.repeat([0, -1], 4_000)[:, None]
    z_basal = torch.as_tensor(rng.normal(size=(len(codes), N_LATENT)), dtype=torch.float32)
    shifts = torch.as_tensor((codes >= 0) * effects[codes[:, 0]], dtype=torch.float32)
    with torch.no_grad():
        logits = module.decode(z_basal, shifts, None)
        x = module.likelihood.sample(logits, torch.full((len(codes),), SIZE))
    module.cell_sizes.copy_(torch.tensor([[SIZE, SIZE, SIZE], [1.0, 0.0, 0.0]]))
    sums = sums_of([batch(x.numpy(), codes)], [True, False, False, False])
    effects_here = effects_in(module, sums)
    (block,) = effects_here.blocks(range(1))
    lacking = block.observed - effects_here.scale.compared(block.of_model)
    assert (block.observed[0, induced] > 1).all()
    assert np.abs(lacking[0, induced]).max() < 0.06 * block.observed[0, induced].min()
    assert np.abs(lacking[0, 5:]).max() < 0.1


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
    by_hand = pairs - controls - 2 * of_model[1]
    np.testing.assert_allclose(block.observed[0], by_hand, atol=2e-4)
    np.testing.assert_allclose(block.observed[1], alone - controls, atol=2e-4)
    np.testing.assert_allclose(block.of_model[0], 0.5 * of_model[0], atol=2e-4)
    np.testing.assert_allclose(block.of_model[1], 2 * of_model[1], atol=2e-4)


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
    (block,) = effects_in(module, sums, tables).blocks(range(4, 5))
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
    logged = np.stack([np.full((4, 2), value, dtype=np.float32) for value in (1.0, 2.0, 4.0)])
    mine = Expected(*tables, np.full(4, 3.0), logged, np.zeros((1, 2)))
    others = torch.tensor([2.0, 0.0, 0.0, 8.0])  # cells of the groups elsewhere, all of value 10

    def total(values):
        if values.ndim == 1 and values.tolist() == [6, 6, 0, 8]:
            return values + others
        return values + 10 * (others[:, None] if values.ndim == 2 else others)

    found = over_processes(mine, cells, total)
    of_groups = [*found[:4], *found.logged]
    for table, own in zip(of_groups, (2, 4, 3, 0.5, 1, 2, 4), strict=True):
        by_hand = [(6 * own + 2 * 10) / 8, own, own, (8 * own + 80) / 16]
        np.testing.assert_allclose(table, np.repeat(np.transpose([by_hand]), 2, axis=1))
    np.testing.assert_allclose(found.dose, [(6 * 3 + 20) / 8, 3, 3, (8 * 3 + 80) / 16])
