"""Predicted cells and effects in pertpy's distances and perturbation spaces."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

pertpy = pytest.importorskip("pertpy", exc_type=ImportError)


def test_its_distances_take_predicted_cells(model, observed, predicted):
    names = list(model.perturbations)
    both = ad.concat(
        {"observed": observed, "predicted": predicted}, label="origin", index_unique="-"
    )
    both.obs["group"] = both.obs["origin"].astype(str) + " " + both.obs["perturbation"].astype(str)
    distance = pertpy.tl.Distance("edistance", layer_key="expression")
    both.layers["expression"] = both.X.toarray()
    groups = [f"{origin} {name}" for origin in ("observed", "predicted") for name in names]
    table = distance.pairwise(both, groupby="group", groups=groups, show_progressbar=False)
    between = table.loc[groups[: len(names)], groups[len(names) :]].to_numpy()
    # Predicted cells are nearest to those observed with the same perturbation.
    assert (between.argmin(axis=0) == np.arange(len(names))).mean() > 0.6
    assert between.diagonal().mean() < 0.5 * between.mean()


def test_effects_are_a_perturbation_space(model):
    effects = model.get_perturbation_effects().mean
    names = ["control", *effects.index]
    space = ad.AnnData(
        np.vstack([np.zeros(effects.shape[1]), effects]),
        obs=pd.DataFrame({"perturbation": names}, index=names),
    )
    first, second = effects.index[:2]
    # They are differences to control cells already.
    added = pertpy.tl.PseudobulkSpace().add(
        space, perturbations=[first, second], reference_key="control", ensure_consistency=False
    )
    found = np.asarray(added[f"{first}+{second}"].X).ravel()
    np.testing.assert_allclose(found, effects.loc[[first, second]].sum(), rtol=1e-5, atol=1e-6)


def test_predicted_effects_are_a_perturbation_space(model):
    ate = model.predict_ate([*model.perturbations, "P001+P002"])
    ate.obs["perturbation"] = ate.obs_names
    ate.layers["effect"] = ate.X
    correlations = np.corrcoef(ate.X)
    table = pertpy.tl.Distance("pearson_distance", layer_key="effect").pairwise(
        ate, groupby="perturbation", show_progressbar=False
    )
    names = list(ate.obs_names)
    np.testing.assert_allclose(1 - table.loc[names, names], correlations, atol=1e-5)
