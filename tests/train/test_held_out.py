"""Trainings that held-out cells end: which weights go on, at what rates, and what is on record."""

import logging
import signal

import lightning
import numpy as np
import pytest
import torch

from scvi_sams import CPAVAE
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.module import SAMSVAEModule
from scvi_sams.train import _plan
from train.screens import SMALL_MODEL, make_model, make_screen

pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "devices": 1, "train_size": 0.8}
LR = 5e-3


class Weights(lightning.Callback):
    """Notes the weights after each epoch, before anything is decided, and where masks begin."""

    def __init__(self):
        self.after, self.rotated = [], None

    def on_train_epoch_end(self, trainer, plan):
        state = plan.module.state_dict()
        self.after.append({name: value.clone() for name, value in state.items()})


def train(model, **changes):
    torch.manual_seed(0)
    settings = QUIET | {"batch_size": 32, "plan_kwargs": {"lr": LR}} | changes
    model.train(**settings)
    return model


def scores_of(model):
    names = ("reconstruction_loss_validation", "kl_z_basal_validation")
    return sum(model.history[name].to_numpy(dtype=float).ravel() for name in names)


def curve(model, name):
    return model.history[name].to_numpy(dtype=float).ravel()


def assert_same(found, expected, names=None):
    # Direct effects are fitted to the weights when training has ended.
    trained = [name for name in expected if not name.startswith("direct.")]
    for name in names or trained:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def screen():
    return make_screen()


@pytest.fixture(scope="module")
def trained(screen):
    """A training, its weights after each epoch, those that were rotated, and its log."""
    patch = pytest.MonkeyPatch()
    watch, log = Weights(), []
    end_dense_phase = _plan.end_dense_phase

    def note(module, *args):
        watch.rotated = {name: value.clone() for name, value in module.state_dict().items()}
        end_dense_phase(module, *args)

    class Handler(logging.Handler):
        def emit(self, record):
            log.append((record.levelname, record.getMessage()))

    handler = Handler()
    patch.setattr(_plan, "end_dense_phase", note)
    patch.setattr(SAMSVAEModule, "order_latents", lambda self: None)
    logging.getLogger("scvi.sams").addHandler(handler)
    try:
        model = train(make_model(screen), callbacks=[watch])
    finally:
        logging.getLogger("scvi.sams").removeHandler(handler)
        patch.undo()
    return model, watch, log


def test_the_best_dense_weights_are_rotated(trained):
    model, watch, _ = trained
    n_dense = int(curve(model, "dense_phase").sum())
    best = scores_of(model)[:n_dense].argmin()
    assert best < n_dense - 1
    assert_same(watch.rotated, watch.after[best])


def test_training_ends_with_the_best_weights_with_masks(trained):
    model, watch, _ = trained
    n_dense = int(curve(model, "dense_phase").sum())
    best = n_dense + scores_of(model)[n_dense:].argmin()
    assert_same(model.module.state_dict(), watch.after[best])
    assert not model.module.masks.is_dense


def test_rates_are_full_then_half_then_fall_to_zero(trained):
    model, _, _ = trained
    rates = curve(model, "learning_rate") / LR
    is_dense = curve(model, "dense_phase") == 1
    # What an epoch ends with is the rate of the step that follows.
    dense = rates[is_dense]
    n_full = int(np.isclose(dense, 1.0, rtol=1e-6).sum())
    assert 5 <= n_full <= len(dense) - 5
    np.testing.assert_allclose(dense, np.where(np.arange(len(dense)) < n_full, 1.0, 0.5), rtol=1e-6)
    later = rates[~is_dense]
    n_masks = int(np.isclose(later, 0.5, rtol=1e-6).sum())
    assert n_masks >= 5  # epochs of 7 steps, of which a score waits for 30
    np.testing.assert_allclose(later[:n_masks], 0.5, rtol=1e-6)
    assert (np.diff(later[n_masks:]) < 0).all()
    assert later[-1] == pytest.approx(0.0, abs=1e-12)


def test_log_history_and_provenance_say_why_it_ended(trained):
    model, _, log = trained
    (record,) = model.provenance["trainings"]
    n_epochs = len(model.history["elbo_train"])
    assert record["n_epochs"] == n_epochs < model.trainer.max_epochs
    reasons = [text for level, text in log if "stage of training ended" in text and level == "INFO"]
    assert [text.split()[1] for text in reasons] == ["dense", "settling", "masks", "decay"]
    assert record["ending"] == " ".join(reasons)
    n_dense = int(curve(model, "dense_phase").sum())
    assert f"ended after epoch {n_dense}," in reasons[1]
    assert f"scored best after epoch {scores_of(model)[:n_dense].argmin() + 1} (" in reasons[1]
    assert f"ended after epoch {n_epochs}, as the learning rates fell to zero" in reasons[3]
    assert record["settings"]["plan_kwargs"] == {"lr": LR, "lr_schedule": "held_out"}


def test_a_model_without_masks_has_one_phase(screen):
    CPAVAE.setup_anndata(screen)
    watch = Weights()
    model = CPAVAE(screen, **{k: v for k, v in SMALL_MODEL.items() if "effect" not in k})
    train(model, callbacks=[watch], plan_kwargs={"lr": LR})
    ending = model.provenance["trainings"][-1]["ending"]
    assert "The steady stage" in ending
    assert "The dense stage" not in ending
    rates = curve(model, "learning_rate") / LR
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    best = watch.after[scores_of(model).argmin()]
    assert_same(model.module.state_dict(), best, [name for name in best if "to_genes" in name])


def test_a_second_training_has_no_dense_stage(screen):
    model = train(make_model(screen), max_epochs=2)
    train(model)
    first, second = model.provenance["trainings"]
    assert first["ending"] == "All planned epochs were trained."
    assert (first["n_epochs"], "lr_schedule" in first["settings"]["plan_kwargs"]) == (2, False)
    assert second["ending"].startswith("The steady stage")
    assert second["n_epochs"] == len(model.history["elbo_train"]) - 2
    assert curve(model, "dense_phase").sum() == 1


def test_a_ceiling_of_the_user_holds(screen):
    model = train(
        make_model(screen), max_epochs=9, plan_kwargs={"lr": 1e-5, "lr_schedule": "held_out"}
    )
    assert len(model.history["elbo_train"]) == 9
    assert curve(model, "dense_phase").sum() == 4
    assert "share of 9 epochs" in model.provenance["trainings"][-1]["ending"]


def test_scores_of_every_third_epoch_are_enough(screen):
    model = train(make_model(screen), trainer_config={"check_val_every_n_epoch": 3})
    n_dense = int(curve(model, "dense_phase").sum())
    assert n_dense % 3 == 0
    assert "as the learning rates fell to zero" in model.provenance["trainings"][-1]["ending"]


class PressCtrlC(lightning.Callback):
    """In an epoch after that in which masks began."""

    def __init__(self, n_later):
        self.n_later = n_later

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        self.n_later -= batch_idx == 0 and not plan.module.masks.is_dense
        if self.n_later < 0 and batch_idx == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("n_later", [0, 5])
def test_ctrl_c_ends_with_the_best_weights_so_far(screen, monkeypatch, n_later):
    monkeypatch.setattr(SAMSVAEModule, "order_latents", lambda self: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = Weights()
    try:
        model = train(make_model(screen), callbacks=[PressCtrlC(n_later), watch])
    finally:
        signal.signal(signal.SIGINT, before)
    n_dense = int(curve(model, "dense_phase").sum())
    later = scores_of(model)[n_dense:]
    assert not model.module.masks.is_dense
    assert model.provenance["trainings"][-1]["ending"].endswith("Interrupted.")
    assert len(later) == n_later + 1
    assert_same(model.module.state_dict(), watch.after[n_dense + later.argmin()])


@pytest.mark.parametrize(
    "planned",
    [
        {"train_size": 1.0},
        {"early_stopping": True},
        {"plan_kwargs": {"lr_schedule": "constant"}},
        {"plan_kwargs": {"dense_fraction": 0.3}},
        {"plan_config": {"reduce_lr_on_plateau": True}},
    ],
    ids=lambda planned: next(iter(planned)),
)
def test_otherwise_a_number_is_planned(screen, planned):
    model = train(make_model(screen), **({"plan_kwargs": None, "max_steps": 7} | planned))
    assert model.trainer.max_epochs == 100
    assert "learning_rate" not in model.history


@pytest.mark.parametrize("plan", [{}, {"lr_schedule": "held_out"}, {"dense_fraction": 0.0}])
def test_the_ceiling_is_ten_times_that_number(screen, plan):
    model = train(make_model(screen), max_steps=1, plan_kwargs=plan)
    assert model.trainer.max_epochs == 1000


def test_a_data_module_without_validation_cells_is_refused(screen):
    """Also where the split becomes known only when training begins."""

    class Late(lightning.LightningDataModule):
        adata_manager = None

        def setup(self, stage):
            self.train_idx = np.arange(100)

        def train_dataloader(self):
            raise AssertionError

    model = make_model(screen)
    late = Late()
    late.adata_manager = model.adata_manager
    with pytest.raises(InvalidSplitError, match="no validation cells"):
        train(model, max_epochs=9, datamodule=late, plan_kwargs={"lr_schedule": "held_out"})
    assert not model.is_trained
