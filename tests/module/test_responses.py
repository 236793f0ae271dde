"""Cells that respond to their perturbations or not: both branches, and how often each is taken."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from scipy.stats import norm

from module.builders import (
    CODES,
    COVARIATE_SIZES,
    LIKELIHOODS,
    VARIANTS,
    make_module,
    make_tensors,
    score,
    take_cells,
)
from module.test_negative_binomial import TWO_MODES, make_last_layer, through_logits
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import _likelihoods
from scvi_sams.module._branched_likelihood import mean_over_branches
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.module._responses import (
    Branches,
    CellsOfUnits,
    Responses,
    log_mixture,
    with_branches,
)

OWNERS = [0, 0, 1, 2, 3, 4]
"""Perturbation of each guide."""
GUIDES = [[-1, -1], [1, -1], [2, -1], [0, 3], [2, -1], [5, -1], [-1, -1]]


@pytest.fixture(params=["processor", "accelerator"])
def device(request, monkeypatch):
    if request.param == "accelerator":
        monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: True)
    return request.param


def branching(**changes):
    module = make_module(responses=True, **changes)
    module.responses.switch_on(True)
    return module


def batch(codes, guides=None, n_genes=3):
    codes = torch.tensor(codes)
    x = torch.ones(len(codes), n_genes)
    guides = None if guides is None else torch.tensor(guides)
    return CellBatch(x, codes, (codes >= 0).float(), None, x.sum(1), guides)


# What a cell's branches are ----------------------------------------------------------------------


def test_posterior_mean_and_divergence_by_hand():
    log_prior = torch.tensor([[0.7, 0.2], [0.3, 0.8]]).log()
    bounds = torch.tensor([[-10.0, -5.0], [-12.0, -4.0], [-11.0, -5.0], [-12.0, -9.0]])
    branches = Branches.of(log_prior, bounds)  # two particles of two cells
    weights = np.exp(bounds.numpy()).reshape(2, 2, 2) * np.array([[[0.7, 0.2]], [[0.3, 0.8]]])
    posterior = weights / weights.sum(axis=0)
    np.testing.assert_allclose(branches.posterior, posterior, rtol=1e-5)
    values = torch.arange(8.0).reshape(4, 2)
    expected = (posterior * values.numpy().reshape(2, 2, 2)).sum(axis=0)
    np.testing.assert_allclose(branches.mean(values), expected, rtol=1e-5)
    divergence = posterior * np.log(posterior / np.exp(log_prior.numpy())[:, None])
    np.testing.assert_allclose(branches.divergence(), divergence.sum(axis=0), atol=1e-6)
    # The bound at this posterior is the log of the mixture.
    bound = branches.mean(bounds) - branches.divergence()
    np.testing.assert_allclose(bound, np.log(weights.sum(axis=0)), atol=1e-5)
    np.testing.assert_allclose(log_mixture(log_prior, bounds), bound, atol=1e-5)


def test_a_certain_branch_has_no_nan():
    log_prior = torch.tensor([[0.0], [-1e30]], requires_grad=True)
    branches = Branches.of(log_prior, torch.tensor([[-1000.0], [50.0]]))
    divergence = branches.divergence()
    divergence.sum().backward()
    assert divergence.item() == 0
    assert torch.isfinite(log_prior.grad).all()


def test_effects_of_the_second_branch_are_zero():
    effects = torch.randn(1, 4, 2)
    found = with_branches(effects, 3)
    assert found.shape == (6, 4, 2)
    assert torch.equal(found[:3], effects.expand(3, 4, 2))
    assert not found[3:].any()


# The likelihood of both --------------------------------------------------------------------------


def bound_by_autograd(log_prob, of_branches):
    """Mean over particles and cells of the log of the mixture, and by particle and cell."""
    both = (log_prob + of_branches).unflatten(0, (2, -1))
    return torch.logsumexp(both, 0).mean()


def of_two_branches(n_particles, spread=1.0, seed=8):
    """What is known of branches besides; with no spread, so that neither is certain."""
    x, size, arguments = make_last_layer(n_particles=2 * n_particles)
    hidden = arguments[0].detach()
    hidden[n_particles:] = hidden[:n_particles] + 0.02 * hidden[n_particles:]
    arguments[0] = hidden.requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    shape = hidden.shape[:2]
    return x, size, arguments, spread * torch.randn(shape, generator=generator, dtype=hidden.dtype)


@TWO_MODES
@pytest.mark.parametrize("n_particles", [1, 3])
@pytest.mark.parametrize("values_per_chunk", [30, 2**18])
@pytest.mark.parametrize("has_direct", [False, True])
def test_gradients_of_the_fused_bound(
    values_per_chunk, n_particles, softmax, has_direct, device, monkeypatch
):
    """At the posterior of the branches the gradient is that of the log of the mixture."""
    monkeypatch.setattr("scvi_sams.module._minibatch._VALUES_PER_CHUNK", values_per_chunk)
    monkeypatch.setattr("scvi_sams.module._branched_likelihood._NO_WEIGHT", 0.0)
    x, size, arguments, known = of_two_branches(n_particles)
    direct = torch.full_like(x, 0.01) * torch.arange(x.shape[1]) if has_direct else None
    hidden, weight, bias, log_theta = arguments
    added = torch.zeros(len(hidden), *x.shape, dtype=x.dtype)
    if has_direct:
        added[:n_particles] = direct
    extended = torch.cat([hidden, added], dim=-1)
    wide = torch.cat([weight, torch.eye(x.shape[1], dtype=x.dtype)], dim=1)
    plain = through_logits(x, extended, wide, bias, log_theta, size, softmax)
    known = known - plain.detach()  # so that neither branch is certain
    mean, each = mean_over_branches(x, *arguments, size, direct, known, softmax=softmax)
    torch.testing.assert_close(each, plain.detach(), rtol=1e-9, atol=1e-9)
    posterior = torch.softmax((plain + known).detach().unflatten(0, (2, -1)), 0)
    assert ((posterior > 0.01) & (posterior < 0.99)).all()
    expected_mean = (posterior * plain.unflatten(0, (2, -1))).sum(0).mean()
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=0)
    found = torch.autograd.grad(mean, arguments)
    for got, want in zip(
        found, torch.autograd.grad(bound_by_autograd(plain, known), arguments), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@TWO_MODES
def test_branches_of_next_to_no_weight_hardly_change_gradients(softmax, device):
    """What is left out has less than a thousandth of the weight of a cell."""
    x, size, arguments, known = of_two_branches(2, spread=8.0)
    mean, each = mean_over_branches(x, *arguments, size, None, known, softmax=softmax)
    posterior = torch.softmax((each + known).unflatten(0, (2, -1)), 0)
    assert (posterior < 1e-3).any()
    found = torch.autograd.grad(mean, arguments)
    expected = torch.autograd.grad(
        bound_by_autograd(through_logits(x, *arguments, size, softmax), known), arguments
    )
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


@TWO_MODES
def test_a_branch_that_a_cell_has_not_has_no_value_and_large_divergences_are_no_reason(
    softmax, device
):
    x, size, arguments, known = of_two_branches(2)
    known = known - 5e3  # as divergences may be when training begins
    known[2:, 3:] = -1e30
    mean, each = mean_over_branches(x, *arguments, size, None, known, softmax=softmax)
    plain = through_logits(x, *arguments, size, softmax)
    expected = bound_by_autograd(plain, known)
    torch.testing.assert_close(each[:, :3], plain[:, :3].detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each[:2], plain[:2].detach(), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(mean, arguments)
    for got, want in zip(found, torch.autograd.grad(expected, arguments), strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


@TWO_MODES
def test_without_a_gradient_the_values_are_the_same(softmax, device):
    x, size, arguments, known = of_two_branches(2)
    expected = mean_over_branches(x, *arguments, size, None, known, softmax=softmax)
    with torch.no_grad():
        found = mean_over_branches(x, *arguments, size, None, known, softmax=softmax)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["nb", "poisson", "normal"])
@pytest.mark.parametrize("uses_size_factor", [False, True])
def test_every_likelihood_has_the_bound_and_its_gradient(name, uses_size_factor):
    torch.manual_seed(0)
    likelihood = _likelihoods.LIKELIHOODS[name](10, uses_size_factor=uses_size_factor).double()
    x, size, (hidden, weight, bias, _), known = of_two_branches(2)
    x = x.clamp(max=5)  # so that no branch is certain
    layer = torch.nn.Linear(4, 10).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    direct = 0.01 * x
    arguments = [hidden, *layer.parameters(), *likelihood.parameters()]
    mean, each = likelihood.mean_decoded_log_prob(x, hidden, layer, size, direct, known)
    logits = layer(hidden)
    logits = torch.cat([logits[:2] + direct, logits[2:]])
    plain = likelihood.log_prob(x, logits, size)
    torch.testing.assert_close(each, plain.detach(), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(mean, arguments)
    expected = torch.autograd.grad(bound_by_autograd(plain, known), arguments)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


# The objective -----------------------------------------------------------------------------------


def pieces(module, tensors, seed=7):
    """Bounds of both branches, written out by the parts of the module, ``(2, P, B)``."""
    torch.manual_seed(seed)
    found = module.inference(module.read_batch(tensors))
    torch.manual_seed(seed)
    output = score(module, tensors)
    cells = found["cells"]
    hidden = module.generative(found["z_basal"], found["shift"], cells.covariates)["hidden"]
    logits = module.decoder.to_genes(hidden)
    log_px = module.likelihood.log_prob(cells.x, logits, cells.size)
    kl = module.normal_kl(found["qz"], found["z_basal"])
    return found, output, log_px.unflatten(0, (2, -1)), kl.unflatten(0, (2, -1))


def log_prior_by_hand(module, cells):
    """Log-probabilities of the branches, ``(2, B)``, in numpy."""
    responses = module.responses
    log_odds, acts = responses.log_odds().detach().double().numpy(), responses.acts.numpy()
    prior = np.zeros((2, len(cells.codes)))
    for cell, codes in enumerate(cells.codes.tolist()):
        units = [code for code in codes if code >= 0 and acts[code]]
        if not units:
            prior[:, cell] = 0, -np.inf
            continue
        mean = log_odds[units].mean()
        prior[:, cell] = -np.logaddexp(0, -mean), -np.logaddexp(0, mean)
    return prior


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("correlated", VARIANTS, ids=str)
@pytest.mark.parametrize("kl_estimator", ["closed_form", "monte_carlo"])
@pytest.mark.parametrize("n_particles", [1, 3])
def test_the_bound_is_the_log_of_the_mixture(likelihood, correlated, kl_estimator, n_particles):
    gene_likelihood, uses_size_factor = likelihood
    basal, effects = correlated
    module = branching(
        gene_likelihood=gene_likelihood,
        uses_size_factor=uses_size_factor,
        correlated_basal=basal,
        correlated_effects=effects,
        kl_estimator=kl_estimator,
        n_particles=n_particles,
        **COVARIATE_SIZES,
    )
    module.responses.acts[1] = False
    module.responses.n_cells.fill_(26.0)
    tensors = make_tensors(
        covariates=True, counts=gene_likelihood != "normal", size_factor=uses_size_factor
    )
    found, output, log_px, kl = pieces(module, tensors)
    assert found["shift"].shape[0] == 2 * n_particles
    assert not found["shift"][n_particles:].any()
    prior = log_prior_by_hand(module, found["cells"])
    bound = logsumexp((log_px - kl).detach().double().numpy() + prior[:, None], axis=0)
    kept = output.kl_local["kl_z_basal"] + output.kl_local["kl_responses"]
    local = -(next(iter(output.reconstruction_loss.values())) + kept).detach()
    np.testing.assert_allclose(local, bound.mean(axis=0), rtol=2e-5, atol=2e-4)
    penalty = found["global_penalty"].mean().item() + module.responses.penalty().item()
    assert output.loss.item() == pytest.approx(penalty - bound.mean(), rel=2e-5)


def test_the_noise_of_basal_states_is_the_same_in_both_branches():
    module = branching(correlated_basal=False)
    found, _, _, _ = pieces(module, make_tensors())
    assert torch.equal(found["z_basal"][:3], found["z_basal"][3:])
    module = branching(correlated_basal=True)
    found, _, _, _ = pieces(module, make_tensors())
    noise = (found["z_basal"] - found["qz"].loc) / found["qz"].scale
    torch.testing.assert_close(noise[:3], noise[3:], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found["z_basal"][:3], found["z_basal"][3:])


def gradients(module, tensors):
    torch.manual_seed(7)
    output = score(module, tensors)
    output.loss.backward()
    return output, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_the_whole_gradient_is_that_of_the_log_of_the_mixture(monkeypatch):
    monkeypatch.setattr("scvi_sams.module._branched_likelihood._NO_WEIGHT", 0.0)
    module = branching().double()
    tensors = {name: value.double() for name, value in make_tensors().items()}
    _, found = gradients(module, tensors)
    module.zero_grad()
    inference, _, log_px, kl = pieces(module, tensors)
    prior = module.responses.log_prior(inference["cells"])
    bound = torch.logsumexp(log_px - kl + prior[:, None], 0)
    loss = -(bound - inference["global_penalty"]).mean() + module.responses.penalty()
    loss.backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert expected["responses.of_perturbations"].abs().min() > 0


@pytest.mark.parametrize("evidence_cells", [None, 3.0])
def test_cells_with_one_branch_have_the_loss_of_a_model_without_responses(evidence_cells):
    """Control cells, and cells of perturbations that do not act, whatever these seem to do."""
    plain = make_module(evidence_cells=evidence_cells)
    module = make_module(responses=True, evidence_cells=evidence_cells)
    module.load_state_dict(plain.state_dict(), strict=False)
    module.responses.switch_on(True)
    module.responses.acts.fill_(False)
    with torch.no_grad():
        # What the other branch could not be more likely by.
        for values in (plain.decoder.to_genes.weight, module.decoder.to_genes.weight):
            values.mul_(200)
        for parameter in module.responses.parameters():
            parameter.zero_()
        module.responses.mean.fill_(1.4)
    tensors = make_tensors()
    found, of_found = gradients(module, tensors)
    expected, of_expected = gradients(plain, tensors)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(
        found.reconstruction_loss["reconstruction_loss"],
        expected.reconstruction_loss["reconstruction_loss"],
        rtol=1e-5,
        atol=1e-4,
    )
    assert not found.kl_local["kl_responses"].any()
    for name, value in of_expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(of_found[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)
    for name in ("mean", "of_perturbations"):
        assert not of_found[f"responses.{name}"].any()


def test_before_cells_may_escape_the_loss_is_that_of_a_model_without_responses():
    """And every parameter has a gradient, which training on several processes needs."""
    plain = make_module()
    module = make_module(responses=True, perturbation_of_guides=OWNERS)
    module.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        module.responses.mean.fill_(1.4)
        module.responses.of_perturbations.zero_()
        module.responses.of_guides.zero_()
    found, of_found = gradients(module, make_tensors())
    expected, _ = gradients(plain, make_tensors())
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, _ in module.responses.named_parameters():
        assert not of_found[f"responses.{name}"].any()
    assert set(dict(module.named_parameters())) == set(of_found)


def test_only_cells_that_may_respond_count_as_evidence():
    module = branching(evidence_cells=10.0)
    module.responses.acts[0] = False
    share = torch.sigmoid(module.responses.log_odds()).tolist()
    expected = 1 + torch.tensor([13.0, 7 * share[1], 4 * share[2], 2 * share[3], 0]) / 10
    torch.testing.assert_close(module.evidence_weights(torch.arange(5)), expected)


@pytest.mark.parametrize("correlated", VARIANTS, ids=str)
def test_importance_weights_are_those_of_the_mixture(correlated):
    module = branching(correlated_basal=correlated[0], correlated_effects=correlated[1])
    cells = module.read_batch(make_tensors())
    noise, shift = torch.randn(4, len(cells.x), 3), torch.randn(4, len(cells.x), 3)
    shift = shift * (cells.codes >= 0).any(1)[:, None]
    found = module.log_importance_weights(cells, shift, noise).detach()
    weights = []
    for moved in (shift, torch.zeros_like(shift)):
        qz = module.encode(cells.x, moved, cells.covariates)
        z = qz.loc + qz.scale * noise
        log_px = module.likelihood.log_prob(
            cells.x, module.decode(z, moved, cells.covariates), cells.size
        )
        log_p = norm.logpdf(z.detach()).sum(-1)
        log_q = norm.logpdf(z.detach(), qz.loc.detach(), qz.scale.detach()).sum(-1)
        weights.append(log_px.detach().numpy() + log_p - log_q)
    expected = logsumexp(np.stack(weights) + log_prior_by_hand(module, cells)[:, None], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_evidence_of_control_cells_is_none_and_the_rest_depends_on_no_other_cell():
    module = branching()
    cells = module.read_batch(make_tensors())
    torch.manual_seed(3)
    shift = 0.1 * torch.randn(1, len(cells.x), 3) * (cells.codes >= 0).any(1)[:, None]
    evidence = module.response_evidence(cells, shift)
    is_control = (cells.codes < 0).all(1)
    torch.testing.assert_close(evidence[is_control], torch.zeros(2), rtol=0, atol=1e-4)
    assert (evidence[~is_control].abs() > 1e-3).all()
    some = [4, 1]
    alone = module.read_batch(take_cells(make_tensors(), some))
    torch.testing.assert_close(
        module.response_evidence(alone, shift[:, some]), evidence[some], rtol=1e-4, atol=1e-4
    )
    log_odds = module.response_log_odds(cells, shift)
    assert torch.isinf(log_odds[is_control]).all()
    expected = evidence + module.responses.log_odds_of(cells)
    torch.testing.assert_close(log_odds[~is_control], expected[~is_control])


def test_the_likelier_branch():
    module = branching()
    cells = module.read_batch(make_tensors())
    shift = torch.ones(1, len(cells.x), 3)
    responds = module.response_log_odds(cells, shift, 2) > 0
    with torch.no_grad():
        module.responses.mean.fill_(-1e3)
    found, moved = module.likelier_branch(cells, shift)
    can_escape = module.responses.may_escape(cells)
    assert can_escape.tolist() == [any(code >= 0 for code in codes) for codes in CODES]
    assert (found.codes[can_escape] == -1).all()
    assert not found.doses[can_escape].any()
    assert not moved[:, can_escape].any()
    with torch.no_grad():
        module.responses.mean.fill_(1e3)
    found, moved = module.likelier_branch(cells, shift)
    assert torch.equal(found.codes, cells.codes)
    assert torch.equal(moved, shift)
    assert responds.shape == (len(CODES),)


def test_samples_are_of_cells_that_respond_as_often_as_is_probable():
    """Here the prior alone decides: effects are zero, and direct effects tell who has them."""
    module = branching(direct_effects=True, gene_likelihood="normal")
    with torch.no_grad():
        module.masks.logits.fill_(-50.0)
        module.responses.of_perturbations.zero_()
        module.responses.mean.fill_(np.log(0.3 / 0.7))
        module.likelihood.log_scale.fill_(-9.0)
        module.decoder.to_genes.weight.zero_()
    module.direct_effect = lambda cells: (cells.codes >= 0).any(1)[:, None] * torch.ones(1, 5)
    tensors = make_tensors(counts=False, codes=[[0], [-1]], doses=[[1], [0]])
    drawn = module.sample(tensors, 4000)
    responds = (drawn[:, 0, 0] - module.decoder.to_genes.bias[0]) > 0.5
    assert responds.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert ((drawn[:, 1] - module.decoder.to_genes.bias).abs() < 0.1).all()


# Probabilities of responses ----------------------------------------------------------------------


def test_units_are_guides_or_perturbations_in_slots_of_either_width():
    responses = Responses(5, OWNERS)
    codes = [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [0, 2, -1], [1, 2, 3], [4, -1, -1]]
    guides = [[-1, -1], [1, -1], [-1, -1], [0, 3], [2, -1], [5, -1]]
    found = responses.units_of(batch(codes, guides))
    expected = [[-1, -1, -1], [6, -1, -1], [1, -1, -1], [5, 8, -1], [7, -1, -1], [10, -1, -1]]
    assert found.tolist() == expected
    narrow = responses.units_of(batch([[0], [1]], [[0, 1, -1], [-1, -1, -1]]))
    assert narrow.tolist() == [[5, 6, -1], [1, -1, -1]]
    assert responses.units_of(batch(codes)).tolist() == codes


def test_what_does_not_act_has_no_say():
    responses = Responses(3, [0, 1, 1, 2])
    responses.acts[1] = False
    cells = batch([[1, -1], [0, 1], [0, 1], [0, 2]], [[1, -1], [0, 2], [2, -1], [-1, 3]])
    assert responses.may_escape(cells).tolist() == [False, True, True, True]
    # The third cell has a guide of the one that does not act alone, and its other one then counts.
    assert responses.units_of(cells).tolist() == [[-1, -1], [3, -1], [0, -1], [-1, 6]]
    without = batch([[1, -1], [0, 1], [0, 2]])
    assert responses.units_of(without).tolist() == [[-1, -1], [0, -1], [0, 2]]


def test_log_prior_is_the_mean_of_log_odds():
    responses = Responses(3, [0, 1])
    with torch.no_grad():
        responses.of_perturbations.copy_(torch.tensor([0.5, -2.0, 1.0]))
        responses.of_guides.copy_(torch.tensor([0.3, 0.4]))
    responses.acts[2] = False
    cells = batch([[0, -1], [0, 1], [2, -1], [-1, -1], [0, 2]], [[0, -1], [0, 1]] + [[-1, -1]] * 3)
    np.testing.assert_allclose(
        responses.log_odds().detach(), [1.9, -0.6, 2.4, 2.2, -0.2], rtol=1e-5
    )
    found = responses.log_prior(cells).detach().exp()
    share = expit([2.2, 1.0, np.inf, np.inf, 1.9])
    np.testing.assert_allclose(found, [share, 1 - share], rtol=1e-4, atol=1e-7)


def test_rates_of_combinations_are_means_of_log_odds_of_what_acts():
    responses = Responses(4)
    responses.rates.copy_(torch.tensor([0.5, 0.9, 1.0, 0.2]))
    responses.acts[2] = False
    codes = torch.tensor([[-1, -1], [0, -1], [0, 1], [-1, 3], [2, -1], [0, 2], [3, 1]])
    expected = [1, 0.5, 0.75, 0.2, 1, 0.5, 0.6]
    np.testing.assert_allclose(responses.rates_of(codes), expected, rtol=1e-5)


def test_the_penalty_is_minus_the_log_prior_density():
    responses = Responses(3, [0, 0])
    responses.n_cells.fill_(50.0)
    assert responses.penalty().item() == 0
    with torch.no_grad():
        responses.mean.fill_(0.4)
        responses.of_perturbations.copy_(torch.tensor([0.5, -2.0, 1.0]))
        responses.of_guides.copy_(torch.tensor([0.3, 0.4]))
    values = np.array([-1.0, 0.5, -2.0, 1.0, 0.3, 0.4])
    expected = norm.logpdf(0) * 6 - norm.logpdf(values).sum()
    assert responses.penalty().item() * 50 == pytest.approx(expected, rel=1e-5)


def cells_of_screen(n_perturbations, n_each, n_guides, has_pairs, strength, seed=0):
    """Evidence of cells that responded as often as random log-odds have it."""
    rng = np.random.default_rng(seed)
    codes = np.full((n_perturbations * n_each, 2), -1)
    codes[:, 0] = np.repeat(np.arange(n_perturbations), n_each)
    if has_pairs:
        pairs = rng.random(len(codes)) < 0.3
        codes[pairs, 1] = (codes[pairs, 0] + 1) % n_perturbations
    units = codes.copy()
    if n_guides:
        guides = n_perturbations + codes * n_guides + rng.integers(n_guides, size=codes.shape)
        units = np.where(codes >= 0, guides, -1)
        unknown = rng.random(len(codes)) < 0.1
        units[unknown] = codes[unknown]
    log_odds = 0.5 + rng.normal(size=n_perturbations * (1 + n_guides))
    share = (units >= 0) / (units >= 0).sum(axis=1, keepdims=True)
    responds = rng.random(len(codes)) < expit((log_odds[units] * share).sum(axis=1))
    evidence = rng.normal(np.where(responds, 1, -1) * strength**2 / 2, strength)
    cells = CellsOfUnits(*map(torch.as_tensor, (codes, evidence, units)))
    return cells, np.repeat(np.arange(n_perturbations), n_guides)


def posterior_mode(cells, owners, n_perturbations):
    """Log-odds of units, and of the screen, by a general optimiser in double precision."""
    _, evidence, units = (values.numpy() for values in cells)
    share = (units >= 0) / (units >= 0).sum(axis=1, keepdims=True)

    def totals(values):
        perturbations = values[0] + values[1 : 1 + n_perturbations]
        return np.concatenate(
            [perturbations, perturbations[owners] + values[1 + n_perturbations :]]
        )

    def objective(values):
        prior = (totals(values)[units] * share).sum(axis=1)
        posterior, expected = expit(prior + evidence), expit(prior)
        value = np.logaddexp(0, prior) - np.logaddexp(0, prior + evidence)
        slope = np.zeros(n_perturbations + len(owners))
        np.add.at(slope, units, (expected - posterior)[:, None] * share)
        of_guides = slope[n_perturbations:]
        own = slope[:n_perturbations] + np.bincount(owners, of_guides, n_perturbations)
        centred = values - np.r_[1.4, np.zeros(len(values) - 1)]
        gradient = np.concatenate([[own.sum()], own, of_guides]) + centred
        return value.sum() + 0.5 * np.square(centred).sum(), gradient

    start = np.r_[1.4, np.zeros(n_perturbations + len(owners))]
    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-7}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return totals(found.x), found.x[0]


@pytest.mark.parametrize("strength", [0.8, 2.0, 4.0])
@pytest.mark.parametrize(
    ("n_perturbations", "n_each", "n_guides", "has_pairs"),
    [(5, 400, 0, False), (40, 60, 0, True), (15, 100, 3, False), (15, 100, 3, True)],
)
def test_improving_ends_at_the_posterior_mode(
    n_perturbations, n_each, n_guides, has_pairs, strength
):
    cells, owners = cells_of_screen(n_perturbations, n_each, n_guides, has_pairs, strength)
    responses = Responses(n_perturbations, owners.tolist()).double()
    with torch.no_grad():
        responses.of_perturbations.fill_(-2.0)  # wherever training left them
    for _ in range(100):
        responses.improve(cells, lambda sums: sums)
    log_odds, mean = posterior_mode(cells, owners, n_perturbations)
    np.testing.assert_allclose(responses.log_odds().detach(), log_odds, atol=0.01)
    assert responses.mean.item() == pytest.approx(mean, abs=0.01)


def test_guides_share_strength_with_their_perturbation():
    """A guide of five cells follows the other one; both are apart where both have many."""

    def fitted(n_cells_of_second):
        n = [400, n_cells_of_second]
        units = np.repeat([1, 2], n)
        evidence = np.where(units == 1, 6.0, -6.0)
        cells = CellsOfUnits(
            torch.zeros(sum(n), 1, dtype=torch.int64),
            torch.as_tensor(evidence),
            torch.as_tensor(units)[:, None],
        )
        responses = Responses(1, [0, 0]).double()
        for _ in range(100):
            responses.improve(cells, lambda sums: sums)
        return torch.sigmoid(responses.log_odds()).tolist()

    few, none, many = fitted(3), fitted(0), fitted(400)
    assert none[1] > 0.95
    assert none[2] == pytest.approx(none[0], abs=1e-6)  # nothing but its perturbation speaks for it
    assert none[2] > 0.85
    assert none[2] - 0.4 < few[2] < none[2]
    assert many[2] < 0.1
    assert many[1] > 0.9


def test_processes_add_up_what_their_cells_say():
    cells, owners = cells_of_screen(6, 50, 2, True, 2.0)
    whole, shared = (Responses(6, owners.tolist()).double() for _ in range(2))
    halves = [CellsOfUnits(*(v[part] for v in cells)) for part in (slice(130), slice(130, None))]
    for _ in range(20):
        whole.improve(cells, lambda sums: sums)
        sums = sum(shared.sums_of(half) for half in halves)
        shared.improve(halves[0], lambda _, total=sums: total)
    torch.testing.assert_close(shared.log_odds(), whole.log_odds(), rtol=1e-6, atol=1e-6)


def test_what_is_fitted_at_the_end_by_hand():
    responses = Responses(4, [1, 1]).double()
    responses.acts[2] = False
    with torch.no_grad():
        responses.of_perturbations.copy_(torch.tensor([0.6, -0.4, 0.0, 1.0]))
        responses.of_guides.copy_(torch.tensor([0.5, -1.0]))
    # Two cells of the first, one of each guide of the second, a pair, one that does not act.
    codes = [[0, -1], [0, -1], [1, -1], [1, -1], [0, 1], [2, -1]]
    units = [[0, -1], [0, -1], [4, -1], [5, -1], [0, 4], [-1, -1]]
    evidence = [1.0, -2.0, 0.5, 3.0, -1.0, 9.0]
    cells = CellsOfUnits(
        torch.tensor(codes), torch.tensor(evidence, dtype=torch.float64), torch.tensor(units)
    )
    responses.finish(cells, lambda sums: sums)
    prior = [2.0, 2.0, 1.5, 0.0, 1.75]
    rates = [expit([prior[i] for i in own]).mean() for own in ([0, 1, 4], [2, 3, 4])]
    untrained = expit(2.4)  # no cell carries it, and it is said to act
    np.testing.assert_allclose(responses.rates, [*rates, 1.0, untrained], rtol=1e-6)
    squares = [np.mean([1, 4, 1]), np.mean([0.25, 9, 1]), 81, 0]
    np.testing.assert_allclose(responses.evidence, np.sqrt(squares), rtol=1e-6)
    known = [
        expit(p) * expit(-p) - expit(p + e) * expit(-p - e)
        for p, e in zip(prior, evidence[:5], strict=True)
    ]
    information = [known[0] + known[1] + known[4] / 4, 0, 0, 0, known[2] + known[4] / 4, known[3]]
    np.testing.assert_allclose(responses.information, information, atol=1e-7)
    expected = (np.clip(information, 0, None) + 1) ** -0.5
    np.testing.assert_allclose(responses.sd(), expected, rtol=1e-6)
    # The third does not act, however large its evidence; that of the first is rms sqrt(2).
    known = responses.knows(batch([[0], [1], [2], [3], [-1]]))
    assert known.tolist() == [True, True, False, False, False]


def test_saved_and_loaded_it_has_begun_or_not():
    begun, other = branching(), make_module(responses=True)
    assert not other.has_branches
    other.load_state_dict(begun.state_dict())
    assert other.has_branches
    begun.responses.switch_on(False)
    other.load_state_dict(begun.state_dict())
    assert not other.has_branches


def test_guides_of_a_mini_batch_are_read_as_codes():
    module = branching(perturbation_of_guides=OWNERS)
    tensors = make_tensors() | {REGISTRY_KEYS.GUIDES: torch.tensor(GUIDES).float()}
    cells = module.read_batch(tensors)
    assert cells.guides.dtype == torch.int64
    units = module.responses.units_of(cells)
    assert units.tolist() == [
        [-1, -1, -1], [6, -1, -1], [7, -1, -1], [5, 8, -1], [7, -1, -1], [10, -1, -1],
        [-1, -1, -1],
    ]  # fmt: skip
    output = score(module, tensors)
    output.loss.backward()
    assert module.responses.of_guides.grad[[1, 2, 0, 3, 5]].abs().min() > 0
