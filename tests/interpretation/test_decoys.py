"""Perturbations that do nothing, hidden in the screen: how they are made, and what is counted."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import small_screen, train_small
from scvi_sams import SAMSVAE, SVAEPlus
from scvi_sams.data._field import registered_labels
from scvi_sams.data._guides import registered_guides
from scvi_sams.exceptions import InvalidArgumentError, RegistrationError
from scvi_sams.interpretation import decoy_check
from scvi_sams.labels._labels import NO_PERTURBATION

FEW = {"n_decoys": 3, "n_cells": 5}


def screen():
    adata = small_screen()
    adata.obs["lane"] = np.random.default_rng(0).choice(["a", "b"], adata.n_obs, p=[0.8, 0.2])
    return adata


@pytest.fixture
def trained_with(monkeypatch):
    """Models that were trained, and the arguments; none of them is."""
    trainings = []

    def train(self, **arguments):
        self.is_trained_ = True
        trainings.append((self, arguments))

    for model_cls in (SAMSVAE, SVAEPlus):
        monkeypatch.setattr(model_cls, "train", train)
    return trainings


def untrained(model_cls, adata, **setup):
    model_cls.setup_anndata(adata, **setup)
    return model_cls(adata, n_latent=3, n_hidden=8)


def test_neither_the_model_nor_its_data_change():
    model = train_small(screen(), setup={"batch_key": "lane"})
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    before, state = model.adata.copy(), torch.get_rng_state()
    found = decoy_check(model, **FEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.module.state_dict()[name], w) for name, w in weights.items())
    pd.testing.assert_frame_equal(model.adata.obs, before.obs)
    assert (model.adata.X != before.X).sum() == 0
    assert set(model.adata.uns) == set(before.uns)
    assert "decoy1" not in model.perturbations
    pd.testing.assert_frame_equal(decoy_check(model, **FEW), found)
    assert not decoy_check(model, **FEW, seed=1).equals(found)


@pytest.mark.parametrize("model_cls", [SAMSVAE, SVAEPlus])
def test_decoys_are_control_cells_and_all_else_is_as_before(model_cls, trained_with):
    model = untrained(model_cls, screen(), batch_key="lane")
    decoy_check(model, n_decoys=4, n_cells=5)
    ((again, _),) = trained_with
    labels, hidden = (registered_labels(m.adata_manager) for m in (model, again))
    names = [f"decoy{number}" for number in range(1, 5)]
    assert again.perturbations == [*model.perturbations, *names]
    was_control = labels.is_control
    np.testing.assert_array_equal(hidden.codes[~was_control], labels.codes[~was_control])
    np.testing.assert_array_equal(hidden.doses[~was_control], labels.doses[~was_control])
    decoys = hidden.codes.max(axis=1)[was_control]
    n_known = len(labels.vocabulary)
    assert np.bincount(decoys[decoys >= 0]).tolist() == [0] * n_known + [5] * 4
    assert (hidden.codes[was_control][:, 1:] == NO_PERTURBATION).all()
    # Each batch gives its share, but for the rounding of one cell.
    lane = (model.adata.obs["lane"] == "b").to_numpy()[was_control]
    assert abs(lane[decoys >= 0].sum() - 20 * lane.mean()) <= 1
    assert (again.adata.X != model.adata.X).sum() == 0
    assert again.adata.obs["lane"].equals(model.adata.obs["lane"])


def test_doses_of_decoys_are_those_of_others(trained_with):
    adata = small_screen()
    rng = np.random.default_rng(0)
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    adata.obs["dose"] = np.where(perturbed, rng.choice([0.5, 2.0, 2.0], adata.n_obs), 0)
    model = untrained(SAMSVAE, adata, dosage_key="dose")
    decoy_check(model, **FEW)
    ((again, _),) = trained_with
    hidden = registered_labels(again.adata_manager)
    decoys = hidden.codes[:, 0] >= len(model.perturbations)
    assert decoys.sum() == 15
    assert (hidden.doses[decoys, 0] == 2.0).all()


def test_decoys_have_no_guides_and_all_others_keep_theirs(trained_with):
    adata = small_screen(guides_per_perturbation=2)
    model = untrained(SAMSVAE, adata, guide_key="guide")
    decoy_check(model, **FEW)
    ((again, _),) = trained_with
    found, hidden = (registered_guides(m.adata_manager) for m in (model, again))
    assert hidden.names == found.names
    np.testing.assert_array_equal(hidden.perturbation, found.perturbation)
    np.testing.assert_array_equal(hidden.codes, found.codes)
    assert again.adata.obs["guide"].isna().sum() == 15
    assert not adata.obs["guide"].isna().any()


def test_settings_and_training_are_those_of_the_model(trained_with, monkeypatch):
    model = untrained(SAMSVAE, small_screen(), size_factor_key=None)
    recorded = {"max_epochs": 7, "plan_kwargs": {"lr": 1e-3}, "checkpoint_path": "there"}
    recorded |= {"callbacks": ["Timer"], "logger": "CSVLogger"}
    model.trainings_ = ({"settings": {"max_epochs": 3}}, {"settings": recorded})
    decoy_check(model, **FEW)
    decoy_check(model, **FEW, train_kwargs={"max_epochs": 2})
    (again, first), (_, second) = trained_with
    assert first == {"enable_progress_bar": False, "max_epochs": 7, "plan_kwargs": {"lr": 1e-3}}
    assert second == {"enable_progress_bar": False, "max_epochs": 2}
    assert again.provenance["settings"] == model.provenance["settings"]


def test_cells_on_disk_are_read(tmp_path, trained_with):
    adata = small_screen()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    decoy_check(untrained(SAMSVAE, adata), **FEW)
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    decoy_check(untrained(SAMSVAE, backed), **FEW)
    in_memory, read = (model.adata.X for model, _ in trained_with)
    assert (in_memory != read).sum() == 0


@pytest.mark.parametrize(
    ("q_value", "logged"),
    [
        (0.2, "3 are called by masks alone and 0 by masks and test"),
        (0.01, "3 are called by masks alone and 3 by masks and test"),
    ],
)
def test_calls_of_decoys_are_counted(q_value, logged, trained_with, monkeypatch, caplog):
    model = untrained(SAMSVAE, small_screen())

    def masks(self, key_added=None):
        values = np.full((len(self.perturbations), 3), 0.01)
        values[-3:, :2] = 0.99
        return pd.DataFrame(values, index=self.perturbations).add_prefix("latent_")

    def tests(self, key_added=None):
        return pd.DataFrame({"q_value": q_value}, index=self.perturbations)

    monkeypatch.setattr(SAMSVAE, "get_perturbation_masks", masks)
    monkeypatch.setattr(SAMSVAE, "test_perturbations", tests)
    with caplog.at_level("WARNING", logger="scvi.sams"):
        found = decoy_check(model, **FEW)
    assert found.index.tolist() == ["decoy1", "decoy2", "decoy3"]
    assert (found["by_masks"] == 2).all()
    assert (found["called"] == (2 if q_value < 0.05 else 0)).all()
    assert (found["n_cells"] == 5).all()
    assert logged in caplog.text
    assert ("Error rates on this screen are not controlled" in caplog.text) == (q_value < 0.05)
    assert ("Do not use masks without the test" in caplog.text) == (q_value > 0.05)


def test_half_of_the_control_cells_stay(trained_with):
    model = untrained(SAMSVAE, small_screen())
    n_controls = int((model.adata.obs["perturbation"] == "control").sum())
    with pytest.raises(InvalidArgumentError, match=f"from {n_controls} control cells"):
        decoy_check(model, n_decoys=2, n_cells=n_controls // 4 + 1)
    with pytest.raises(InvalidArgumentError, match="half of the control cells"):
        decoy_check(model, n_decoys=n_controls)
    assert not trained_with
    found = decoy_check(model, n_decoys=2, n_cells=n_controls // 4)
    assert (found["n_cells"] == n_controls // 4).all()


def test_a_model_without_its_data_says_so(tmp_path):
    train_small(small_screen()).save(str(tmp_path / "model"))
    model = SAMSVAE.load(str(tmp_path / "model"), adata=False)
    with pytest.raises(RegistrationError, match="without its data"):
        decoy_check(model)
