"""A training whose process is killed goes on from its last epoch, to the very same weights."""

import io
import logging
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import scvi
import torch
from lightning.pytorch import Callback, Trainer

from model.builders import TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen
from scvi_sams.exceptions import InvalidArgumentError, SavingError, UnreadableDataError
from scvi_sams.train._checkpoint import keep_state, restore_state
from scvi_sams.train._identity import differences, plain_settings

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


def untrained(adata=None, seed=3, setup=None, **changes):
    scvi.settings.seed = seed
    adata = small_screen() if adata is None else adata
    SAMSVAE.setup_anndata(adata, **(setup or {}))
    return SAMSVAE(adata, **({"n_latent": 4, "n_hidden": 16, "effect_n_hidden": 8} | changes))


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


@pytest.fixture(scope="module")
def content_half_way(tmp_path_factory):
    path = tmp_path_factory.mktemp("stopped") / "run.ckpt"
    stopped(path, 2)
    return path.read_bytes()


@pytest.fixture
def half_way(content_half_way, tmp_path):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content_half_way)
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_epochs": 8}, "max_epochs 6 there, 8 here"),
        ({"train_size": 0.7}, "n_training_cells .* here; other training cells"),
        ({"batch_size": 16}, "batch_size 32 there, 16 here"),
        ({"gradient_clip_val": 3.0}, "gradient_clip_val 100.0 there, 3.0 here"),
        ({"early_stopping": True}, "train.early_stopping False there, True here"),
        (
            {"plan_kwargs": {"lr_schedule": "held_out"}},
            "plan.lr_schedule 'cosine' there, 'held_out'",
        ),
        ({"plan_kwargs": {"lr": 1e-5}}, "plan.lr 0.002 there, 1e-05 here"),
        ({"plan_kwargs": {"dense_fraction": 0}}, "plan.dense_fraction 0.5 there, 0 here"),
        ({"plan_kwargs": {"optimizer": "AdamW"}}, "plan.optimizer unknown there, 'AdamW' here"),
    ],
    ids=str,
)
def test_the_file_of_another_training_is_an_error(half_way, change, named):
    with pytest.raises(InvalidArgumentError, match=f"another training: .*{named}"):
        train(untrained(), half_way, **change)
    assert half_way.exists()


def other_counts(adata):
    adata.X[0, 0] += 1


def other_counts_of_all_cells(adata):
    adata.X = adata.X * 2


def other_labels(adata):
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    adata.obs["perturbation"] = labels[::-1]


def other_names(adata):
    labels = adata.obs["perturbation"].astype(str)
    adata.obs["perturbation"] = labels.str.replace("P001", "P0015")  # codes are the same


def other_genes(adata):
    adata.var_names = adata.var_names[::-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_counts, "other counts"),
        (other_counts_of_all_cells, "other counts"),
        (other_labels, "other perturbations"),
        (other_names, "other names of perturbations"),
        (other_genes, "other genes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_file_of_other_data_is_an_error(half_way, change, named):
    adata = small_screen()
    change(adata)
    with pytest.raises(InvalidArgumentError, match=named):
        train(untrained(adata), half_way)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"effect_prior_scale": 9.0}, "settings.effect_prior_scale .* there, 9.0 here"),
        ({"evidence_cells": 5.0}, "settings.evidence_cells .* there, 5.0 here"),
        ({"n_latent": 5}, "settings.n_latent 4 there, 5 here"),
        ({"seed": 4}, "seed 3 there, 4 here"),
        ({"setup": {"control": ["control", "P001"]}}, "setup.control"),
    ],
    ids=str,
)
def test_the_file_of_another_model_is_an_error(half_way, change, named):
    with pytest.raises(InvalidArgumentError, match=f"another training: .*{named}"):
        train(untrained(**change), half_way)


def test_moments_of_all_training_cells_are_compared(half_way):
    """Counts are hashed of some cells only, where there are many."""
    checkpoint = torch.load(half_way, weights_only=True)
    checkpoint["state_dict"]["module.input_mean"][0] += 0.01
    torch.save(checkpoint, half_way)
    with pytest.raises(InvalidArgumentError, match="other counts of training cells"):
        train(untrained(), half_way)


def test_what_cannot_be_told_apart_is_the_same_training():
    one, other = (
        plain_settings("plan", {"creator": object(), "text": repr(object())}) for _ in "12"
    )
    assert one == other
    assert differences(one, other) == []
    assert differences({}, {"lr": 1, "data.genes": "x"}) == [
        "lr unknown there, 1 here",
        "other genes",
    ]


def cut(whole):
    return whole[: len(whole) // 2]


def flip_a_bit_of_a_weight(whole):
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    return bytes(content)


def foreign(whole):
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda _: b"hello", cut, flip_a_bit_of_a_weight, foreign],
    ids=["empty", "text", "cut", "bit", "foreign"],
)
def test_a_damaged_or_foreign_file_is_an_error_and_stays(half_way, damage):
    content = damage(half_way.read_bytes())
    half_way.write_bytes(content)
    model = untrained()
    with pytest.raises(UnreadableDataError, match=r"run\.ckpt' is not a checkpoint .* damaged"):
        train(model, half_way)
    assert half_way.read_bytes() == content
    assert not model.is_trained


def test_a_full_disk_ends_no_training(whole, tmp_path, monkeypatch, caplog):
    save = Trainer.save_checkpoint

    def fill(trainer, path):
        if trainer.current_epoch == 1:
            return save(trainer, path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    caplog.set_level(logging.WARNING, logger="scvi.sams")
    monkeypatch.setattr(Trainer, "save_checkpoint", fill)
    path = tmp_path / "run.ckpt"
    with pytest.raises(ZeroDivisionError):
        train(untrained(), path, Stop(4))
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]
    assert caplog.text.count("Training continues, but could not be resumed later") == 1
    assert "No space left" in caplog.text
    resumed = train(untrained(), path)
    assert_same_weights(resumed, whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file/run.ckpt", ""])
def test_a_place_that_cannot_be_written_to_is_an_error_before_training(tmp_path, place):
    (tmp_path / "file").write_text("no folder")
    model = untrained()
    with pytest.raises(SavingError, match="cannot be written"):
        train(model, tmp_path / place)
    assert not model.is_trained


def test_what_a_checkpoint_is_of_is_not_in_the_record_of_the_training(tmp_path):
    model = train(untrained(), tmp_path / "run.ckpt", max_epochs=2)
    assert set(model.trainings_[-1]["settings"]["plan_kwargs"]) == {"checkpoint_path"}


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
            lightning_module=SimpleNamespace(module=module),
        )

    module = untrained().module
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    checkpoint = {"state_dict": state}
    keep_state(checkpoint, trainer(1), 3, {"lr": 1.0})
    assert restore_state(checkpoint, trainer(1), {"lr": 1.0}) == 3
    with pytest.raises(InvalidArgumentError, match="n_processes 1 there, 2 here"):
        restore_state(checkpoint, trainer(2), {"lr": 1.0})
