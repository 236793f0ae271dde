"""A training whose process is killed goes on from its last epoch, to the very same weights."""

import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import scvi
import torch
from lightning.pytorch import Callback

from model.builders import TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.train._interruption import keep_state, restore_state

N_EPOCHS = 6
KILLED = """
import os
import random
import signal
import sys
from types import SimpleNamespace

import anndata
import scvi
from lightning.pytorch import Callback

from scvi_sams import SAMSVAE


class Kill(Callback):
    # At any step after the first epoch, of five, and its end, when the file is written.
    step = random.randrange(6, 30)

    def on_train_batch_end(self, trainer, plan, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


folder = sys.argv[1]
scvi.settings.seed = 3
adata = anndata.read_h5ad(folder + "/screen.h5ad")
SAMSVAE.setup_anndata(adata)
model = SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8)
model.train(
    max_epochs=6, batch_size=32, accelerator="cpu", devices=1, enable_progress_bar=False,
    checkpoint_path=folder + "/run.ckpt", callbacks=[Kill()],
)
"""


class Stop(Callback):
    """Fail in an epoch (from 0), in the middle of its steps."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise ZeroDivisionError


@pytest.fixture(autouse=True)
def no_seed_afterwards():
    yield
    scvi.settings.seed = None


def untrained(adata=None):
    scvi.settings.seed = 3
    adata = small_screen() if adata is None else adata
    SAMSVAE.setup_anndata(adata)
    return SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8)


def train(model, path=None, *callbacks, **changes):
    settings = TRAINING | {"batch_size": 32, "plan_kwargs": {}, "max_epochs": N_EPOCHS} | changes
    model.train(checkpoint_path=path, callbacks=list(callbacks), **settings)
    return model


def stopped(path, epoch, adata=None):
    with pytest.raises(ZeroDivisionError):
        train(untrained(adata), path, Stop(epoch))
    assert path.exists()


def assert_same_weights(found, expected):
    for name, value in expected.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name


@pytest.fixture(scope="module")
def whole():
    return train(untrained())


def test_a_killed_process_changes_nothing(whole, tmp_path):
    small_screen().write_h5ad(tmp_path / "screen.h5ad")
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / "run.ckpt").exists()
    resumed = untrained()
    torch.manual_seed(99)
    train(resumed, tmp_path / "run.ckpt")
    assert_same_weights(resumed, whole)
    assert resumed.is_trained
    assert not list(tmp_path.glob("run.ckpt*"))


# 3 is the first epoch with masks, before which the latent space is rotated.
@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 5])
def test_it_goes_on_from_any_epoch_to_the_same_weights(whole, tmp_path, epoch):
    path = tmp_path / "run.ckpt"
    stopped(path, epoch)
    resumed = untrained()
    torch.manual_seed(99)
    train(resumed, path)
    assert_same_weights(resumed, whole)
    assert len(resumed.history["elbo_train"]) == N_EPOCHS - epoch
    assert not path.exists()


@pytest.fixture(scope="module")
def ended_by_held_out_cells():
    return train(untrained(), max_epochs=None)


@pytest.mark.parametrize("stage", ["dense", "settling", "masks", "decay"])
def test_it_goes_on_from_any_stage_that_held_out_cells_end(
    ended_by_held_out_cells, tmp_path, stage
):
    """From its start, with what was decided just before."""
    whole = ended_by_held_out_cells
    ending = whole.trainings_[-1]["ending"]
    ends = [int(epoch) for epoch in re.findall(r"ended after epoch (\d+)", ending)]
    epoch = dict(zip(["settling", "masks", "decay"], ends[:3], strict=True)).get(stage, 2)
    path = tmp_path / "run.ckpt"
    with pytest.raises(ZeroDivisionError):
        train(untrained(), path, Stop(epoch), max_epochs=None)
    resumed = untrained()
    torch.manual_seed(99)
    train(resumed, path, max_epochs=None)
    assert_same_weights(resumed, whole)
    assert resumed.trainings_[-1]["ending"] == ending


def test_it_goes_on_where_expression_is_on_disk(tmp_path):
    small_screen().write_h5ad(tmp_path / "screen.h5ad")
    whole = train(untrained(open_screen(tmp_path / "screen.h5ad")))
    path = tmp_path / "run.ckpt"
    stopped(path, 4, open_screen(tmp_path / "screen.h5ad"))
    resumed = train(untrained(open_screen(tmp_path / "screen.h5ad")), path)
    assert_same_weights(resumed, whole)


def test_a_training_that_ends_leaves_no_file(tmp_path):
    first = train(untrained(), tmp_path / "run.ckpt", max_epochs=2)
    assert first.is_trained
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_can_go_on(whole, tmp_path):
    class PressCtrlC(Stop):
        def on_train_batch_start(self, trainer, plan, batch, batch_idx):
            if trainer.current_epoch == self.epoch and batch_idx == 1:
                signal.raise_signal(signal.SIGINT)

    path = tmp_path / "run.ckpt"
    assert train(untrained(), path, PressCtrlC(4)).is_trained
    resumed = train(untrained(), path)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    "change",
    [{"max_epochs": 8}, {"train_size": 0.7}, {"plan_kwargs": {"lr_schedule": "held_out"}}],
    ids=str,
)
def test_the_file_of_another_training_is_refused(tmp_path, change):
    path = tmp_path / "run.ckpt"
    stopped(path, 2)
    with pytest.raises(InvalidArgumentError, match="another training"):
        train(untrained(), path, **change)
    assert path.exists()


def test_a_path_that_is_none_is_refused():
    with pytest.raises(InvalidArgumentError, match="checkpoint_path"):
        train(untrained(), 5)


def test_the_file_of_another_number_of_processes_is_refused():
    def trainer(n_processes):
        return SimpleNamespace(
            max_epochs=6,
            world_size=n_processes,
            global_rank=0,
            datamodule=SimpleNamespace(train_idx=[0, 1, 2]),
            lightning_module=SimpleNamespace(lr_schedule="cosine"),
        )

    checkpoint = {}
    keep_state(checkpoint, trainer(1), rotation_epoch=3)
    assert restore_state(checkpoint, trainer(1)) == 3
    with pytest.raises(InvalidArgumentError, match="'n_processes': 2"):
        restore_state(checkpoint, trainer(2))
