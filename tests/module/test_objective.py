"""Weights, particles and estimators of the objective, and where its gradients go."""

import numpy as np
import pytest
import torch

from module.builders import (
    CODES,
    COVARIATE_SIZES,
    VARIANTS,
    make_module,
    make_tensors,
    score,
    take_cells,
)
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import TrainingStatistics

ALL_VARIANTS = pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
GLOBAL_TERMS = ("kl_masks", "kl_effects")
CONTROLS = [cell for cell, codes in enumerate(CODES) if max(codes) < 0]


def seeded(module, tensors, seed=0, **kwargs):
    torch.manual_seed(seed)
    return score(module, tensors, **kwargs)


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_weights_of_the_divergences(estimator):
    """``kl_weight`` scales all of them, ``global_kl_weight`` those of masks and effects."""
    tensors = make_tensors()
    losses = {}
    for global_weight in (1.0, 0.0, 4.0):
        module = make_module(kl_estimator=estimator, global_kl_weight=global_weight)
        for weight in (1.0, 0.0, 0.3):
            output = seeded(module, tensors, kl_weight=weight)
            losses[global_weight, weight] = output.loss.item()
    reconstruction = output.reconstruction_loss["reconstruction_loss"].mean().item()
    local = output.kl_local["kl_z_basal"].mean().item()
    shared = sum(output.kl_local[name].mean().item() for name in GLOBAL_TERMS)
    assert min(abs(local), abs(shared)) > 0.1
    for (global_weight, weight), loss in losses.items():
        expected = reconstruction + weight * (local + global_weight * shared)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_reported_terms_are_not_weighted():
    """The validation score is the ELBO whatever the weights."""
    tensors = make_tensors()
    plain = seeded(make_module(), tensors)
    weighted = seeded(make_module(global_kl_weight=4.0), tensors, kl_weight=0.3)
    for name, value in plain.kl_local.items():
        assert torch.equal(value, weighted.kl_local[name])


def test_no_global_weight_leaves_the_mask_prior_without_effect():
    tensors = make_tensors()
    losses = [
        seeded(make_module(global_kl_weight=0.0, mask_prior_probability=p), tensors).loss.item()
        for p in (0.01, 0.9)
    ]
    assert losses[0] == losses[1]


def test_evidence_of_many_cells_is_charged_more():
    """A single's divergence costs (1 + N_t / evidence_cells) / N_t; what is reported, 1 / N_t."""
    one_perturbation = [[0, -1, -1]]
    tensors = make_tensors(codes=one_perturbation, doses=[[1.0, 0, 0]])
    plain = seeded(make_module(), tensors)
    coarse = seeded(make_module(evidence_cells=26.0), tensors)
    shared = sum(plain.kl_local[name].item() for name in GLOBAL_TERMS)
    assert shared > 0.1
    # 13 cells count as 13 / (1 + 13 / 26): the divergence is charged 1.5 times.
    assert (coarse.loss - plain.loss).item() == pytest.approx(0.5 * shared, rel=1e-3)
    for name, value in plain.kl_local.items():
        assert torch.equal(value, coarse.kl_local[name])


def test_evidence_of_a_combination_is_charged_by_perturbation():
    tensors = make_tensors(codes=[[1, 2, -1]], doses=[[0.5, 1.5, 0]])
    module = make_module(evidence_cells=10.0)
    torch.manual_seed(0)
    draw = module.global_posterior(torch.tensor([1, 2]), module.n_particles)
    b, c = sum(kl.mean(0) for kl in draw.kl.values()).tolist()
    plain, coarse = (
        seeded(make_module(evidence_cells=cells), tensors).loss.item() for cells in (None, 10.0)
    )
    # N is 7 and 4; a tenth of each divergence comes on top of its share.
    assert coarse - plain == pytest.approx((b + c) / 10, rel=1e-3)
    assert module.evidence_weights(torch.tensor([1, 2, 4])).tolist() == pytest.approx([1.7, 1.4, 1])


# Particles and estimators -----------------------------------------------------------------------


def losses_over_seeds(module, tensors, n):
    with torch.no_grad():
        return np.array([seeded(module, tensors, seed=seed).loss.item() for seed in range(n)])


def gentle(module):
    """Small weights, so that the loss varies little between draws."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith(("masks", "likelihood")):
                parameter.mul_(0.3)
    return module


@ALL_VARIANTS
def test_expected_loss_does_not_depend_on_particles_or_estimator(
    correlated_basal, correlated_effects
):
    """One particle over many seeds, against many particles, with both estimates of divergences."""
    tensors = make_tensors()
    shared = {"correlated_basal": correlated_basal, "correlated_effects": correlated_effects}

    def losses(n_seeds, **changes):
        return losses_over_seeds(gentle(make_module(**shared, **changes)), tensors, n_seeds)

    one = losses(100, n_particles=1)
    many = losses(12, n_particles=400)
    estimated = losses(12, n_particles=400, kl_estimator="monte_carlo")
    assert many.std() < 0.2 * one.std()
    for sample in (one, estimated):
        error = np.hypot(sample.std(ddof=1) / np.sqrt(len(sample)), many.std(ddof=1) / np.sqrt(12))
        assert abs(sample.mean() - many.mean()) < 4.5 * error
        assert error < 0.02 * abs(many.mean())


def test_particles_of_a_call_override_those_of_training():
    module = make_module(n_particles=2)
    cells = module.read_batch(make_tensors())
    assert module.inference(cells)["z_basal"].shape[0] == 2
    assert module.inference(cells, n_particles=5)["z_basal"].shape[0] == 5


@ALL_VARIANTS
def test_importance_weights_average_to_the_elbo(correlated_basal, correlated_effects):
    """E_q[log p(x | z) + log p(z) - log q(z)] is minus the local terms, for a given shift."""
    module = gentle(
        make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    )
    n = 20_000
    cells = module.read_batch(make_tensors())
    torch.manual_seed(0)
    with torch.no_grad():
        shift = module.inference(cells, n_particles=1)["shift"].expand(n, -1, -1)
        noise = torch.randn(n, len(cells.x), module.n_latent)
        weights = module.log_importance_weights(cells, shift, noise)
        qz = module.encode(cells.x, shift[:1], cells.covariates)
        z_basal = qz.sample((n,))[:, 0]
        logits = module.decode(z_basal, shift, cells.covariates)
        log_px = module.likelihood.log_prob(cells.x, logits, cells.size)
        kl = torch.distributions.kl_divergence(qz, torch.distributions.Normal(0, 1)).sum(-1)[0]
    error = ((weights.var(0) + log_px.var(0)) / n).sqrt()
    assert ((weights.mean(0) - log_px.mean(0) + kl).abs() < 5 * error).all()


# Gradients --------------------------------------------------------------------------------------


def gradients_after(module, tensors, n_steps):
    """Gradients at the last of some steps of Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(n_steps):
        optimizer.zero_grad()
        seeded(module, tensors, seed=step).loss.backward()
        if step < n_steps - 1:
            optimizer.step()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@ALL_VARIANTS
@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_gradients_reach_every_parameter(
    correlated_basal, correlated_effects, likelihood, estimator
):
    """From the module's own start; a parameter left out would stop plain distributed training."""
    module = make_module(
        seed=None,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        gene_likelihood=likelihood,
        kl_estimator=estimator,
        n_layers=2,
        **COVARIATE_SIZES,
    )
    module.cells_per_perturbation.fill_(3)
    tensors = make_tensors(counts=likelihood != "normal", covariates=True)
    gradients = gradients_after(module, tensors, n_steps=2)
    dead = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    assert dead == []
    assert all(torch.isfinite(grad).all() for grad in gradients.values())
    assert (gradients["masks.logits"] != 0).any(dim=1).all()


@ALL_VARIANTS
def test_the_likelihood_moves_the_masks(correlated_basal, correlated_effects):
    """Through the straight-through draws: without the divergences, which have their own way."""
    module = make_module(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
    )
    seeded(module, make_tensors(), kl_weight=0.0).loss.backward()
    gradient = module.masks.logits.grad
    assert (gradient != 0).all()
    assert torch.isfinite(gradient).all()


@ALL_VARIANTS
def test_gradients_of_the_phase_with_all_masks_on(correlated_basal, correlated_effects):
    """Masks stay where they are, but are not left out of the graph."""
    module = make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    module.begin_dense_phase()
    gradients = gradients_after(module, make_tensors(), n_steps=1)
    dead = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    assert dead == ["masks.logits"]
    assert torch.equal(gradients["masks.logits"], torch.zeros(5, 3))


@ALL_VARIANTS
def test_only_rows_of_the_batch_have_gradients(correlated_basal, correlated_effects):
    module = make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    gradients = gradients_after(module, take_cells(make_tensors(), [0, 1, 3]), n_steps=1)
    tables = ["masks.logits"]
    tables += ["effects.from_perturbation.weight"] if correlated_effects else ["effects.loc"]
    for name in tables:
        moved = (gradients[name] != 0).any(dim=1)
        assert moved.tolist() == [True, False, True, False, False]


@ALL_VARIANTS
@pytest.mark.parametrize("concentration", [None, 2.0])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_a_batch_of_controls(correlated_basal, correlated_effects, concentration, estimator):
    module = make_module(
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        mask_prior_concentration=concentration,
        kl_estimator=estimator,
    )
    output = seeded(module, take_cells(make_tensors(), CONTROLS))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name in GLOBAL_TERMS:
        assert torch.equal(output.kl_local[name], torch.zeros(len(CONTROLS)))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name.startswith(("masks", "effects", "encoder.from_shift")):
            assert not parameter.grad.any(), name
    assert module.decoder.to_genes.weight.grad.any()


@ALL_VARIANTS
def test_a_gene_that_never_varies_gives_no_nan(correlated_basal, correlated_effects):
    """One particle, and as many cells as genes: each has broken an implementation before."""
    module = make_module(
        seed=None,
        n_particles=1,
        n_genes=7,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
    )
    tensors = make_tensors(n_genes=7)
    x = tensors[REGISTRY_KEYS.X]
    x[:, 2], x[:, 4] = 0, 3
    assert x.shape == (7, 7)
    scaled = x / x.sum(dim=1, keepdim=True)
    module.set_training_statistics(
        TrainingStatistics(
            n_cells=len(x),
            cells_per_perturbation=torch.tensor([2.0, 2, 2, 1, 1]),
            input_mean=x.log1p().mean(0),
            input_sd=x.log1p().std(0, correction=0),
            scaled_mean=scaled.mean(0),
            scaled_variance=scaled.var(0, correction=0),
            inverse_size_mean=(1 / x.sum(dim=1)).mean().item(),
            cell_sizes=torch.ones(2, 3) / 3,
        )
    )
    gradients = gradients_after(module, tensors, n_steps=3)
    assert torch.isfinite(seeded(module, tensors).loss)
    assert all(torch.isfinite(grad).all() for grad in gradients.values())


@ALL_VARIANTS
def test_certain_masks_are_finite(correlated_basal, correlated_effects):
    module = make_module(correlated_basal=correlated_basal, correlated_effects=correlated_effects)
    with torch.no_grad():
        module.masks.logits[:, 0], module.masks.logits[:, 1] = 50.0, -50.0
    gradients = gradients_after(module, make_tensors(), n_steps=1)
    assert all(torch.isfinite(grad).all() for grad in gradients.values())


@ALL_VARIANTS
@pytest.mark.parametrize("dose", [0.001, 100.0, 10_000.0])
def test_doses_in_the_units_of_a_drug_screen(correlated_basal, correlated_effects, dose):
    """Such as 10 to 10,000 nM: the first step must not end in NaN."""
    module = make_module(
        seed=None,
        n_latent=20,
        n_hidden=100,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
    )
    tensors = make_tensors()
    tensors[REGISTRY_KEYS.PERTURBATIONS][:, 3:] *= dose
    gradients = gradients_after(module, tensors, n_steps=1)
    assert all(torch.isfinite(grad).all() for grad in gradients.values())


# Draws from the posterior predictive ------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
def test_posterior_predictive_mean(likelihood):
    """Draws average to the mean at the decoder's output, over the same basal states and shifts."""
    module = gentle(make_module(gene_likelihood=likelihood))
    tensors = make_tensors(counts=likelihood != "normal")
    n = 20_000
    torch.manual_seed(1)
    with torch.no_grad():
        draws = module.sample(tensors, n_samples=n)
        cells = module.read_batch(tensors)
        outputs = module.inference(cells, n_particles=n)
        logits = module.decode(outputs["z_basal"], outputs["shift"], cells.covariates)
        means = module.likelihood.mean(logits, cells.size)
    assert draws.shape == (n, *cells.x.shape)
    error = ((draws.var(0) + means.var(0)) / n).sqrt()
    assert ((draws.mean(0) - means.mean(0)).abs() < 5 * error).all()
