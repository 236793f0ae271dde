"""Training curves: every term that a model has, each on its own scale."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from model.builders import small_screen, train_small
from scvi_sams import CPAVAE, pl
from scvi_sams.exceptions import MissingKeyError, SAMSError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def history():
    plan = {"plan_kwargs": {"dense_fraction": 0.5, "max_curvature": None}}
    return train_small(small_screen(), max_epochs=4, train=plan).history


def test_every_term_of_a_trained_model_has_a_panel(history):
    panels = pl.training_curves(history)
    titles = [ax.get_title() for ax in panels]
    assert titles == [
        "minus ELBO",
        "minus log p(x | z)",
        "KL of basal states",
        "KL of masks",
        "KL of effects",
        "proportion of active masks",
    ]
    for ax, term in zip(panels, ["elbo", "reconstruction_loss", "kl_z_basal"], strict=False):
        for line, side in zip(ax.lines, ["train", "validation"], strict=True):
            expected = history[f"{term}_{side}"].iloc[:, 0].astype(float)
            np.testing.assert_allclose(line.get_ydata(), expected)
            assert line.get_label() == side


def test_the_dense_phase_is_shaded(history):
    patch = pl.training_curves(history)[0].patches[0]
    dense = history["dense_phase"].iloc[:, 0]
    assert patch.get_x() == dense.index[0]
    assert patch.get_x() + patch.get_width() == dense.index[dense > 0][-1]
    assert not pl.training_curves({"elbo_train": history["elbo_train"]})[0].patches


def test_the_first_epochs_do_not_flatten_the_rest():
    values = 100 + np.exp(-np.arange(100) / 10)
    values[:3] = 1e4
    low, high = pl.training_curves({"elbo_train": pd.DataFrame({"elbo_train": values})})[
        0
    ].get_ylim()
    assert 99 < low < 100.01
    assert 100.5 < high < 102


def test_a_model_without_masks_has_no_panel_of_them():
    model = train_small(small_screen(), model_cls=CPAVAE)
    titles = [ax.get_title() for ax in pl.training_curves(model.history)]
    assert "KL of effects" in titles
    assert not any("masks" in title for title in titles)


def test_terms_can_be_chosen_and_unknown_ones_are_refused(history):
    (ax,) = pl.training_curves(history, terms=["kl_masks"])
    assert ax.get_title() == "KL of masks"
    with pytest.raises(MissingKeyError, match="'kl_love'"):
        pl.training_curves(history, terms=["kl_love"])
    with pytest.raises(MissingKeyError, match="none"):
        pl.training_curves({"loss": history["elbo_train"]})
    with pytest.raises(SAMSError, match="2 terms need as many axes, not 1"):
        pl.training_curves(history, terms=["elbo", "kl_masks"], axes=[plt.subplots()[1]])
