"""Models that were saved under other versions of Python, scvi-tools and anndata give their results.

The saved models are made by ``tests/fixtures/saved_models/make.py``.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from model.builders import TRAINING, assert_within_error, copy_without_registration
from model.saved_results import saved_results
from scvi_sams import SAMSVAE

FOLDER = Path(__file__).parents[1] / "fixtures" / "saved_models"
MADE_BY = {
    "scvi_tools_1.4.2": ("3.11", "1.4.2"),
    "scvi_tools_1.5.1": ("3.12", "1.5.1"),
}


@pytest.fixture(params=MADE_BY)
def name(request):
    return request.param


@pytest.mark.parametrize("data", ["saved with it", "given"])
def test_a_model_saved_under_other_versions_gives_its_results(name, data):
    adata = None
    if data == "given":
        adata = copy_without_registration(ad.read_h5ad(FOLDER / name / "adata.h5ad"))
    model = SAMSVAE.load(FOLDER / name, adata, accelerator="cpu")
    with np.load(FOLDER / name / "results.npz") as file:
        expected = dict(file)
    found = saved_results(model)
    assert found.keys() == expected.keys()
    error = np.hypot(found.pop("ate_error"), expected.pop("ate_error"))
    assert_within_error(found.pop("ate"), expected.pop("ate"), error)
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_the_versions_that_it_was_made_by_are_known(name):
    model = SAMSVAE.load(FOLDER / name, accelerator="cpu")
    (training,) = model.provenance["trainings"]
    python, scvi_tools = MADE_BY[name]
    assert training["versions"]["python"].startswith(python + ".")
    assert training["versions"]["scvi-tools"] == scvi_tools
    assert training["seed"] == 0


def test_a_model_saved_under_other_versions_trains_on_and_is_saved(name, tmp_path):
    model = SAMSVAE.load(FOLDER / name, accelerator="cpu")
    before = model.get_latent_representation(key_added=None)
    model.train(max_epochs=1, **TRAINING)
    after = model.get_latent_representation(key_added=None)
    assert np.abs(after - before).max() > 1e-4
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", model.adata, accelerator="cpu")
    np.testing.assert_allclose(
        loaded.get_latent_representation(key_added=None), after, rtol=1e-5, atol=1e-6
    )
    assert len(loaded.provenance["trainings"]) == 2
