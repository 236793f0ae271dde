"""SVAE+ as users call it: one perturbation per cell, and what it cannot predict."""

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    N_LATENT,
    copy_without_registration,
    linear_normal,
    small_screen,
    train_small,
)
from scvi_sams import SVAEPlus
from scvi_sams.exceptions import InvalidDosageError, SAMSError, UnknownPerturbationError

SINGLES = ["P001", "P002", "P003", "P004"]
SEEN = "P001+P003"


@pytest.fixture(scope="module")
def svae_plus():
    return train_small(small_screen(), model_cls=SVAEPlus)


def test_svae_plus_means_are_those_of_single_and_combined_labels():
    model, weight = linear_normal(SVAEPlus)
    assert model.perturbations == ["P001", SEEN, "P001+P004", "P002", "P003", "P004"]
    means = np.random.default_rng(2).normal(size=(6, N_LATENT))
    masks = np.random.default_rng(3).random((6, N_LATENT)) < 0.5
    with torch.no_grad():
        model.module.means.copy_(torch.as_tensor(means))
        model.module.masks.logits.copy_(torch.as_tensor(np.where(masks, 40.0, -40.0)))
    ate = model.predict_ate(method="mean", key_added=None)
    assert list(ate.obs_names) == model.perturbations
    np.testing.assert_allclose(ate.X, (masks * means) @ weight.T, atol=1e-4)
    found = model.get_perturbation_masks(key_added=None)
    np.testing.assert_allclose(found, masks, atol=1e-6)
    assert list(found.index) == model.perturbations
    effects = model.get_perturbation_effects(key_added=None)
    np.testing.assert_allclose(effects.mean, masks * means, atol=1e-6)
    np.testing.assert_allclose(effects.sd, 0, atol=1e-6)


def test_svae_plus_states_do_not_depend_on_labels(svae_plus):
    """q(z | x): the same cells under other labels are in the same states."""
    state = svae_plus.get_latent_representation(representation="perturbed", key_added=None)
    other = copy_without_registration(svae_plus.adata)
    labels = other.obs["perturbation"].astype(str).to_numpy()
    other.obs["perturbation"] = labels[::-1].copy()
    again = svae_plus.get_latent_representation(other, representation="perturbed", key_added=None)
    np.testing.assert_allclose(again, state, atol=1e-4)


def test_svae_plus_refuses_unseen_combinations(svae_plus):
    for ask in (svae_plus.predict_ate, svae_plus.predict):
        with pytest.raises(UnknownPerturbationError, match=r"'P001\+P002'.*SAMSVAE and CPAVAE"):
            ask(["P001", "P002+P001"])
        with pytest.raises(UnknownPerturbationError, match="'P9'"):
            ask(["P9"])
    unseen = copy_without_registration(svae_plus.adata)
    unseen.obs["perturbation"] = ["P004+P002", *unseen.obs["perturbation"][1:]]
    with pytest.raises(UnknownPerturbationError, match=r"'P002\+P004'.*CPAVAE"):
        svae_plus.get_elbo(unseen)


def test_svae_plus_reads_other_spellings_and_fewer_perturbations(svae_plus):
    other = copy_without_registration(svae_plus.adata)
    labels = ["+".join(reversed(label.split("+"))) for label in other.obs["perturbation"]]
    assert "P003+P001" in labels
    other.obs["perturbation"] = labels
    kept = np.flatnonzero(np.isin(labels, ["P003+P001", "P004", "control"]))
    found = svae_plus.get_latent_representation(other[kept].copy(), key_added=None)
    expected = svae_plus.get_latent_representation(indices=kept, key_added=None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_svae_plus_refuses_doses(svae_plus):
    adata = small_screen(dosages=[0.5, 1.0, 2.0])
    with pytest.raises(InvalidDosageError, match=r"0\.5, 2"):
        SVAEPlus.setup_anndata(adata, dosage_key="dosage")
    assert not [key for key in (*adata.obsm, *adata.uns) if key.startswith("_scvi")]
    with pytest.raises(InvalidDosageError, match="2"):
        svae_plus.predict_ate(["P001"], dosages=[2.0])


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, -2.0, float("nan")])
def test_svae_plus_refuses_priors_that_favour_masks(beta):
    adata = small_screen()
    SVAEPlus.setup_anndata(adata)
    with pytest.raises(SAMSError, match="mask_prior_beta"):
        SVAEPlus(adata, mask_prior_beta=beta)


def test_svae_plus_reads_a_dosage_matrix():
    adata = small_screen()
    labels = [str(label).split("+") for label in adata.obs["perturbation"]]
    matrix = pd.DataFrame(
        [[float(name in label) for name in SINGLES] for label in labels],
        index=adata.obs_names,
        columns=SINGLES,
    )
    adata.obsm["doses"] = matrix
    SVAEPlus.setup_anndata(adata, dosage_obsm_key="doses")
    from_matrix = adata.obsm["_scvi_perturbations"].copy()
    SVAEPlus.setup_anndata(adata)
    np.testing.assert_array_equal(adata.obsm["_scvi_perturbations"], from_matrix)
    assert SVAEPlus(adata, n_latent=2, n_hidden=4).perturbations[1] == SEEN
