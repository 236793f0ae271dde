"""Effects of perturbations: their posteriors, what these cost, and the moments of shifts."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional

from module.builders import make_module
from scvi_sams.module import draw_particles
from scvi_sams.module._networks import CorrelatedEffects, MeanFieldEffects, NormalHead

BOTH = pytest.mark.parametrize("correlated", [False, True], ids=["mean field", "correlated"])


def test_embedding_is_a_linear_layer_on_mask_and_one_hot():
    torch.manual_seed(0)
    effects = CorrelatedEffects(5, 3, n_layers=2, n_hidden=7)
    rows = torch.tensor([3, 0, 3])
    masks = torch.randint(0, 2, (4, 3, 3)).float()
    one_hot = functional.one_hot(rows, 5).float().expand(4, -1, -1)
    weight = torch.cat([effects.from_mask.weight, effects.from_perturbation.weight.T], dim=1)
    first = functional.linear(torch.cat([masks, one_hot], -1), weight, effects.from_mask.bias)
    expected = effects.head(effects.hidden_layers(first))
    actual = effects(rows, masks)
    assert actual.loc.shape == (4, 3, 3)
    np.testing.assert_allclose(actual.loc.detach(), expected.loc.detach(), atol=1e-6)
    np.testing.assert_allclose(actual.scale.detach(), expected.scale.detach(), rtol=1e-6)
    assert not torch.allclose(actual.loc[:, 0], actual.loc[:, 1])


def test_mean_field_looks_up_rows_whatever_the_masks():
    effects = MeanFieldEffects(4, 2)
    with torch.no_grad():
        effects.loc.copy_(torch.arange(8.0).reshape(4, 2))
        effects.log_scale.copy_(-torch.arange(8.0).reshape(4, 2))
    posterior = effects(torch.tensor([2, 0]), torch.zeros(3, 2, 2))
    np.testing.assert_allclose(posterior.loc.detach(), [[[4, 5], [0, 1]]])
    np.testing.assert_allclose(posterior.scale.detach(), np.exp([[[-4.0, -5], [0, -1]]]), rtol=1e-6)


def test_variance_has_a_floor():
    head = NormalHead(2, 1)
    with torch.no_grad():
        head.log_variance.weight.zero_()
        head.log_variance.bias.fill_(-200.0)
    assert head(torch.ones(1, 2)).scale.item() == pytest.approx(1e-2, rel=1e-5)


def test_divergence_of_effects_by_hand():
    """Posterior Normal(1, 0.5), prior Normal(0, 2): log 4 + (0.25 + 1) / 8 - 1/2 per latent."""
    module = make_module(correlated_effects=False, effect_prior_scale=2.0)
    with torch.no_grad():
        module.effects.loc.fill_(1.0)
        module.effects.log_scale.fill_(np.log(0.5))
    kl = module.global_posterior(torch.tensor([0, 3]), 1).kl["effects"]
    assert kl.shape == (1, 2)
    np.testing.assert_allclose(kl.detach(), 3 * (np.log(4) + 1.25 / 8 - 0.5), rtol=1e-6)


@BOTH
def test_estimate_of_the_divergence_averages_to_the_closed_form(correlated):
    """Same draws for both estimates: with correlated effects the closed form depends on masks."""
    n = 20_000
    module = make_module(correlated_effects=correlated)
    rows = torch.tensor([0, 2, 4])
    estimates = []
    for module.kl_estimator in ("closed_form", "monte_carlo"):
        torch.manual_seed(1)
        with torch.no_grad():
            estimates.append(module.global_posterior(rows, n).kl["effects"].double())
    difference = estimates[1] - estimates[0]
    assert difference.shape == (n, 3)
    assert (difference.std(0) > 0.1).all()
    assert (difference.mean(0).abs() < 5 * difference.std(0) / np.sqrt(n)).all()


@BOTH
def test_moments_of_shifts_are_those_of_draws(correlated):
    n = 50_000
    module = make_module(correlated_effects=correlated)
    rows = torch.tensor([1, 3])
    torch.manual_seed(2)
    mean, sd = module.shift_moments(rows, n_samples=n)
    with torch.no_grad():
        shifts = module.global_posterior(rows, n).shifts
    assert mean.shape == sd.shape == (2, 3)
    # Both sides are estimates where effects are correlated.
    assert ((mean - shifts.mean(0)).abs() < 5 * np.sqrt(2 / n) * shifts.std(0)).all()
    squares = (shifts - shifts.mean(0)).square()
    assert ((sd**2 - squares.mean(0)).abs() < 5 * np.sqrt(2 / n) * squares.std(0)).all()


@BOTH
@pytest.mark.parametrize("rows", [[3], [4, 0, 2], []])
def test_moments_of_shifts_do_not_depend_on_what_else_is_asked_for(correlated, rows, monkeypatch):
    """Nor on how many perturbations are in memory at once."""
    module = make_module(correlated_effects=correlated)
    everything = module.shift_moments(torch.arange(5))
    monkeypatch.setattr("scvi_sams.module._effect_moments._ROWS_PER_CHUNK", 2)
    some = deepcopy(module).shift_moments(torch.tensor(rows, dtype=torch.long))
    for whole, part in zip(everything, some, strict=True):
        np.testing.assert_allclose(part, whole[rows], rtol=1e-5, atol=1e-7)


def plain_moments(module, n_samples=500):
    """Means and sds over all draws of masks, one after the other, in double precision."""
    on = module.masks.inclusion_probability
    same = torch.Generator().manual_seed(11027)
    uniform = torch.rand((n_samples, 1, module.n_latent), generator=same)
    mean = second = 0.0
    with torch.no_grad():
        for draw in uniform:
            m = (draw < on).float()
            q_e = module.effects(torch.arange(len(on)), m[None])
            mean = mean + (m * q_e.loc[0]).double() / n_samples
            second = second + (m * (q_e.loc[0].square() + q_e.variance[0])).double() / n_samples
    return mean.float(), (second - mean.square()).clamp(min=0).sqrt().float()


@pytest.mark.parametrize("n_latent", [3, 70], ids=["one word of bits", "two words of bits"])
def test_moments_of_distinct_masks_are_those_of_all_draws(n_latent):
    module = make_module(correlated_effects=True, n_latent=n_latent)
    with torch.no_grad():
        module.masks.logits[1], module.masks.logits[2] = 30.0, -30.0
        module.masks.logits[3] = torch.linspace(-8, 8, n_latent)
    found = module.shift_moments(torch.arange(5))
    for actual, expected in zip(found, plain_moments(module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (found[0][2] == 0).all()


def changed_by_hand(module):
    # Which torch's count of changes does not notice.
    module.masks.logits.data[0] = -50.0


def changed_by_a_step(module):
    optimiser = torch.optim.Adam(module.effects.parameters(), lr=0.1)
    module.effects(torch.arange(5), torch.ones(1, 5, 3)).loc.sum().backward()
    optimiser.step()


def changed_by_loading(module):
    other = deepcopy(module)
    changed_by_a_step(other)
    module.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "change",
    [changed_by_hand, changed_by_a_step, changed_by_loading, lambda m: m.masks.switch_all_on(True)],
    ids=["by hand", "a step", "loading", "all masks on"],
)
def test_moments_are_those_of_the_weights_of_now(change):
    module = make_module(correlated_effects=True)
    rows = torch.arange(5)
    before = module.shift_moments(rows)[0]
    change(module)
    after = module.shift_moments(rows)
    assert not torch.allclose(before, after[0])
    for actual, expected in zip(after, plain_moments(module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_moments_are_computed_once_for_each_perturbation_and_set_of_weights(monkeypatch):
    module = make_module(correlated_effects=True)
    asked = []
    forward = module.effects.forward
    monkeypatch.setattr(
        module.effects, "forward", lambda rows, m: asked.extend(rows.tolist()) or forward(rows, m)
    )
    first = module.shift_moments(torch.tensor([1, 3]))[0]
    assert set(asked) == {1, 3}
    asked.clear()
    assert torch.equal(module.shift_moments(torch.tensor([3, 1]))[0], first[[1, 0]])
    assert asked == []
    module.shift_moments(torch.tensor([3, 4]))
    assert set(asked) == {4}
    module.shift_moments(torch.tensor([4]), n_samples=20)
    assert len(asked) > 1


def test_kept_moments_are_not_saved_and_are_of_use_in_training():
    module = make_module(correlated_effects=True)
    size, names = len(pickle.dumps(module)), set(module.state_dict())
    with torch.inference_mode():
        module.shift_moments(torch.arange(5))
    assert len(pickle.dumps(module)) == size
    assert set(module.state_dict()) == names
    mean, _ = module.shift_moments(torch.arange(5))
    (mean * module.masks.logits).sum().backward()
    assert torch.equal(module.masks.logits.grad, mean)


@BOTH
def test_moments_of_shifts_are_the_same_in_every_process(correlated):
    """The order of the latents is read off them, in each process of several by itself."""
    module = make_module(correlated_effects=correlated)
    found = []
    for seed in (4, 5):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(module.shift_moments(torch.arange(5)))
        assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@BOTH
def test_shifts_are_zero_where_masks_are_off(correlated):
    module = make_module(correlated_effects=correlated)
    with torch.no_grad():
        module.masks.logits[2] = torch.tensor([50.0, -50.0, 50.0])
    torch.manual_seed(0)
    shifts = module.global_posterior(torch.tensor([2]), 100).shifts[:, 0]
    assert (shifts[:, 1] == 0).all()
    assert (shifts[:, [0, 2]] != 0).all()


def test_draws_of_particles():
    """One draw per particle, also of a posterior that all particles share."""
    n = 50_000
    loc = torch.tensor([[[1.0, -2.0]]])
    scale = torch.tensor([[[0.5, 3.0]]])
    torch.manual_seed(0)
    draws = draw_particles(torch.distributions.Normal(loc, scale), n)
    assert draws.shape == (n, 1, 2)
    assert ((draws.mean(0) - loc[0]).abs() < 5 * scale[0] / np.sqrt(n)).all()
    assert ((draws.std(0) / scale[0] - 1).abs() < 5 / np.sqrt(2 * n)).all()
    each = draw_particles(torch.distributions.Normal(torch.zeros(3, 1, 2), torch.ones(3, 1, 2)), 3)
    assert len(each.unique()) == 6


# Where training starts ----------------------------------------------------------------------------


def test_embeddings_start_as_a_linear_layer_would():
    """Uniform within 1 / sqrt(n_latent + 1), whose standard deviation is that over sqrt(3)."""
    torch.manual_seed(0)
    weight = CorrelatedEffects(500, 8, n_layers=2, n_hidden=20).from_perturbation.weight
    assert 0.99 / 3 < weight.abs().max() <= 1 / 3
    assert weight.std().item() == pytest.approx(1 / 3 / np.sqrt(3), rel=0.02)
    assert abs(weight.mean().item()) < 0.01


@pytest.mark.parametrize("correlated", [False, True])
def test_effects_start_much_narrower_than_their_prior(correlated):
    module = make_module(correlated_effects=correlated, seed=None, n_hidden=50, effect_n_hidden=50)
    rows = torch.arange(5)
    scale = module.effects(rows, torch.ones(1, 5, 3)).scale
    assert scale.mean().item() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("correlated", [False, True])
def test_tables_are_all_parameters_that_are_no_weights_of_a_network(correlated):
    module = make_module(correlated_effects=correlated)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {names[id(parameter)] for parameter in module.table_parameters()}
    effects = (
        {"effects.from_perturbation.weight"}
        if correlated
        else {
            "effects.loc",
            "effects.log_scale",
        }
    )
    assert found == {"likelihood.log_inverse_dispersion", "masks.logits"} | effects
