"""What training logs: means over the cells of an epoch, of which Lightning is told once."""

from collections import Counter

import lightning
import numpy as np
import pytest
import torch

from scvi_sams.train import PerturbationTrainingPlan
from train.screens import make_model, make_screen

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
TERMS = ["loss", "elbo", "reconstruction_loss", "kl_local", "kl_z_basal", "kl_masks", "kl_effects"]
BATCH_SIZE = 64
"""Training and validation have a smaller last batch: means over batches would differ."""


@pytest.fixture(scope="module")
def screen():
    return make_screen()


class Record(lightning.Callback):
    """Notes what other callbacks of the user would see when an epoch has been trained."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, plan):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def sums_of_batches(monkeypatch):
    """Sums over the cells of each mini-batch, by whether it is one of training, as they come."""
    batches = {"train": [], "validation": []}
    original = PerturbationTrainingPlan.compute_and_log_metrics

    def noted(self, output, metrics, mode):
        n_cells = len(output.reconstruction_loss["reconstruction_loss"])
        terms = {name: values.sum().item() for name, values in output.kl_local.items()}
        terms["kl_local"] = sum(terms.values())
        terms["reconstruction_loss"] = (
            output.reconstruction_loss["reconstruction_loss"].sum().item()
        )
        terms["elbo"] = terms["kl_local"] + terms["reconstruction_loss"]
        terms["loss"] = output.loss.item() * n_cells
        if not self.trainer.sanity_checking:
            batches[mode].append((self.current_epoch, n_cells, terms))
        original(self, output, metrics, mode)

    monkeypatch.setattr(PerturbationTrainingPlan, "compute_and_log_metrics", noted)
    return batches


def mean_over_cells(batches, epoch, term):
    of_epoch = [(n_cells, terms) for at, n_cells, terms in batches if at == epoch]
    return sum(terms[term] for _, terms in of_epoch) / sum(n_cells for n_cells, _ in of_epoch)


def name_in_history(term, part):
    parts = {"train": "train_loss", "validation": "validation_loss"}
    return parts[part] if term == "loss" else f"{term}_{part}"


@pytest.mark.parametrize("part", ["train", "validation"])
def test_history_has_the_means_over_the_cells_of_each_epoch(screen, monkeypatch, part):
    batches = sums_of_batches(monkeypatch)[part]
    model, record = make_model(screen), Record()
    model.train(max_epochs=3, batch_size=BATCH_SIZE, train_size=0.7, callbacks=[record], **QUIET)
    sizes = Counter(n_cells for _, n_cells, _ in batches)
    assert min(sizes) < max(sizes) == BATCH_SIZE
    for term in TERMS:
        name = name_in_history(term, part)
        expected = [mean_over_cells(batches, epoch, term) for epoch in range(3)]
        history = model.history[name][name]
        np.testing.assert_allclose(history.astype(float), expected, rtol=1e-5, err_msg=name)
        assert history.index.tolist() == [0, 1, 2]
        np.testing.assert_allclose([seen[name] for seen in record.seen], expected, rtol=1e-5)


class StopIn(lightning.Callback):
    """Ends training in the middle of an epoch, as Ctrl-C does."""

    def on_train_batch_end(self, trainer, plan, outputs, batch, batch_idx):
        trainer.should_stop = trainer.current_epoch == 1 and batch_idx == 1


def test_an_epoch_that_is_cut_short_is_logged(screen, monkeypatch):
    batches = sums_of_batches(monkeypatch)["train"]
    model = make_model(screen)
    model.train(max_epochs=3, batch_size=BATCH_SIZE, callbacks=[StopIn()], **QUIET)
    assert [epoch for epoch, _, _ in batches].count(1) == 2
    expected = [mean_over_cells(batches, epoch, "elbo") for epoch in (0, 1)]
    np.testing.assert_allclose(model.history["elbo_train"].iloc[:, 0].astype(float), expected, 1e-5)


def calls_of_log(monkeypatch):
    calls = Counter()
    original = lightning.LightningModule.log

    def counted(self, name, *args, **kwargs):
        calls[name] += 1
        original(self, name, *args, **kwargs)

    monkeypatch.setattr(lightning.LightningModule, "log", counted)
    return calls


def test_lightning_is_told_of_each_mean_once_an_epoch(screen, monkeypatch):
    calls = calls_of_log(monkeypatch)
    make_model(screen).train(max_epochs=3, batch_size=16, train_size=1.0, **QUIET)
    names = ["kl_weight", "train_loss", "elbo_train", "kl_masks_train", "dense_phase"]
    assert {name: calls[name] for name in names} == dict.fromkeys(names, 3)


def test_steps_are_logged_where_that_is_asked_for(screen, monkeypatch):
    calls = calls_of_log(monkeypatch)
    model = make_model(screen)
    model.train(max_epochs=2, batch_size=16, train_size=1.0, plan_kwargs={"on_step": True}, **QUIET)
    n_steps = 2 * -(-screen.n_obs // 16)
    assert len(model.history["train_loss_step"]) == n_steps
    assert calls["train_loss"] == calls["kl_masks_train"] == n_steps
    assert len(model.history["train_loss_epoch"]) == 2


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        ({}, [1.0] * 8),
        ({"n_epochs_kl_warmup": 2}, [0.0] * 4 + [0.5] * 4),
        ({"n_steps_kl_warmup": 16}, [step / 16 for step in range(8)]),
    ],
    ids=["none", "epochs", "steps"],
)
def test_weight_of_divergences_in_each_step(monkeypatch, warmup, expected):
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(float(trainer.callback_metrics["kl_weight"]))

    screen = make_screen()[:64].copy()
    torch.manual_seed(0)
    make_model(screen).train(
        max_epochs=2,
        batch_size=16,
        train_size=1.0,
        callbacks=[Watch()],
        plan_kwargs=warmup,
        **QUIET,
    )
    assert seen == pytest.approx(expected)
