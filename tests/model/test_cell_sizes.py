"""Effects are those on cells of the sizes of the screen, unless a size is named."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from model.builders import N_LATENT, VARIANTS, set_effects, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import observed_ate

LABELS = ["P001", "P002+P004"]
SIZE_FACTOR = {"size_factor_key": "transcriptome"}
OLD_MODEL = Path(__file__).parents[1] / "fixtures" / "saved_models" / "scvi_tools_1.5.1"


def ate(model, **kwargs):
    torch.manual_seed(0)
    settings = {"n_samples": 200, "n_posterior_samples": 20, "interval": None, "key_added": None}
    return model.predict_ate(LABELS, **settings | kwargs)


def control_sizes(model):
    """Sizes of the control cells that the model was trained on."""
    cells = model.adata[np.asarray(model.train_indices)]
    cells = cells[(cells.obs["perturbation"] == "control").to_numpy()]
    if model.module.uses_size_factor:
        return cells.obs["transcriptome"].to_numpy()
    return np.asarray(cells.X.sum(axis=1)).ravel()


@pytest.mark.parametrize("setup", [None, SIZE_FACTOR], ids=["sum of counts", "size factor"])
def test_effects_are_the_average_over_the_sizes_of_control_cells(setup):
    model = train_small(small_screen(library_log_sd=0.6), setup)
    sizes = control_sizes(model)
    assert sizes.max() > 5 * sizes.min()
    found = ate(model)
    by_hand = np.mean([ate(model, library_size=float(size)).X for size in sizes], axis=0)
    np.testing.assert_allclose(found.X, by_hand, atol=2e-3)
    # The size that was the default, and the median, are further off.
    for size in (1e4, float(np.median(sizes))):
        assert np.abs(ate(model, library_size=size).X - by_hand).max() > 5e-3


def test_what_was_used_is_on_record(tmp_path):
    model = train_small(small_screen())
    described = ate(model).uns["ate"]
    sizes, shares = described["library_size"], described["library_size_shares"]
    assert described["library_size_of"] == "training data"
    assert (sizes * shares).sum() == pytest.approx(control_sizes(model).mean(), rel=0.01)
    named = ate(model, library_size=700)
    assert (named.uns["ate"]["library_size"], named.uns["ate"]["library_size_of"]) == (700, "given")
    assert "library_size_shares" not in named.uns["ate"]
    # These depend on no size.
    for method in ("mean", "lograte"):
        assert ate(model, method=method).uns["ate"]["library_size"] == "none"
    model.predict_ate(LABELS, n_samples=200)
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    written = ad.read_h5ad(tmp_path / "screen.h5ad").uns["sams_ate"]
    np.testing.assert_array_equal(written["library_size"], sizes)


def test_a_model_without_data_knows_the_sizes(tmp_path):
    model = train_small(small_screen())
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", False, accelerator="cpu")
    np.testing.assert_array_equal(ate(loaded).X, ate(model).X)
    interactions = loaded.predict_interactions(["P001+P002"], method="lognorm", n_samples=200)
    np.testing.assert_array_equal(
        interactions.uns["interaction"]["library_size"], ate(model).uns["ate"]["library_size"]
    )


def test_a_model_that_was_saved_without_sizes_says_what_it_assumes():
    model = SAMSVAE.load(OLD_MODEL, accelerator="cpu")
    found = ate(model)
    assert found.uns["ate"]["library_size"] == 1e4
    assert found.uns["ate"]["library_size_of"].startswith("assumed")
    np.testing.assert_array_equal(found.X, ate(model, library_size=1e4).X)


@pytest.mark.parametrize("setup", [None, SIZE_FACTOR], ids=["sum of counts", "size factor"])
def test_effects_are_on_the_scale_of_observed_ones(setup):
    """Of cells that are drawn from the model, at the sizes of the control cells."""
    adata = small_screen(library_size=60.0, library_log_sd=0.6)
    model = train_small(adata, setup, **VARIANTS["mean field"])
    set_effects(model, np.random.default_rng(5).normal(scale=1.5, size=(4, N_LATENT)))
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    sources = np.intersect1d(np.asarray(model.train_indices), np.flatnonzero(is_control))
    sources = np.tile(sources, 200)
    torch.manual_seed(0)
    drawn = model.predict(["control", *LABELS], indices=sources, output="counts")
    drawn.obs["transcriptome"] = np.tile(adata.obs["transcriptome"].to_numpy()[sources], 3)
    drawn = drawn[drawn.X.sum(axis=1) > 0]
    size_factor_key = None if setup is None else "transcriptome"
    observed = observed_ate(drawn, size_factor_key=size_factor_key, perturbations=LABELS).X

    def distance(**kwargs):
        effects = ate(model, basal="control", n_samples=4000, **kwargs).X
        return np.sqrt(((effects - observed) ** 2).mean())

    assert distance() < 0.05 * np.sqrt((observed**2).mean())
    assert distance(library_size=1e4) > 3 * distance()
