"""What a training prints besides its own lines."""

import logging

import pytest

from train.screens import make_counts, make_model

LIGHTNING = "lightning.pytorch.utilities.rank_zero"
TRAINING = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture
def _no_level_set():
    logger = logging.getLogger(LIGHTNING)
    before = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(before)


def model():
    return make_model(make_counts())


@pytest.mark.usefixtures("_no_level_set")
def test_notices_of_lightning_are_not_printed(caplog, recwarn):
    one = model()
    caplog.set_level(logging.INFO)
    one.train(**TRAINING)
    assert not [record for record in caplog.records if record.name.startswith("lightning")]
    texts = [str(warning.message) for warning in recwarn]
    assert not [text for text in texts if "treespec" in text or "logging interval" in text]
    assert logging.getLogger(LIGHTNING).level == logging.NOTSET


@pytest.mark.usefixtures("_no_level_set")
def test_whoever_asks_for_them_gets_them(caplog):
    one = model()
    caplog.set_level(logging.INFO, LIGHTNING)
    one.train(**TRAINING)
    assert "GPU available" in caplog.text


@pytest.mark.usefixtures("_no_level_set")
def test_the_level_is_restored_after_an_error():
    def fail(*_):
        raise RuntimeError("stop here")

    one = model()
    one.module.loss = fail
    with pytest.raises(RuntimeError, match="stop here"):
        one.train(**TRAINING)
    assert logging.getLogger(LIGHTNING).level == logging.NOTSET
