"""Effects that contexts share and of their own: draws, moments, what they cost, and their start."""

from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

from module.builders import VARIANTS, make_module, make_tensors, score, take_cells
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module._contexts import ContextEffects, chance_of_effect
from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._masks import NEVER

# 12 cells of a whole training set in two contexts; P4 has no training cells.
CODES = [[0, -1], [0, 1], [1, 0], [2, -1], [-1, -1], [1, 2], [0, 3], [0, -1], *[[-1, -1]] * 4]
DOSES = [[1, 0], [2, 0.5], [1, 3], [0.1, 0], [0, 0], [1, 1], [1, 7], [1, 0], *[[0, 0]] * 4]
CONTEXTS = [0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1]
N_T = [5.0, 3.0, 2.0, 1.0, 0.0]
PAIRS = {0: 3, 1: 2, 2: 1, 3: 2, 5: 2, 6: 1, 8: 0}
"""Training cells of each registered pair, ``t * 2 + c``: P4 was registered in the first."""
OWN_TERMS = ("kl_context_masks", "kl_context_effects")
ALL_VARIANTS = pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)


def make_contexts(**changes):
    """A module of two contexts whose every parameter is a random number."""
    module = make_module(n_contexts=2, pairs_of_contexts=list(PAIRS), **changes)
    module.cells_per_perturbation.copy_(torch.tensor(N_T))
    module.contexts.n_cells.copy_(torch.tensor(list(PAIRS.values())))
    module.contexts.prior.set_to(0.3, 0.2)
    return module


def make_cells():
    return make_tensors(codes=CODES, doses=DOSES, contexts=CONTEXTS)


def switch_off_own(module):
    with torch.no_grad():
        module.contexts.masks.logits.fill_(-60.0)
    module.contexts.prior.set_to(1e-9, 1e-9)


# Draws and moments --------------------------------------------------------------------------------


@pytest.fixture
def own():
    torch.manual_seed(0)
    effects = ContextEffects(
        EffectRows(3, 2, [0, 1, 3]), 4, probability=0.1, effect_scale=1.7, temperature=1.0
    )
    with torch.no_grad():
        for parameter in effects.parameters():
            parameter.copy_(torch.randn_like(parameter))
    effects.prior.set_to(0.4, 0.25)
    effects.n_cells.copy_(torch.tensor([5.0, 2.0, 7.0]))
    return effects


MEASURED, UNMEASURED = [0, 1, 4], [2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("row", range(9))
def test_draws_have_the_moments(own, row):
    """By 40,000 draws: of measured rows those of the posterior, of others those of the urn."""
    own.eval()
    rows, n_draws = torch.tensor([row]), 40_000
    mean, variance = (values[0] for values in own.moments(rows))
    drawn = own.draw(rows, n_draws)
    values = (drawn.masks * drawn.effects)[:, 0].detach()
    error = (variance / n_draws).sqrt()
    assert ((values.mean(dim=0) - mean).abs() < 5 * error + 1e-6).all()
    np.testing.assert_allclose(values.var(dim=0), variance.detach(), rtol=0.12, atol=1e-3)
    if row in UNMEASURED:
        chance = 0.4 * 0.25 + 0.6 * NEVER
        there = [place for place, known in enumerate(MEASURED) if known // 3 == row // 3]
        on = expit(own.masks.logits[there].detach().double().numpy())
        loc = own.effects.loc[there].detach().double().numpy()
        scale = np.exp(own.effects.log_scale[there].detach().double().numpy())
        urn = len(there) + 1
        expected = (on * loc).sum(axis=0) / urn
        second = ((on * (loc**2 + scale**2)).sum(axis=0) + chance * 1.7**2) / urn
        np.testing.assert_allclose(mean.detach(), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance.detach(), second - expected**2, rtol=1e-4)
        found = own.inclusion_probability(rows)[0].detach()
        np.testing.assert_allclose(found, (on.sum(axis=0) + chance) / urn, rtol=1e-5)
    else:
        place = MEASURED.index(row)
        on = expit(own.masks.logits[place].detach().double().numpy())
        loc = own.effects.loc[place].detach().double().numpy()
        scale = np.exp(own.effects.log_scale[place].detach().double().numpy())
        np.testing.assert_allclose(mean.detach(), on * loc, rtol=1e-5)
        expected = on * (loc**2 + scale**2) - (on * loc) ** 2
        np.testing.assert_allclose(variance.detach(), expected, rtol=1e-4)


def test_in_the_dense_phase_only_measured_pairs_have_effects_of_their_own(own):
    own.masks.switch_all_on(True)
    rows = torch.arange(9)
    drawn = own.draw(rows, 3)
    assert (drawn.masks[:, MEASURED] == 1).all()
    assert (drawn.masks[:, UNMEASURED] == 0).all()
    mean, variance = own.moments(rows)
    assert (mean[UNMEASURED] == 0).all()
    assert (variance[UNMEASURED] == 0).all()
    torch.testing.assert_close(mean[MEASURED], own.effects.loc)
    torch.testing.assert_close(variance[MEASURED], (2 * own.effects.log_scale).exp())


def test_no_row_has_effects_on_dimensions_that_are_switched_off(own):
    own.masks.is_excluded[1] = True
    rows = torch.arange(9)
    on = own.inclusion_probability(rows)
    assert (on[:, 1] < 1e-8).all()
    assert (on[:, [0, 2, 3]] > 1e-4).all()
    assert (own.draw(rows, 100).masks[..., 1] == 0).all()


def test_training_cells_of_rows(own):
    assert own.cells_of(torch.arange(9)).tolist() == [5, 2, 0, 0, 7, 0, 0, 0, 0]


@ALL_VARIANTS
def test_shift_moments_are_those_of_draws(correlated_basal, correlated_effects):
    module = make_contexts(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    module.eval()
    rows, n_draws = torch.tensor([0, 1, 2, 7, 12]), 20_000
    mean, sd = module.shift_moments(rows, 20_000)
    shifts = module.global_posterior(rows, n_draws).shifts.detach()
    # Those of correlated effects are averages over draws of masks as well.
    error = sd * (2 / n_draws) ** 0.5
    assert ((shifts.mean(dim=0) - mean).abs() < 5 * error).all()
    np.testing.assert_allclose(shifts.std(dim=0), sd, rtol=0.06)


@ALL_VARIANTS
def test_where_own_masks_are_off_shifts_are_those_without_contexts(
    correlated_basal, correlated_effects
):
    variant = {"correlated_basal": correlated_basal, "correlated_effects": correlated_effects}
    module, plain = make_contexts(**variant), make_module(**variant)
    switch_off_own(module)
    state = module.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, strict=False)
    rows, codes = torch.tensor([0, 1, 2, 3, 7, 9, 10, 11]), torch.arange(4)
    place = [0, 0, 0, 1, 2, 3, 3, 3]
    drawn, expected = [], []
    for each, asked, kept in ((module, rows, drawn), (plain, codes, expected)):
        torch.manual_seed(3)
        kept += [each.global_posterior(asked, 5), *each.shift_moments(asked)]
    torch.testing.assert_close(drawn[0].shifts, expected[0].shifts[:, place])
    for name in ("masks", "effects"):
        torch.testing.assert_close(drawn[0].kl[name], expected[0].kl[name][:, place])
    for one, other in zip(drawn[1:], expected[1:], strict=True):
        # Where a pair was not measured a mask is on once in ten thousand times.
        torch.testing.assert_close(one, other[place], atol=1e-3, rtol=1e-5)


def test_the_shift_of_a_cell_is_that_of_its_context():
    module = make_contexts(correlated_effects=False)
    rows = torch.arange(15)
    torch.manual_seed(1)
    with mock.patch.object(module.masks, "sample_by", _on_where_likelier), torch.no_grad():
        module.contexts.masks.sample_by = _on_where_likelier
        module.effects.log_scale.fill_(-40)
        module.contexts.effects.log_scale.fill_(-40)
        shifts = module.global_posterior(rows, 3).shifts[0]
        found = module.inference(module.read_batch(make_cells()))["shift"][0]
    for cell, (codes, doses, context) in enumerate(zip(CODES, DOSES, CONTEXTS, strict=True)):
        expected = sum(
            (
                dose * shifts[3 * code + context]
                for code, dose in zip(codes, doses, strict=True)
                if code >= 0
            ),
            start=torch.zeros(3),
        )
        torch.testing.assert_close(found[cell], expected, rtol=1e-6, atol=1e-6)


def _on_where_likelier(logits, n_particles):
    return (logits > 0).to(logits).expand(n_particles, *logits.shape)


# What is charged ----------------------------------------------------------------------------------


@pytest.fixture
def fixed_draws():
    """Masks by a rule, so that no term depends on which cells are together."""
    target = "scvi_sams.module._masks.MaskPosterior.sample_by"
    with mock.patch(target, lambda _, logits, n: _on_where_likelier(logits, n)):
        yield


@pytest.mark.usefixtures("fixed_draws")
@ALL_VARIANTS
@pytest.mark.parametrize("batch_size", [12, 4, 1])
@pytest.mark.parametrize("evidence_cells", [None, 50.0])
def test_an_epoch_pays_for_every_perturbation_and_every_pair_once(
    correlated_basal, correlated_effects, batch_size, evidence_cells
):
    module = make_contexts(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        evidence_cells=evidence_cells,
    )
    tensors = make_cells()
    paid, penalty = {}, 0.0
    order = torch.as_tensor(np.random.default_rng(0).permutation(12))
    for cells in order.split(batch_size):
        batch = take_cells(tensors, cells)
        output = score(module, batch)
        for name, values in output.kl_local.items():
            paid[name] = paid.get(name, 0.0) + values.sum().item()
        inference = module.inference(module.read_batch(batch))
        penalty += inference["global_penalty"].mean(dim=0).sum().item()
    rows = module.effect_rows.measured
    kl = {f"kl_{k}": v.mean(dim=0) for k, v in module.global_posterior(rows, 3).kl.items()}
    # Pairs 0, 2, 5, 6 are the first of their perturbations.
    first, of_pairs = [0, 2, 4, 5], range(6)
    expected = {name: kl[name][first] for name in ("kl_masks", "kl_effects")}
    expected |= {name: kl[name][list(of_pairs)] for name in OWN_TERMS}
    for name, values in expected.items():
        assert paid[name] == pytest.approx(values.sum().item(), rel=1e-5)
    n_cells = {False: torch.tensor(N_T[:4]), True: torch.tensor(list(PAIRS.values())[:6])}
    charged = sum(
        (values * (1 if evidence_cells is None else 1 + n_cells[name in OWN_TERMS] / 50)).sum()
        for name, values in expected.items()
    )
    assert penalty == pytest.approx(charged.item(), rel=1e-5)


@pytest.mark.usefixtures("fixed_draws")
def test_share_of_each_cell_of_what_is_its_contexts_own():
    module = make_contexts()
    output = score(module, make_cells())
    kl = module.global_posterior(module.effect_rows.measured, 3).kl
    for name in OWN_TERMS:
        each = kl[name.removeprefix("kl_")].mean(dim=0)
        share = output.kl_local[name]
        assert (share[[4, 8, 9, 10, 11]] == 0).all()
        expected = {0: each[0] / 3, 1: each[0] / 3 + each[2], 2: each[1] / 2 + each[3] / 2}
        expected |= {3: each[4] / 2, 6: each[0] / 3 + each[5], 7: each[1] / 2}
        for cell, value in expected.items():
            assert share[cell].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.usefixtures("fixed_draws")
def test_a_pair_without_training_cells_pays_nothing_and_has_finite_gradients():
    module = make_contexts()
    tensors = take_cells(make_cells(), [0, 1])
    tensors[REGISTRY_KEYS.PERTURBATIONS] = torch.tensor([[4, -1, 1, 0], [4, 2, 1, 2]])
    for context in (0, 1, 2):  # registered without cells, not measured, and none of both
        tensors[REGISTRY_KEYS.CONTEXTS] = torch.full((2, 1), float(context))
        module.zero_grad()
        output = score(module, tensors)
        output.loss.backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        for name in OWN_TERMS:
            assert (output.kl_local[name][0] == 0).all()
            assert (output.kl_local[name][1] > 0) == (context == 1)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_every_parameter_has_a_gradient_in_every_step(dense, estimator):
    """Several processes wait for all of them, whatever the cells of a mini-batch carry."""
    module = make_contexts(kl_estimator=estimator)
    if dense:
        module.begin_dense_phase()
    for cells in ([4], [0, 4], [2, 3]):
        module.zero_grad()
        score(module, take_cells(make_cells(), cells)).loss.backward()
        lacking = [name for name, p in module.named_parameters() if p.grad is None]
        assert lacking == []


# The chance of an effect --------------------------------------------------------------------------


@pytest.mark.parametrize(("shared_on", "own_on"), [(0.0, 0.3), (0.7, 0.0), (1.0, 1.0), (0.6, 0.8)])
@pytest.mark.parametrize("estimate", [0.0, 0.1, 0.5, 3.0])
def test_chance_of_an_effect_by_the_bayes_factor(shared_on, own_on, estimate):
    """Both parts on: their sum, Normal(0, 2 beta^2), against nothing, given an estimate of it."""
    beta, v = 1.5, 0.04
    density = stats.norm.pdf(estimate, scale=np.sqrt(v + 2 * beta**2))
    remains = density / (density + stats.norm.pdf(estimate, scale=np.sqrt(v)))
    precision = 1 / v + 1 / (2 * beta**2)
    mean, variance = estimate / v / precision, 1 / precision
    expected = shared_on * (1 - own_on) + own_on * (1 - shared_on) + shared_on * own_on * remains
    arguments = (torch.tensor(x, dtype=torch.float64) for x in (shared_on, own_on, mean, variance))
    found = chance_of_effect(*arguments, beta)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_an_effect_that_a_context_takes_away_is_none_there():
    module = make_contexts(correlated_effects=False)
    with torch.no_grad():
        module.masks.logits.fill_(-30)
        module.masks.logits[0].fill_(30)
        module.contexts.masks.logits.fill_(-30)
        module.contexts.masks.logits[0].fill_(30)
        module.effects.loc.fill_(2.0)
        module.contexts.effects.loc.fill_(-2.0)
        module.effects.log_scale.fill_(-3.0)
        module.contexts.effects.log_scale.fill_(-3.0)
    module.contexts.prior.set_to(1e-6, 1e-6)
    first, second, unknown, other = module.chance_of_effect(torch.tensor([0, 1, 2, 4]))
    assert (first < 0.05).all()
    assert (second > 0.99).all()
    # As in either of the two, or as in neither.
    torch.testing.assert_close(unknown, (first + 2 * second) / 3, atol=1e-3, rtol=0)
    assert (other < 0.01).all()


# The start of masks -------------------------------------------------------------------------------


def make_dense(shared, own, n_contexts, *, sd_shared=0.05, sd_own=0.1):
    """A module in its dense phase whose effects are these, (T, L) and (T, C, L)."""
    n_perturbations, n_latent = shared.shape
    pairs = range(n_perturbations * n_contexts)
    module = make_module(
        n_perturbations=n_perturbations,
        n_latent=n_latent,
        n_contexts=n_contexts,
        pairs_of_contexts=list(pairs),
        correlated_effects=False,
        effect_prior_scale=2.0,
        mask_prior_probability=0.1,
        evidence_cells=100.0,
    )
    with torch.no_grad():
        module.effects.loc.copy_(torch.as_tensor(shared))
        module.effects.log_scale.fill_(np.log(sd_shared))
        module.contexts.effects.loc.copy_(torch.as_tensor(own.reshape(-1, n_latent)))
        module.contexts.effects.log_scale.fill_(np.log(sd_own))
        module.contexts.n_cells.fill_(30)
    module.begin_dense_phase()
    return module


def sparse_effects(seed, n_perturbations=60, n_contexts=5, n_latent=5):
    """Effects of a fifth of the entries, a third of which one context has not; and noise."""
    rng = np.random.default_rng(seed)
    shared = rng.choice([-2.0, 2.0], (n_perturbations, n_latent))
    shared *= rng.random(shared.shape) < 0.2
    total = np.repeat(shared[:, None], n_contexts, axis=1)
    is_alone = rng.random(n_perturbations) < 0.3
    total[is_alone, 0] = 0
    total = total + rng.normal(scale=0.08, size=total.shape)
    mean = total.mean(axis=1)
    return total, mean, total - mean[:, None], is_alone


@pytest.mark.parametrize("seed", range(3))
def test_masks_start_where_contexts_differ(seed):
    total, mean, own, is_alone = sparse_effects(seed)
    module = make_dense(mean, own, 5)
    rows = module.effect_rows.measured
    before = module.shift_moments(rows)[0]
    torch.testing.assert_close(before, torch.as_tensor(total.reshape(-1, 5), dtype=torch.float32))
    module.start_masks()
    assert not module.masks.all_on
    assert not module.contexts.masks.all_on
    is_shared = np.abs(total[:, 1:].mean(axis=1)) > 1
    found = module.masks.inclusion_probability.detach().numpy()
    assert found[is_shared].min() > 0.9
    assert found[~is_shared].max() < 0.3
    of_own = module.contexts.inclusion_probability(rows).detach().numpy().reshape(total.shape)
    is_own = np.zeros(total.shape, dtype=bool)
    is_own[:, 0] = is_shared & is_alone[:, None]
    assert of_own[is_own].min() > 0.9
    assert of_own[~is_own].max() < 0.3
    # Sums are still what they were, but for what is shrunken. Where one context differs the
    # effect that is shared is still a mean that it is part of, for training to mend.
    after = module.shift_moments(rows)[0].numpy().reshape(total.shape)
    assert np.abs(after - total)[~is_alone].max() < 0.3
    assert np.abs(after - total)[:, 0].max() < 0.3
    assert np.abs(after - total).max() < 0.7
    chance = module.chance_of_effect(rows).detach().numpy().reshape(total.shape)
    has_effect = np.abs(total) > 1
    assert chance[has_effect].min() > 0.8
    assert chance[~has_effect].max() < 0.4


@pytest.mark.parametrize("seed", range(3))
def test_masks_of_contexts_that_agree_start_as_those_without(seed):
    total, *_ = sparse_effects(seed, n_contexts=3)
    shared = total[:, 1]
    module = make_dense(shared, np.zeros_like(total), 3)
    module.start_masks()
    plain = make_module(
        n_perturbations=60,
        n_latent=5,
        correlated_effects=False,
        effect_prior_scale=2.0,
        mask_prior_probability=0.1,
        evidence_cells=100.0,
    )
    with torch.no_grad():
        plain.effects.loc.copy_(torch.as_tensor(shared))
        plain.effects.log_scale.fill_(np.log(0.1 / 3**0.5))  # of three contexts together
    plain.begin_dense_phase()
    plain.start_masks()
    rows = module.effect_rows.measured
    assert (module.contexts.inclusion_probability(rows) < 0.05).all()
    rho, pi = module.contexts.prior.probabilities
    assert rho * pi < 0.005
    on, expected = module.masks.inclusion_probability, plain.masks.inclusion_probability
    np.testing.assert_allclose(on.detach(), expected.detach(), atol=0.05)


def test_masks_of_pairs_that_were_not_measured_and_of_perturbations_without_any():
    """P1 was measured in one context only, P2 in none; they start all the same."""
    module = make_module(
        n_perturbations=8,
        n_contexts=3,
        pairs_of_contexts=[0, 1, 2, 4, *range(9, 24)],
        correlated_effects=False,
    )
    module.contexts.n_cells.fill_(30)
    module.contexts.n_cells[-1] = 0  # registered, but all of its cells are held out
    module.begin_dense_phase()
    module.start_masks()
    assert module.contexts.inclusion_probability(module.effect_rows.measured)[-1].max() < 0.05
    assert module.masks.logits.isfinite().all()
    assert module.contexts.masks.logits.isfinite().all()
    np.testing.assert_allclose(
        module.masks.logits[2].detach(), np.full(3, module.mask_prior.log_odds), rtol=1e-5
    )
    for rows in (torch.arange(32), module.effect_rows.measured):
        assert all(values.isfinite().all() for values in module.shift_moments(rows))
        assert module.chance_of_effect(rows).isfinite().all()


# Coordinates --------------------------------------------------------------------------------------


def test_rotated_and_reordered_effects_are_those_of_both_parts():
    module = make_contexts(correlated_effects=False)
    module.begin_dense_phase()
    rows = module.effect_rows.measured
    before = module.shift_moments(rows)[0]
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    with torch.no_grad():
        module.rotate(rotation)
        after = module.shift_moments(rows)[0]
        torch.testing.assert_close(after, before @ rotation, rtol=1e-5, atol=1e-6)
        order, signs = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, -1.0])
        module._switch_all_on(False)
        on = module.contexts.inclusion_probability(rows)
        before, chance = module.shift_moments(rows)[0], module.chance_of_effect(rows)
        module.permute_shifts(order, signs)
    torch.testing.assert_close(module.shift_moments(rows)[0], before[:, order] * signs)
    torch.testing.assert_close(module.contexts.inclusion_probability(rows), on[:, order])
    torch.testing.assert_close(module.chance_of_effect(rows), chance[:, order])


def test_the_origin_moves_under_what_contexts_share():
    module = make_contexts(correlated_effects=False)
    module.begin_dense_phase()
    rows, origin = module.effect_rows.measured, torch.tensor([0.5, -1.0, 2.0])
    before = module.shift_moments(rows)[0]
    module.translate(origin)
    torch.testing.assert_close(module.shift_moments(rows)[0], before - origin)
