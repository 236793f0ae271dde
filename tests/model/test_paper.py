"""The settings of the paper: what is optimised, and how, against slow implementations."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from model.builders import TRAINING, small_screen
from module.reference import ReferenceELBO, recorded_draws
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus, paper_settings
from scvi_sams.exceptions import InvalidArgumentError

SMALL = {"n_latent": 3, "n_hidden": 8, "effect_n_hidden": 6}
MACHINE = {key: TRAINING[key] for key in ("accelerator", "devices", "enable_progress_bar")}
N_STEPS = 4
LR, EPS, WEIGHT_DECAY = 3e-4, 1e-8, 1e-6


class Recorder(Callback):
    """Keeps what every step began with and what it made of it."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        batch = {key: value.clone() for key, value in batch.items()}
        self.steps.append((copy.deepcopy(plan.module), batch, torch.get_rng_state()))

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        self.steps[-1] += (float(outputs["loss"]), copy.deepcopy(plan.module))


@pytest.fixture(scope="module")
def training():
    """A model that was trained as in the paper, and what was recorded of its steps."""
    adata = small_screen(n_controls=15, cells_per_perturbation=5, cells_per_combination=4)
    SAMSVAE.setup_anndata(adata)
    torch.manual_seed(0)
    paper = paper_settings(n_steps=N_STEPS)
    model = SAMSVAE(adata, **paper.model | SMALL)
    recorder = Recorder()
    model.train(**paper.train, **MACHINE, train_size=1.0, callbacks=[recorder])
    return model, recorder.steps


def test_every_term_of_the_objective_is_that_of_the_paper(training):
    """One cell and particle at a time, without anything that this package adds to the bound."""
    _, steps = training
    assert len(steps) == N_STEPS
    for before, batch, state, loss, _ in steps:
        torch.set_rng_state(state)
        with recorded_draws(before) as draws:
            output = before(batch)[2]
        assert len(draws.masks[0]) == 5  # particles
        reference = ReferenceELBO(before, batch, draws)
        assert not reference.closed_form
        for name, expected in reference.kl.items():
            found = output.kl_local[name].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=name)
        reconstruction = output.reconstruction_loss["reconstruction_loss"].detach().numpy()
        np.testing.assert_allclose(reconstruction, reference.reconstruction, rtol=1e-4)
        # The loss of the step, with the same random numbers, is the bound and nothing else.
        assert loss == pytest.approx(reference.loss, rel=1e-5)


def test_every_step_is_one_of_adam_at_a_constant_rate(training):
    """The textbook's update, from recorded gradients (too short to be clipped)."""
    _, steps = training
    tables = {id(table) for table in steps[0][0].table_parameters()}
    is_table = {name: id(p) in tables for name, p in steps[0][0].named_parameters()}
    assert 0 < sum(is_table.values()) < len(is_table)
    first = dict.fromkeys(is_table, 0.0)
    second = dict.fromkeys(is_table, 0.0)
    for number, (before, batch, state, _, after) in enumerate(steps, start=1):
        torch.set_rng_state(state)
        before.zero_grad()
        before(batch)[2].loss.backward()
        parameters = dict(before.named_parameters())
        gradients = {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}
        for name, gradient in gradients.items():
            value = parameters[name].detach().double()
            gradient += (0.0 if is_table[name] else WEIGHT_DECAY) * value
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            rate = first[name] / (1 - 0.9**number)
            scale = (second[name] / (1 - 0.999**number)).sqrt() + EPS
            expected = value - LR * rate / scale
            found = dict(after.named_parameters())[name].detach().double()
            # A hundredth of a step: gradients near EPS are rounded.
            torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * LR, msg=name)


def test_nothing_is_rotated_coarsened_or_switched_off(training):
    model, steps = training
    assert (model.history["dense_phase"] == 0).all(axis=None)
    assert (model.trainer.global_step, model.trainer.gradient_clip_val) == (N_STEPS, 100)
    module = steps[0][0]
    rows = torch.arange(len(model.perturbations))
    torch.testing.assert_close(module.evidence_weights(rows), torch.ones(len(rows)))
    assert torch.sigmoid(module.masks.logits).eq(0.5).all()
    # From the last step on only order and signs of the latents change.
    after, trained = steps[-1][-1].masks.logits, model.module.masks.logits
    torch.testing.assert_close(after.sort(dim=1).values, trained.sort(dim=1).values)


@pytest.mark.parametrize("model_class", [CPAVAE, SVAEPlus, ConditionalVAE])
def test_the_papers_comparators_have_their_settings(model_class):
    paper = paper_settings(model_class, n_steps=7)
    adata = small_screen()
    model_class.setup_anndata(adata)
    module = model_class(adata, **paper.model).module
    assert (module.n_particles, module.kl_estimator) == (5, "monte_carlo")
    assert (module.evidence_cells, module.global_kl_weight) == (None, 1)
    assert paper.train == paper_settings(SAMSVAE, n_steps=7).train
    assert paper.train["max_steps"] == 7


def test_settings_of_one_call_are_not_those_of_another():
    paper_settings().train["plan_kwargs"]["lr"] = 1.0
    paper_settings().model["n_latent"] = 1
    assert paper_settings().train["plan_kwargs"]["lr"] == LR
    assert paper_settings().model["n_latent"] == 50


@pytest.mark.parametrize("wrong", [None, "SAMSVAE", dict, 3])
def test_other_classes_raise_an_error(wrong):
    with pytest.raises(InvalidArgumentError, match="`model_class`"):
        paper_settings(wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, None])
def test_steps_that_are_no_number_raise_an_error(wrong):
    with pytest.raises(InvalidArgumentError, match="`n_steps`"):
        paper_settings(n_steps=wrong)
