"""A model and its results say how they came about."""

import json
import platform
import threading
from importlib.metadata import version

import anndata as ad
import pytest
import scvi
from lightning.pytorch.callbacks import LambdaCallback, Timer

import scvi_sams
from model.builders import COVARIATES, TRAINING, small_screen, train_small
from scvi_sams import SAMSVAE


@pytest.fixture
def seeded():
    scvi.settings.seed = 5
    yield
    scvi.settings.seed = None


@pytest.fixture
def model(seeded):
    return train_small(small_screen(), COVARIATES, mask_prior_concentration=2.0)


def test_it_names_settings_seed_and_versions(model):
    found = model.provenance
    assert found["model"] == "SAMSVAE"
    assert found["settings"]["n_latent"] == 4
    assert found["settings"]["mask_prior_concentration"] == 2.0
    assert found["setup"]["batch_key"] == "lane"
    assert found["setup"]["categorical_covariate_keys"] == ["donor"]
    (training,) = found["trainings"]
    assert training["seed"] == 5
    assert training["n_training_cells"] == len(model.train_indices)
    assert training["settings"]["max_epochs"] == 2
    assert training["settings"]["batch_size"] == 64
    assert training["settings"]["plan_kwargs"] == {"dense_fraction": 0.0}
    assert training["versions"]["scvi_sams"] == scvi_sams.__version__
    assert training["versions"]["python"] == platform.python_version()
    for package in ("torch", "scvi-tools", "anndata"):
        assert training["versions"][package] == version(package)


def test_each_training_is_recorded_and_saved(model, tmp_path):
    scvi.settings.seed = None
    model.train(max_epochs=1, **TRAINING)
    assert [training["seed"] for training in model.provenance["trainings"]] == [5, None]
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SAMSVAE.load(tmp_path / "model", accelerator="cpu")
    assert loaded.provenance == model.provenance


def test_a_training_that_fails_is_not_recorded(model):
    with pytest.raises(ValueError, match="lr"):
        model.train(max_epochs=1, **(TRAINING | {"plan_kwargs": {"lr": -1.0}}))
    assert len(model.provenance["trainings"]) == 1


def test_it_does_not_change_with_what_it_tells(model):
    model.provenance["trainings"][0]["settings"]["plan_kwargs"]["dense_fraction"] = 0.7
    (training,) = model.provenance["trainings"]
    assert training["settings"]["plan_kwargs"] == {"dense_fraction": 0.0}


class _Uncopyable(LambdaCallback):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_objects_among_the_settings_are_named_by_their_class_and_never_copied(seeded):
    model = train_small(
        small_screen(), train={"callbacks": [_Uncopyable(), Timer(interval="epoch")]}
    )
    described = model.provenance["trainings"][0]["settings"]["callbacks"]
    assert described == ["_Uncopyable", "Timer"]


def test_results_in_a_file_name_the_model_that_made_them(model, tmp_path):
    model.get_perturbation_masks()
    model.get_latent_representation(key_added="X_mine")
    model.get_elbo()
    scvi_sams.tl.perturbation_hits(model, n_samples=100, n_posterior_samples=10)
    before = model.provenance
    model.train(max_epochs=1, **TRAINING)
    model.predict_ate(["P001"], n_samples=100, n_posterior_samples=10)
    model.adata.write_h5ad(tmp_path / "results.h5ad")
    kept = ad.read_h5ad(tmp_path / "results.h5ad").uns["sams_provenance"]
    records = {key: json.loads(record) for key, record in kept.items()}
    early = ("sams_masks", "X_mine", "sams_elbo", "sams_hits")
    assert records == dict.fromkeys(early, before) | {"sams_ate": model.provenance}
