"""What modules do on an accelerator, run on a processor: the same numbers, and no questions.

An accelerator that is asked for a number is waited for, and stands idle. Whether it is asked is
seen with tensors that have no values, which raise an error where a size or a branch needs one.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from module.builders import (
    CODES,
    COVARIATE_SIZES,
    DOSES,
    LIKELIHOODS,
    N_GENES,
    VARIANTS,
    make_module,
    make_tensors,
    score,
)
from scvi_sams.module import (
    ConditionalVAEModule,
    CPAVAEModule,
    SAMSVAEModule,
    SVAEPlusModule,
    perturbations_of_batch,
)
from scvi_sams.module._rising_factorial import TABLE_SIZE

ONE_EACH = [[-1], [0], [1], [3], [4], [2]]
MODELS = {
    "SAMS-VAE": (SAMSVAEModule, {}),
    "SAMS-VAE, Monte Carlo": (SAMSVAEModule, {"kl_estimator": "monte_carlo"}),
    "SAMS-VAE, Beta prior": (SAMSVAEModule, {"mask_prior_concentration": 5.0}),
    "SAMS-VAE, Beta prior, Monte Carlo": (
        SAMSVAEModule,
        {"mask_prior_concentration": 5.0, "kl_estimator": "monte_carlo"},
    ),
    **{
        f"SAMS-VAE {basal} {effects}": (
            SAMSVAEModule,
            {"correlated_basal": basal, "correlated_effects": effects, "evidence_cells": 50.0},
        )
        for basal, effects in VARIANTS
    },
    "SAMS-VAE, responses": (SAMSVAEModule, {"responses": True}),
    "CPA-VAE": (CPAVAEModule, {}),
    "SVAE+": (SVAEPlusModule, {}),
    "conditional VAE": (ConditionalVAEModule, {}),
}
EVERY_MODEL = pytest.mark.parametrize("name", list(MODELS))


def pretend(monkeypatch, is_accelerator=True):
    monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: is_accelerator)


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch):
    pretend(monkeypatch)


def make(name, **changes):
    module_cls, settings = MODELS[name]
    return begun(make_module(module_cls, seed=None, **(settings | changes)))


def begun(module):
    """Where cells may escape, they may."""
    if module.responses is not None:
        module.responses.switch_on(True)
    return module


def tensors_of(name, **kwargs):
    one_each = name == "SVAE+"
    codes, doses = (
        (ONE_EACH, [[float(c[0] >= 0)] for c in ONE_EACH]) if one_each else (CODES, DOSES)
    )
    return make_tensors(codes=codes, doses=doses, **kwargs)


def step_without_values(name, n_perturbations, likelihood=("nb", False), **changes):
    gene_likelihood, uses_size_factor = likelihood
    tensors = tensors_of(
        name, covariates=True, counts=gene_likelihood != "normal", size_factor=uses_size_factor
    )
    with FakeTensorMode() as without_values:
        module = make(
            name,
            n_perturbations=n_perturbations,
            gene_likelihood=gene_likelihood,
            uses_size_factor=uses_size_factor,
            **COVARIATE_SIZES,
            **changes,
        )
        batch = {key: without_values.from_tensor(value) for key, value in tensors.items()}
        # Training knows them, of counts on both sides of the end of the table.
        module.likelihood.largest_counts = np.linspace(0, 2 * TABLE_SIZE, N_GENES)
        output = score(module, batch)
        output.loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        with pytest.raises(DataDependentOutputException):
            output.loss.item()


@EVERY_MODEL
@pytest.mark.parametrize("n_perturbations", [5, 1000])
def test_a_step_asks_nothing(name, n_perturbations):
    step_without_values(name, n_perturbations)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_step_asks_nothing_with_any_likelihood(likelihood):
    step_without_values("SAMS-VAE", 5, likelihood)


def loss_and_gradients(name, seed=3, **changes):
    module_cls, settings = MODELS[name]
    module = begun(make_module(module_cls, **(settings | changes)))
    torch.manual_seed(seed)
    output = score(module, tensors_of(name))
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in module.named_parameters()}


@EVERY_MODEL
def test_objective_and_gradients_are_those_of_a_processor(name, monkeypatch):
    """The mini-batch has all perturbations, so that both draw for the same ones."""
    # Which a processor leaves out of gradients.
    monkeypatch.setattr("scvi_sams.module._branched_likelihood._NO_WEIGHT", 0.0)
    loss, gradients = loss_and_gradients(name)
    pretend(monkeypatch, False)
    expected, expected_gradients = loss_and_gradients(name)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-5, msg=parameter
        )


@pytest.mark.parametrize("n_perturbations", [5, 22, 1000])
def test_what_a_cell_pays_for_its_perturbations_is_the_same(n_perturbations, monkeypatch):
    """With rows that no cell asks for; nothing of the divergences is drawn here."""

    def costs():
        changes = {"correlated_effects": False, "n_perturbations": n_perturbations}
        module = make_module(SAMSVAEModule, **changes)
        module.cells_per_perturbation.copy_(torch.arange(n_perturbations) + 1)
        outputs = module.inference(module.read_batch(make_tensors()))
        total = sum(kl.mean(0) for kl in outputs["global_kl"].values())
        total.sum().backward()
        return total.detach(), module.effects.loc.grad, module.masks.logits.grad

    found = costs()
    pretend(monkeypatch, False)
    for value, expected in zip(found, costs(), strict=True):
        torch.testing.assert_close(value, expected)
    assert (found[1][5:] == 0).all()
    assert (found[1][:5] != 0).any(dim=1).all()


def test_rows_are_as_many_as_there_can_be():
    """As many as slots, or all perturbations where they are fewer: known without a look."""
    codes = torch.tensor([[7, -1], [-1, -1], [3, 7]])
    rows, slots = perturbations_of_batch(codes, 900)
    assert len(rows) == 6
    assert rows[slots[codes >= 0]].tolist() == [7, 3, 7]
    assert rows.max() < 900
    assert (slots[codes < 0] == 6).all()
    codes = codes.clamp(max=5)
    rows, slots = perturbations_of_batch(codes, 6)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(slots[codes >= 0], codes[codes >= 0])
    assert (slots[codes < 0] == 6).all()


@pytest.mark.parametrize("n_perturbations", [3, 900])
def test_rows_of_controls_alone(n_perturbations):
    codes = torch.full((4, 1), -1)
    rows, slots = perturbations_of_batch(codes, n_perturbations)
    assert ((rows >= 0) & (rows < n_perturbations)).all()
    assert (slots == len(rows)).all()
