"""Ctrl-C ends training cleanly, with a model that can be used."""

import contextlib
import logging
import signal
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from model.builders import TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.train import interrupts_raise

N_EPOCHS = 6


class PressCtrlC(Callback):
    """In an epoch (from 0), in the middle of its steps."""

    def __init__(self, epoch, times=1):
        self.epoch = epoch
        self.times = times

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def model():
    # In the background of a shell script, Ctrl-C is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield untrained()
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def untrained():
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    return SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8)


def train(model, *callbacks):
    model.train(
        max_epochs=N_EPOCHS,
        callbacks=list(callbacks),
        **(TRAINING | {"batch_size": 32, "plan_kwargs": {}}),
    )


# Half of the epochs are dense.
@pytest.mark.parametrize("epoch", [1, 4], ids=["dense", "with masks"])
def test_it_ends_training_with_a_usable_model(model, epoch, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        train(model, PressCtrlC(epoch))
    assert f"epoch {epoch + 1} of {N_EPOCHS}" in caplog.text
    assert len(model.history["elbo_train"]) == epoch + 1
    assert model.is_trained
    assert not model.module.training
    assert not model.module.masks.is_dense
    norms = model.get_perturbation_effects(key_added=None).mean.pow(2).sum()
    assert np.isfinite(norms).all()
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", model.adata, accelerator="cpu")
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )
    train(model)
    assert len(model.history["elbo_train"]) == epoch + 1 + N_EPOCHS


def test_pressed_twice_it_ends_at_once_with_the_weights_before(model):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    # Lightning ends the program.
    with pytest.raises(SystemExit):
        train(model, PressCtrlC(4, times=2))
    assert not model.is_trained
    assert not model.module.training
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    train(model)
    assert model.is_trained


def test_another_meaning_of_ctrl_c_is_left_as_it_is(model):
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        train(model, PressCtrlC(1))
        assert pressed == [True]
        assert len(model.history["elbo_train"]) == N_EPOCHS
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def swallow(model):
    """Train in code that lets nothing through."""
    try:
        train(model, PressCtrlC(1))
    except BaseException as error:  # noqa: BLE001
        return error
    return None


def train_three_times(model, depth):
    with contextlib.ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(interrupts_raise())
        for _ in range(3):
            train(model, PressCtrlC(1))


@pytest.mark.parametrize("depth", [1, 2])
def test_in_a_loop_ctrl_c_raises_and_the_weights_are_those_before(model, depth):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        train_three_times(model, depth)
    assert not model.is_trained
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_in_a_loop_an_interrupt_that_was_swallowed_is_raised_again(model):
    with pytest.raises(KeyboardInterrupt), interrupts_raise():
        assert isinstance(swallow(model), SystemExit)


def test_without_an_interrupt_errors_pass_and_ctrl_c_has_its_meaning_back(model):
    with pytest.raises(ZeroDivisionError), interrupts_raise():
        raise ZeroDivisionError
    with interrupts_raise():
        train(model)
    assert model.is_trained


def test_in_another_thread_nothing_is_changed():
    handlers = []

    def look():
        with interrupts_raise():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert handlers == [before]
