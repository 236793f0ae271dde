"""The negative binomial log-likelihood: values against other implementations, and gradients."""

import numpy as np
import pyro.distributions as pyro_distributions
import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import NegativeBinomial, Poisson

from module.reference import negative_binomial_log_pmf
from scvi_sams.module._negative_binomial import (
    mean_decoded_log_prob,
    negative_binomial_log_prob,
)
from scvi_sams.module._rising_factorial import TABLE_SIZE

COUNTS = [0, 1, 2, 17, 126, 127, 128, 129, 130, 5000]
"""Around the end of the table, and far beyond it."""


@pytest.fixture(params=["processor", "accelerator"], autouse=True)
def _device(request, monkeypatch):
    """All of it twice: by compiled loops, and by the operations that accelerators get, run here."""
    if request.param == "accelerator":
        monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: True)


TWO_MODES = pytest.mark.parametrize("softmax", [False, True], ids=["log mean", "softmax"])


def make_cells(n_particles=3, n_cells=6, dtype=torch.float64, seed=0, counts=None):
    """Counts with every interesting value, log means (or logits), log theta, sizes."""
    rng = np.random.default_rng(seed)
    n_genes = len(COUNTS)
    x = np.stack([rng.permutation(counts or COUNTS) for _ in range(n_cells)])
    logits = rng.normal(1, 2, size=(n_particles, n_cells, n_genes))
    log_theta = np.linspace(np.log(0.05), np.log(500), n_genes)
    size = x.sum(axis=1) + 1.0
    return tuple(torch.as_tensor(a, dtype=dtype) for a in (x, logits, log_theta, size))


def log_means(logits, size, softmax):
    return torch.log_softmax(logits, -1) + size.log()[:, None] if softmax else logits


def by_autograd(x, logits, log_theta, size=None):
    """The same by log-gamma functions, differentiated by torch."""
    log_mean = logits if size is None else log_means(logits, size, True)
    theta = log_theta.exp()
    log_fail = -torch.log1p(log_mean.exp() / theta)
    choices = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (choices + theta * log_fail + x * (log_mean - log_theta + log_fail)).sum(-1)


@TWO_MODES
def test_agrees_with_scipy_torch_and_pyro(softmax):
    x, logits, log_theta, size = make_cells()
    actual = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    log_mean = log_means(logits, size, softmax)
    theta = log_theta.exp()
    probability = (theta / (theta + log_mean.exp())).numpy()
    by_scipy = stats.nbinom.logpmf(x.numpy(), theta.numpy(), probability).sum(-1)
    by_torch = NegativeBinomial(theta, logits=log_mean - log_theta).log_prob(x).sum(-1)
    by_pyro = pyro_distributions.GammaPoisson(theta, theta / log_mean.exp()).log_prob(x).sum(-1)
    for expected in (by_scipy, by_torch.numpy(), by_pyro.numpy()):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("others", [[0], [TABLE_SIZE - 2], [TABLE_SIZE - 1], [7000]])
def test_each_count_whatever_the_largest_of_the_batch(count, others):
    """The table ends at the largest count of the mini-batch."""
    x = torch.tensor([[count, others[0]]], dtype=torch.float64)
    logits = torch.tensor([[[0.3, 4.0]]], dtype=torch.float64)
    log_theta = torch.tensor([-0.7, 1.1], dtype=torch.float64)
    theta = log_theta.exp().numpy()
    probability = theta / (theta + np.exp([0.3, 4.0]))
    expected = stats.nbinom.logpmf([count, others[0]], theta, probability).sum()
    actual = negative_binomial_log_prob(x, logits, log_theta).item()
    assert actual == pytest.approx(expected, rel=1e-9)


@TWO_MODES
@pytest.mark.parametrize("theta", [10.0**exponent for exponent in range(-2, 9)])
def test_float32_is_exact_for_every_dispersion(theta, softmax):
    """The textbook form loses 137 nats per cell of 2,000 genes at theta = 1e5."""
    rng = np.random.default_rng(1)
    n_cells, n_genes = 8, 2000
    logits = rng.normal(0, 1.3, size=(2, n_cells, n_genes)).astype(np.float32)
    mean = np.exp(logits[0].astype(float))
    x = rng.negative_binomial(3, 3 / (3 + mean)).astype(np.float32)
    x[:, : len(COUNTS)] = COUNTS
    size = x.sum(axis=1)
    log_theta = np.full(n_genes, np.log(theta), dtype=np.float32)
    actual = negative_binomial_log_prob(
        *map(torch.as_tensor, (x, logits, log_theta)), torch.as_tensor(size) if softmax else None
    )
    assert actual.dtype == torch.float32
    log_mean = log_means(torch.as_tensor(logits).double(), torch.as_tensor(size).double(), softmax)
    expected = exact_log_pmf(x.astype(float), log_mean.numpy(), float(np.exp(float(log_theta[0]))))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=0.05)


def exact_log_pmf(x, log_mean, theta):
    """Sum over genes with no cancelling log-gammas: a running sum of log1p(k / theta)."""
    steps = np.arange(int(x.max()))
    rising = np.concatenate([[0], np.cumsum(np.log1p(steps / theta) - np.log1p(steps))])
    choices = rising[x.astype(int)]
    return (choices + x * log_mean - (x + theta) * np.log1p(np.exp(log_mean) / theta)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_means_are_not_distorted(dtype):
    """Adding 1e-4 to the mean would give log p(1) = -9.1."""
    log_mean = torch.full((1, 1, 1), np.log(1e-5), dtype=dtype)
    one = negative_binomial_log_prob(
        torch.ones(1, 1, dtype=dtype), log_mean, torch.zeros(1).to(dtype)
    )
    zero = negative_binomial_log_prob(
        torch.zeros(1, 1, dtype=dtype), log_mean, torch.zeros(1).to(dtype)
    )
    assert one.item() == pytest.approx(np.log(1e-5) - 2 * np.log1p(1e-5), abs=2e-6)
    assert zero.item() == pytest.approx(-np.log1p(1e-5), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_limit(dtype):
    rate = torch.tensor([0.01, 1.0, 4.0, 30.0, 200.0])
    x = torch.tensor([[0.0, 2.0, 3.0, 28.0, 210.0]])
    log_theta = torch.full((5,), np.log(1e8), dtype=dtype)
    actual = negative_binomial_log_prob(
        x.to(dtype), rate.log().to(dtype).expand(1, 1, 5), log_theta
    )
    expected = Poisson(rate.double()).log_prob(x.double()).sum()
    assert actual.item() == pytest.approx(
        expected.item(), abs=2e-3 if dtype == torch.float32 else 1e-4
    )


@TWO_MODES
def test_sums_to_one_over_the_counts(softmax):
    x = torch.arange(4000, dtype=torch.float64)[:, None]
    logits = torch.zeros(1, len(x), 1, dtype=torch.float64)
    size = torch.full((len(x),), 20.0, dtype=torch.float64) if softmax else None
    if not softmax:
        logits = logits + np.log(20.0)
    log_prob = negative_binomial_log_prob(x, logits, torch.tensor([np.log(0.7)]), size)
    assert log_prob.exp().sum().item() == pytest.approx(1, rel=1e-9)


# Shapes and batches -----------------------------------------------------------------------------


@TWO_MODES
@pytest.mark.parametrize(("n_particles", "n_cells"), [(1, 1), (1, 6), (4, 1)])
def test_one_particle_and_one_cell(n_particles, n_cells, softmax):
    x, logits, log_theta, size = make_cells(n_particles, n_cells)
    actual = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    expected = negative_binomial_log_pmf(
        x.numpy(), log_means(logits, size, softmax).numpy(), log_theta.exp().numpy()
    ).sum(-1)
    assert actual.shape == (n_particles, n_cells)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9)


@TWO_MODES
def test_cells_without_counts(softmax):
    x, logits, log_theta, size = make_cells()
    logits.requires_grad_()
    log_theta.requires_grad_()
    zeros = torch.zeros_like(x)
    actual = negative_binomial_log_prob(zeros, logits, log_theta, size if softmax else None)
    ratio = log_means(logits, size, softmax).exp() / log_theta.exp()
    expected = -(log_theta.exp() * torch.log1p(ratio)).sum(-1)
    np.testing.assert_allclose(actual.detach(), expected.detach(), rtol=1e-9)
    gradients = torch.autograd.grad(actual.sum(), (logits, log_theta))
    for got, want in zip(
        gradients, torch.autograd.grad(expected.sum(), (logits, log_theta)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@TWO_MODES
def test_a_split_batch_gives_the_same(softmax):
    """Also where only one part holds counts beyond the table."""
    x, logits, log_theta, size = make_cells(n_cells=8)
    x[:4] = x[:4].clamp(max=3)
    log_theta.requires_grad_()
    parts = [slice(0, 4), slice(4, 8)]
    whole = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    halves = [
        negative_binomial_log_prob(x[p], logits[:, p], log_theta, size[p] if softmax else None)
        for p in parts
    ]
    np.testing.assert_allclose(whole.detach(), torch.cat(halves, 1).detach(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(whole.sum(), log_theta)
    summed = sum(torch.autograd.grad(half.sum(), log_theta)[0] for half in halves)
    np.testing.assert_allclose(gradient, summed, rtol=1e-10)


@TWO_MODES
def test_inputs_are_left_alone(softmax):
    inputs = make_cells()
    copies = [value.clone() for value in inputs]
    x, logits, log_theta, size = inputs
    logits.requires_grad_()
    log_prob = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    log_prob.sum().backward()
    for value, copy in zip(inputs, copies, strict=True):
        assert torch.equal(value.detach(), copy)


def test_an_absurd_mean_stays_finite_and_is_pulled_down():
    logits = torch.full((1, 1, 2), 200.0, requires_grad=True)
    log_theta = torch.zeros(2, requires_grad=True)
    log_prob = negative_binomial_log_prob(torch.tensor([[0.0, 3.0]]), logits, log_theta)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(log_theta.grad).all()
    assert (logits.grad < 0).all()
    assert torch.isfinite(logits.grad).all()


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_theta", [-1000.0, -18.4, -13.8, -11.5, 30.0, 1000.0])
@pytest.mark.parametrize("count", [0.0, 1.0, 1e5, 2.0**24])
@pytest.mark.parametrize("log_mean", [-200.0, 0.0, 59.9, 1000.0])
def test_gradients_are_finite_for_every_mean_dispersion_and_count(log_mean, count, log_theta):
    """Close to x - (x + theta) ratio / (1 + ratio), which is -theta where the mean is huge."""
    logit = torch.tensor([[[log_mean]]], requires_grad=True)
    parameter = torch.tensor([log_theta], requires_grad=True)
    value = negative_binomial_log_prob(torch.tensor([[count]]), logit, parameter)
    value.sum().backward()
    assert value.isfinite().all()
    assert parameter.grad.isfinite().all()
    mean, theta = np.exp(np.clip([log_mean, log_theta], [-300, -25], 60))
    expected = (count - mean) / (1 + mean / theta)
    tolerance = 1e-6 * (count + theta * mean / (theta + mean)) + 1e-6
    np.testing.assert_allclose(float(logit.grad), expected, atol=tolerance, rtol=1e-4)


@TWO_MODES
@pytest.mark.parametrize("counts", [[0] * 10, [0, 0, 0, 0, 1, 1, 2, 3, 5, 9], [*COUNTS[:-1], 500]])
def test_gradients_by_finite_differences(counts, softmax):
    """Gradcheck perturbs every particle's and cell's output on its own."""
    x, logits, log_theta, size = make_cells(2, 2, counts=counts)
    logits.requires_grad_()
    log_theta.requires_grad_()

    def function(logits, log_theta):
        return negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)

    assert torch.autograd.gradcheck(function, (logits, log_theta), rtol=1e-5, atol=1e-5)


@TWO_MODES
def test_gradients_under_weights_of_particles_and_cells(softmax):
    """As importance weights put them; twice over the same graph, whose arrays are not spent."""
    x, logits, log_theta, size = make_cells()
    logits.requires_grad_()
    log_theta.requires_grad_()
    weights = torch.as_tensor(np.random.default_rng(5).normal(size=logits.shape[:2]))
    sizes = size if softmax else None
    expected = torch.autograd.grad(
        (weights * by_autograd(x, logits, log_theta, sizes)).sum(), (logits, log_theta)
    )
    weighted = (weights * negative_binomial_log_prob(x, logits, log_theta, sizes)).sum()
    for _ in range(2):
        actual = torch.autograd.grad(weighted, (logits, log_theta), retain_graph=True)
        for got, want in zip(actual, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("needed", ["logits", "log_theta"])
def test_gradient_of_one_argument_alone(needed):
    x, logits, log_theta, size = make_cells()
    argument = {"logits": logits, "log_theta": log_theta}[needed].requires_grad_()
    actual = torch.autograd.grad(
        negative_binomial_log_prob(x, logits, log_theta, size).sum(), argument
    )
    expected = torch.autograd.grad(by_autograd(x, logits, log_theta, size).sum(), argument)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-8, atol=1e-9)


@TWO_MODES
@pytest.mark.parametrize("theta", [0.01, 1.0, 100.0, 1e4])
def test_float32_gradients(theta, softmax):
    x, logits, log_theta, size = make_cells()
    log_theta = torch.full_like(log_theta, np.log(theta))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        arguments = [a.to(torch.float32).to(dtype) for a in (logits, log_theta)]
        for argument in arguments:
            argument.requires_grad_()
        sizes = size.to(dtype) if softmax else None
        log_prob = negative_binomial_log_prob(x.to(dtype), *arguments, sizes)
        gradients.append(torch.autograd.grad(log_prob.sum(), arguments))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


# From the decoder's last layer ------------------------------------------------------------------


def make_last_layer(dtype=torch.float64, n_particles=3, n_cells=7, n_hidden=4):
    """What the last layer reads and has, beside the cells of :func:`make_cells`."""
    x, _, log_theta, size = make_cells(n_particles, n_cells, dtype)
    generator = torch.Generator().manual_seed(3)
    shapes = (n_particles, n_cells, n_hidden), (x.shape[1], n_hidden), (x.shape[1],)
    layer = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    arguments = [value.to(dtype).requires_grad_() for value in (*layer, log_theta)]
    return x, size, arguments


def through_logits(x, hidden, weight, bias, log_theta, size, softmax):
    logits = hidden @ weight.T + bias
    if softmax:
        return by_autograd(x, logits, log_theta, size)
    return by_autograd(x, logits + size.log()[:, None], log_theta)


@TWO_MODES
@pytest.mark.parametrize("values_per_chunk", [1, 30, 2**18])
def test_mean_from_the_last_layer_and_its_gradients(values_per_chunk, softmax, monkeypatch):
    """Whatever the chunks: of one cell, of three and one left over, of all."""
    monkeypatch.setattr("scvi_sams.module._minibatch._VALUES_PER_CHUNK", values_per_chunk)
    x, size, arguments = make_last_layer()
    mean, each = mean_decoded_log_prob(x, *arguments, size, softmax=softmax)
    expected = through_logits(x, *arguments, size, softmax)
    np.testing.assert_allclose(each, expected.detach(), rtol=1e-10)
    assert mean.item() == pytest.approx(expected.mean().item(), rel=1e-10)
    for got, want in zip(
        torch.autograd.grad(-2.5 * mean, arguments),
        torch.autograd.grad(-2.5 * expected.mean(), arguments),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@TWO_MODES
@pytest.mark.parametrize("count", [3, TABLE_SIZE - 1, TABLE_SIZE, 5000])
@pytest.mark.parametrize("more", [0, 1000], ids=["as large", "larger"])
def test_bounds_of_counts_change_nothing(count, more, softmax):
    """Genes whose counts may be large are few, or the first of all; bounds need not be reached."""
    _, size, arguments = make_last_layer()
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.integers(0, 3, size=(7, 10)), dtype=torch.float64)
    x[2, 0] = x[5, 6] = count
    largest = x.amax(0).numpy()
    largest[:7] += more
    mean, each = mean_decoded_log_prob(x, *arguments, size, softmax=softmax, largest=largest)
    expected = through_logits(x, *arguments, size, softmax)
    np.testing.assert_allclose(each, expected.detach(), rtol=1e-10)
    for got, want in zip(
        torch.autograd.grad(mean, arguments),
        torch.autograd.grad(expected.mean(), arguments),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)


@TWO_MODES
def test_mean_from_the_last_layer_by_finite_differences(softmax):
    x, size, arguments = make_last_layer(n_particles=2, n_cells=3, n_hidden=2)

    def function(*arguments):
        return mean_decoded_log_prob(x, *arguments, size, softmax=softmax)[0]

    assert torch.autograd.gradcheck(function, arguments, rtol=1e-5, atol=1e-5)


def test_the_same_graph_gives_the_same_gradients_twice():
    x, size, arguments = make_last_layer()
    mean, _ = mean_decoded_log_prob(x, *arguments, size, softmax=True)
    first = torch.autograd.grad(mean, arguments, retain_graph=True)
    second = torch.autograd.grad(mean, arguments)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_values_of_cells_need_no_gradient_and_have_none():
    x, size, arguments = make_last_layer()
    with_graph = mean_decoded_log_prob(x, *arguments, size, softmax=True)
    assert not with_graph[1].requires_grad
    with torch.no_grad():
        without = mean_decoded_log_prob(x, *arguments, size, softmax=True)
    for value, same in zip(with_graph, without, strict=True):
        torch.testing.assert_close(value.detach(), same, rtol=1e-12, atol=0)
        assert not same.requires_grad


def test_full_precision_under_automatic_mixed_precision():
    """Hidden units come in half precision there; what is made of them is exact."""
    x, size, arguments = make_last_layer(torch.float32)
    hidden, *others = arguments
    half = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = mean_decoded_log_prob(x, half, *others, size, softmax=True)
    expected, _ = mean_decoded_log_prob(x, half.detach().float(), *others, size, softmax=True)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, expected)
    mean.backward()
    assert half.grad.dtype == torch.bfloat16
    assert all(torch.isfinite(argument.grad).all() for argument in (half, *others))


@TWO_MODES
def test_data_that_ask_for_a_gradient_are_data_all_the_same(softmax):
    """As where somebody attributes a latent state to genes."""
    x, size, arguments = make_last_layer()
    expected, _ = mean_decoded_log_prob(x, *arguments, size, softmax=softmax)
    x.requires_grad_()
    sizes = x.sum(1) + 1
    actual, _ = mean_decoded_log_prob(x, *arguments, sizes, softmax=softmax)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    _, logits, log_theta, _ = make_cells()
    log_prob = negative_binomial_log_prob(x[:6], logits, log_theta, sizes[:6] if softmax else None)
    assert not log_prob.requires_grad


@TWO_MODES
def test_nan_among_logits_shows(softmax):
    """So that training stops where it diverges."""
    x, logits, log_theta, size = make_cells(2, 3, torch.float32)
    logits[1, 2, 4] = torch.nan
    log_prob = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    is_nan = torch.zeros(2, 3, dtype=torch.bool)
    is_nan[1, 2] = True
    assert torch.equal(log_prob.isnan(), is_nan)


@TWO_MODES
def test_nan_among_counts_shows_and_is_no_place_in_memory(softmax):
    x, logits, log_theta, size = make_cells(2, 3, torch.float32)
    x[1, 0] = torch.nan
    log_prob = negative_binomial_log_prob(x, logits, log_theta, size if softmax else None)
    assert log_prob[:, 1].isnan().all()
    assert log_prob[:, [0, 2]].isfinite().all()


@TWO_MODES
def test_an_accelerator_is_asked_nothing(softmax, monkeypatch):
    """Tensors without values raise an error where a size or a branch depends on values."""
    monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: True)
    real = make_last_layer(torch.float32)
    with FakeTensorMode() as without_values:
        x, size = (without_values.from_tensor(value) for value in real[:2])
        arguments = [without_values.from_tensor(value) for value in real[2]]
        mean, each = mean_decoded_log_prob(
            x, *arguments, size, softmax=softmax, largest=np.linspace(0, 2 * TABLE_SIZE, 10)
        )
        gradients = torch.autograd.grad(mean, arguments)
        assert each.shape == (3, 7)
        assert [g.shape for g in gradients] == [a.shape for a in arguments]
        with pytest.raises(DataDependentOutputException):
            int(x.amax())
