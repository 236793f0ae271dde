"""Single precision against double precision, and libraries of one count beside a million."""

import copy

import numpy as np
import pytest
import torch

from module.builders import LIKELIHOODS, VARIANTS, make_module
from scvi_sams._constants import REGISTRY_KEYS

N_GENES, N_CELLS, N_LATENT = 300, 24, 10
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture
def same_draws(monkeypatch):
    """Random numbers are drawn in double precision, whatever they are asked for in."""

    def in_double(draw):
        def drawn(*size, dtype=None, **kwargs):
            return draw(*size, dtype=torch.float64, **kwargs).to(dtype)

        return drawn

    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, in_double(getattr(torch, name)))


def make_batch(*, counts, size_factor, seed=0):
    """Libraries of 1 to a million counts, in cells with doses of .1 to 10."""
    rng = np.random.default_rng(seed)
    libraries = np.geomspace(1, 1e6, N_CELLS).round().astype(int)
    shares = rng.dirichlet(np.full(N_GENES, 0.3))
    x = np.stack([rng.multinomial(n, shares) for n in libraries]).astype(float)
    codes = rng.integers(-1, 4, size=(N_CELLS, 1)).astype(float)
    doses = np.where(codes < 0, 0.0, rng.choice([0.1, 1.0, 10.0], size=codes.shape))
    tensors = {
        REGISTRY_KEYS.X: x if counts else np.log1p(x),
        REGISTRY_KEYS.PERTURBATIONS: np.concatenate([codes, doses], axis=1),
        REGISTRY_KEYS.BATCH: np.zeros((N_CELLS, 1)),
    }
    if size_factor:
        tensors[REGISTRY_KEYS.SIZE_FACTOR] = libraries[:, None] / 1e4
    return {key: torch.as_tensor(value, dtype=torch.float64) for key, value in tensors.items()}


def make(likelihood, size_factor, variant):
    basal, effects = variant
    module = make_module(
        seed=None,
        n_genes=N_GENES,
        n_latent=N_LATENT,
        n_hidden=32,
        effect_n_hidden=16,
        gene_likelihood=likelihood,
        uses_size_factor=size_factor,
        correlated_basal=basal,
        correlated_effects=effects,
        evidence_cells=30.0,
    )
    module.cells_per_perturbation.copy_(torch.tensor([500.0, 60.0, 7.0, 1.0, 0.0]))
    return module


def scored(module, tensors, dtype):
    """Terms of the objective and gradients, computed in a precision."""
    module = copy.deepcopy(module).to(dtype)
    torch.manual_seed(1)
    output = module({key: value.to(dtype) for key, value in tensors.items()})[2]
    output.loss.backward()
    terms = {**output.reconstruction_loss, **output.kl_local, "loss": output.loss}
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return terms, gradients


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("likelihood", "size_factor"), LIKELIHOODS)
def test_the_objective_in_single_precision_is_that_in_double(
    likelihood, size_factor, variant, same_draws
):
    """Up to rounding: that of a sum is at most some units in the last place of its largest parts.

    A cell's likelihood is a sum over genes of parts as large as x log x, which mostly cancel.
    """
    module = make(likelihood, size_factor, variant)
    tensors = make_batch(counts=likelihood != "normal", size_factor=size_factor)
    single, of_single = scored(module, tensors, torch.float32)
    double, of_double = scored(module, tensors, torch.float64)
    x = tensors[REGISTRY_KEYS.X]
    parts = (x * x.clamp(min=1).log()).sum(1) + x.sum(1) * 10 + N_GENES
    scale = {"reconstruction_loss": parts, "loss": parts.mean()}
    for name, value in double.items():
        assert single[name].dtype == torch.float32
        size = scale.get(name, value.abs() + 1)
        assert ((single[name].double() - value).abs() / size).max() < 50 * EPSILON, name
    for name, gradient in of_double.items():
        difference = (of_single[name].double() - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("likelihood", "size_factor"), LIKELIHOODS)
def test_one_count_beside_a_million_in_a_batch(likelihood, size_factor, variant):
    module = make(likelihood, size_factor, variant)
    tensors = make_batch(counts=likelihood != "normal", size_factor=size_factor)
    terms, gradients = scored(module, tensors, torch.float32)
    assert all(torch.isfinite(values).all() for values in terms.values())
    assert gradients.keys() == dict(module.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name
