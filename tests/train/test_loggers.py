"""Loggers of Lightning beside the history of scvi-tools."""

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger

from scvi_sams.exceptions import InvalidArgumentError
from train.screens import make_model, make_screen

TERMS = ["elbo", "reconstruction_loss", "kl_z_basal", "kl_masks", "kl_effects"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A model trained with a logger of the user's, and what that wrote."""
    folder = tmp_path_factory.mktemp("logs")
    model = make_model(make_screen())
    model.train(
        max_epochs=4,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
    )
    (file,) = folder.rglob("metrics.csv")
    return model, pd.read_csv(file)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_csv_logger_has_every_term_of_every_epoch(logged, part):
    _, metrics = logged
    for term in TERMS:
        values = metrics[f"{term}_{part}"].dropna()
        assert len(values) == 4, term
        assert np.isfinite(values).all(), term


def test_a_csv_logger_has_the_phases_and_the_share_of_active_masks(logged):
    _, metrics = logged
    assert metrics["dense_phase"].dropna().tolist() == [1, 1, 0, 0]
    shares = metrics["active_masks"].dropna()
    assert len(shares) == 4
    assert shares.between(0, 1).all()


def test_terms_add_up_to_the_bound_in_the_log(logged):
    """In epochs; terms are means over mini-batches, of which the last is smaller."""
    _, metrics = logged
    parts = [metrics[f"{term}_validation"].dropna().to_numpy() for term in TERMS]
    np.testing.assert_allclose(parts[0], sum(parts[1:]), rtol=0.02)


@pytest.mark.parametrize("several", [False, True])
def test_history_is_kept_beside_loggers_of_the_user(tmp_path, several):
    model = make_model(make_screen())
    own = CSVLogger(tmp_path)
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    for n_epochs in (2, 4):
        model.train(max_epochs=2, logger=[own] if several else own, **options)
        assert len(model.history["elbo_train"]) == n_epochs
    assert own in model.trainer.loggers
    model.train(max_epochs=1, logger=False, **options)
    assert len(model.history["elbo_train"]) == 4


def test_the_logger_of_lightning_stands_beside_history(tmp_path):
    model = make_model(make_screen())
    model.train(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        logger=True,
        default_root_dir=tmp_path,
    )
    assert len(model.history["elbo_train"]) == 2
    assert list((tmp_path / "lightning_logs").rglob("*"))


@pytest.mark.parametrize("logger", ["csv", 3, ["csv"]])
def test_what_is_no_logger_is_named(logger):
    with pytest.raises(InvalidArgumentError, match="`logger` must be a logger of Lightning"):
        make_model(make_screen()).train(max_epochs=1, logger=logger)
