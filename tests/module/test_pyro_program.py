"""The objective against Pyro's own ELBO of the model as the documentation states it."""

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from module.builders import (
    CELLS_PER_PERTURBATION,
    COVARIATE_SIZES,
    LIKELIHOODS,
    VARIANTS,
    make_module,
    make_tensors,
    take_cells,
)
from module.pyro_program import guide, model
from module.reference import recorded_draws
from scvi_sams._constants import REGISTRY_KEYS

ALL_VARIANTS = pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
PYRO_ELBO = {"monte_carlo": Trace_ELBO, "closed_form": TraceMeanField_ELBO}
N_CELLS = 30
"""Of the screen that the cells of the builders are a mini-batch of."""


class BothWays:
    """One pass of a module over some cells, and the program at the very values that it drew."""

    @torch.no_grad()
    def __init__(self, module, tensors, n_cells=None):
        torch.manual_seed(3)
        with recorded_draws(module) as draws:
            inference, _, self.output = module(tensors)
        cells = inference["cells"]
        self.estimator = module.kl_estimator
        self.d = dense_doses(cells, len(module.cells_per_perturbation))
        size = cells.size if module.uses_size_factor else None
        self.arguments = (module, cells.x, self.d, size, cells.covariates, n_cells)

        rows = torch.where((self.d != 0).any(0))[0]
        # A straight-through sample is 0 or 1 up to rounding only.
        masks = torch.as_tensor(draws.masks[0], dtype=cells.x.dtype).round()
        q_e = module.effects(rows, masks)
        effects = q_e.loc + q_e.scale * torch.as_tensor(draws.noise[0], dtype=cells.x.dtype)
        # Perturbations that none of the cells carry are not drawn: any value will do.
        table = self.d.new_zeros(self.d.shape[1], module.n_latent)
        self.particles = [
            {"m": table.index_copy(0, rows, m), "e": table.index_copy(0, rows, e), "z_basal": z}
            for m, e, z in zip(masks, effects, inference["z_basal"], strict=True)
        ]

    def elbo(self):
        """Of the whole screen, by the module's loss."""
        return -len(self.d) * self.output.loss.item()

    @torch.no_grad()
    def elbo_of_pyro(self):
        """Of the whole screen, mean over particles."""
        losses = []
        # Pyro would refuse to take the divergence of a Bernoulli, because of its gradient.
        with pyro.validation_enabled(False):
            for values in self.particles:
                fixed = poutine.replay(guide, trace=drawn(values))
                losses.append(PYRO_ELBO[self.estimator]().loss(model, fixed, *self.arguments))
        return -np.mean(losses)

    def terms(self):
        """Of every cell, by the module."""
        terms = {"x": self.output.reconstruction_loss["reconstruction_loss"]}
        for site, name in (("z_basal", "z_basal"), ("m", "masks"), ("e", "effects")):
            terms[site] = self.output.kl_local[f"kl_{name}"]
        return {site: value.numpy() for site, value in terms.items()}

    @torch.no_grad()
    def terms_of_pyro(self):
        """Mean of log q - log p over particles: of every cell, or perturbation (m and e)."""
        terms = {}
        for values in self.particles:
            fixed = poutine.replay(guide, trace=drawn(values))
            q = poutine.trace(fixed).get_trace(*self.arguments)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*self.arguments)
            for trace in (p, q):
                trace.compute_log_prob()
            for site in ("x", "z_basal", "m", "e"):
                log_q = q.nodes[site]["log_prob"] if site in q.nodes else 0
                terms.setdefault(site, []).append(log_q - p.nodes[site]["log_prob"])
        return {site: torch.stack(values).mean(0).numpy() for site, values in terms.items()}


def dense_doses(cells, n_perturbations):
    """Doses, (B, T)."""
    d = cells.x.new_zeros(len(cells.x), n_perturbations)
    for cell, slot in torch.argwhere(cells.codes >= 0):
        d[cell, cells.codes[cell, slot]] = cells.doses[cell, slot]
    return d


def drawn(values):
    """Trace of a guide that drew these values."""
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace


def in_float64(module, tensors):
    return module.double(), {key: value.double() for key, value in tensors.items()}


def make_whole_screen(correlated_basal, correlated_effects, **changes):
    """Build a module to which the cells of the builders are all there are: N_t counts them."""
    module = make_module(
        correlated_basal=correlated_basal, correlated_effects=correlated_effects, **changes
    )
    codes = make_tensors()[REGISTRY_KEYS.PERTURBATIONS].chunk(2, dim=1)[0]
    counts = [(codes == t).sum().item() for t in range(len(CELLS_PER_PERTURBATION))]
    module.cells_per_perturbation.copy_(torch.tensor(counts))
    return module


@ALL_VARIANTS
@pytest.mark.parametrize(("likelihood", "size_factor"), LIKELIHOODS)
@pytest.mark.parametrize("estimator", PYRO_ELBO)
def test_the_bound_of_a_screen(
    correlated_basal, correlated_effects, likelihood, size_factor, estimator
):
    """Controls, single perturbations and combinations, at various doses."""
    module = make_whole_screen(
        correlated_basal,
        correlated_effects,
        gene_likelihood=likelihood,
        uses_size_factor=size_factor,
        kl_estimator=estimator,
    )
    tensors = make_tensors(counts=likelihood != "normal", size_factor=size_factor)
    both = BothWays(*in_float64(module, tensors))
    assert both.elbo() == pytest.approx(both.elbo_of_pyro(), rel=1e-11)


@ALL_VARIANTS
@pytest.mark.parametrize("estimator", PYRO_ELBO)
def test_batches_and_covariates(correlated_basal, correlated_effects, estimator):
    """In float32, as covariates always are."""
    module = make_whole_screen(
        correlated_basal, correlated_effects, kl_estimator=estimator, **COVARIATE_SIZES
    )
    both = BothWays(module, make_tensors(covariates=True))
    assert both.elbo() == pytest.approx(both.elbo_of_pyro(), rel=1e-5)


@ALL_VARIANTS
@pytest.mark.parametrize("estimator", PYRO_ELBO)
def test_latent_dimensions_that_are_switched_off(correlated_basal, correlated_effects, estimator):
    module = make_whole_screen(correlated_basal, correlated_effects, kl_estimator=estimator)
    module.switch_off_latents(torch.tensor([False, True, False]))
    both = BothWays(*in_float64(module, make_tensors()))
    assert both.elbo() == pytest.approx(both.elbo_of_pyro(), rel=1e-11)


@ALL_VARIANTS
@pytest.mark.parametrize("cells", [slice(None), slice(1, 4), slice(0, 1)], ids=str)
def test_every_term_of_a_mini_batch(correlated_basal, correlated_effects, cells):
    """Pyro counts each cell N / B times; of m_t and e_t each pays the share 1 / N_t here."""
    module = make_module(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        kl_estimator="monte_carlo",
    )
    both = BothWays(*in_float64(module, take_cells(make_tensors(), cells)), N_CELLS)
    share = np.array([1 / n if n else 0 for n in CELLS_PER_PERTURBATION])
    carries = both.d.numpy() != 0
    for site, pyros in both.terms_of_pyro().items():
        expected = (
            carries @ (share * pyros) if site in ("m", "e") else pyros * len(both.d) / N_CELLS
        )
        np.testing.assert_allclose(
            both.terms()[site], expected, rtol=1e-11, atol=1e-12, err_msg=site
        )
