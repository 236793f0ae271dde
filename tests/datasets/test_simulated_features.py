"""Features of simulated perturbations: what they explain of masks and effects, and what not."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr, ndtri

from scvi_sams.datasets import simulate_screen
from scvi_sams.exceptions import InvalidArgumentError

SMALL = {
    "n_genes": 20,
    "n_controls": 5,
    "cells_per_perturbation": 1,
    "n_combinations": 0,
    "n_hidden": 8,
    "library_size": 1000.0,
}
MANY = {**SMALL, "n_perturbations": 4000, "n_latent": 12, "mask_probability": 0.3}


def parts(adata):
    truth = adata.uns["simulation"]
    table = adata.uns["perturbation_features"]
    explained = {of: table.to_numpy() @ truth[f"true_{of}_weights"] for of in ("mask", "effect")}
    return table, truth["true_masks"], truth["true_effects"], explained


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_features_explain_the_share_that_was_asked_for(share):
    adata = simulate_screen(
        **MANY, effect_scale=3.0, n_features=10, n_noise_features=5, feature_share=share, seed=1
    )
    table, masks, effects, explained = parts(adata)
    # 48,000 entries: R^2 of a regression per latent, corrected for its 15 columns.
    design = np.column_stack([np.ones(len(table)), table])
    fitted = design @ np.linalg.lstsq(design, effects, rcond=None)[0]
    unexplained = np.square(effects - fitted).sum() / (effects.shape[1] * (4000 - 16))
    assert effects.std() == pytest.approx(3, rel=0.03)
    assert 1 - unexplained / effects.var() == pytest.approx(share, abs=0.02)
    # The liability is linear in the features, and what else it has is a normal of variance 1 - s.
    linear = explained["mask"]
    assert linear.var() == pytest.approx(share, rel=0.05)
    expected = ndtr((linear + ndtri(0.3)) / np.sqrt(1 - share))
    for low, high in [(-9, -0.5), (-0.5, 0), (0, 0.5), (0.5, 9)]:
        chosen = (linear > low) & (linear <= high)
        # Empty masks, 1.4 % of all, were drawn again.
        assert masks[chosen].mean() == pytest.approx(expected[chosen].mean(), abs=0.02)
    assert masks.mean() == pytest.approx(0.3 / (1 - 0.7**12), abs=0.01)


def test_features_that_explain_everything_leave_nothing_to_chance():
    adata = simulate_screen(
        **{**SMALL, "n_latent": 5, "mask_probability": 0.2, "n_perturbations": 200},
        n_features=4,
        n_noise_features=3,
        feature_share=1.0,
    )
    table, masks, effects, explained = parts(adata)
    np.testing.assert_array_equal(masks, explained["mask"] > -ndtri(0.2))
    np.testing.assert_allclose(effects, explained["effect"], rtol=1e-12)
    assert masks.any(axis=1).all()
    # Noise is not in it, and the table is that of the perturbations by name.
    weights = adata.uns["simulation"]["true_effect_weights"]
    assert list(table.columns[4:]) == ["noise_01", "noise_02", "noise_03"]
    assert not weights[4:].any()
    assert not adata.uns["simulation"]["true_mask_weights"][4:].any()
    np.testing.assert_allclose(np.linalg.norm(weights[:4], axis=0), 2)  # effect_scale
    assert list(table.index) == list(adata.uns["simulation"]["perturbations"])
    assert set(adata.obs["perturbation"]) == {"control", *table.index}


def test_features_of_share_0_change_nothing_but_the_table():
    settings = {"n_perturbations": 12, "mask_probability": 0.05, "n_combinations": 3, "seed": 4}
    plain = simulate_screen(**{**SMALL, **settings})
    known = simulate_screen(**{**SMALL, **settings}, n_features=6, feature_share=0.0)
    assert "perturbation_features" not in plain.uns
    np.testing.assert_array_equal(plain.X.toarray(), known.X.toarray())
    np.testing.assert_array_equal(
        plain.uns["simulation"]["true_masks"], known.uns["simulation"]["true_masks"]
    )
    assert known.uns["perturbation_features"].shape == (12, 6)


def test_features_are_named_after_the_genes_that_perturbations_repress_and_are_saved(tmp_path):
    adata = simulate_screen(**SMALL, n_perturbations=7, knockdown=(0.5, 0.9), n_features=3)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    read = anndata.read_h5ad(tmp_path / "screen.h5ad").uns["perturbation_features"]
    pd.testing.assert_frame_equal(read, adata.uns["perturbation_features"], check_names=False)
    assert set(read.index) <= set(adata.var_names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_noise_features": 2}, "set `n_features`"),
        ({"n_features": -1}, "`n_features`"),
        ({"n_features": 2, "feature_share": 1.5}, "`feature_share`"),
    ],
)
def test_impossible_features_raise(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        simulate_screen(**SMALL, **changes)
