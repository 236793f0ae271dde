"""The comparators as users call them: one interface, closed forms, saving, errors, training."""

import numpy as np
import pytest
import torch

from model.builders import (
    COVARIATES,
    N_LATENT,
    TRAINING,
    assert_within_error,
    copy_without_registration,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._perturbation_model import PerturbationModel

SETTINGS = {
    "cpa mean field": (CPAVAE, {"correlated_basal": False}),
    "cpa correlated": (CPAVAE, {"correlated_basal": True}),
    "svae+": (SVAEPlus, {}),
    "conditional": (ConditionalVAE, {}),
}
ALL = pytest.mark.parametrize("name", SETTINGS)
SEEN = "P001+P003"


def train(name, adata=None, setup=None, **kwargs):
    model_cls, settings = SETTINGS[name]
    adata = small_screen() if adata is None else adata
    return train_small(adata, setup, model_cls=model_cls, **(settings | kwargs))


@pytest.fixture(scope="module", params=SETTINGS)
def any_model(request):
    return train(request.param)


def results(model):
    torch.manual_seed(0)
    ate = model.predict_ate(["P002", SEEN], method="mean", n_samples=200, key_added=None)
    return {
        "latent": model.get_latent_representation(key_added=None),
        "ate": ate.X,
        "error": ate.layers["standard_error"],
        "elbo": model.get_elbo(return_mean=False, key_added=None),
        "iwelbo": model.get_iwelbo(return_mean=False, n_samples=5, key_added=None),
        "reconstruction": model.get_reconstruction_error(return_mean=False, key_added=None),
        "predicted": model.predict(["P002", SEEN], output="rate").X,
        "expression": model.get_normalized_expression(n_samples=3, return_numpy=True),
        "drawn": model.posterior_predictive_sample(),
    }


# One interface ----------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("setup", [None, COVARIATES], ids=["plain", "covariates"])
def test_a_loaded_model_gives_the_same_results(name, setup, tmp_path):
    model = train(name, setup=setup, n_layers=2)
    expected = results(model)
    model.save(tmp_path / "model")
    loaded = type(model).load(
        tmp_path / "model", copy_without_registration(model.adata), accelerator="cpu"
    )
    assert loaded.init_params_ == model.init_params_
    assert loaded.perturbations == model.perturbations
    for key, values in results(loaded).items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_results_differ_between_cells_and_perturbations(any_model):
    """The comparison above would mean little for constants."""
    found = results(any_model)
    assert found["latent"].shape == (any_model.adata.n_obs, N_LATENT)
    for key in ("latent", "elbo", "iwelbo", "expression"):
        assert np.std(found[key], axis=0).min() > 0, key
    assert np.abs(found["ate"][0] - found["ate"][1]).max() > 1
    assert (found["iwelbo"] <= 0).all()
    np.testing.assert_allclose(found["expression"].sum(1), 1, rtol=1e-4)


def test_elbo_is_reconstruction_and_divergences(any_model):
    """Of other samples than those of the module: equal up to their error."""
    module = any_model.module
    torch.manual_seed(1)
    bounds = []
    _, tensors = next(any_model._read(None, range(20), None).batches())
    for _ in range(20):
        with torch.no_grad():
            output = module(tensors, inference_kwargs={"n_particles": 200})[2]
        terms = [*output.reconstruction_loss.values(), *output.kl_local.values()]
        bounds.append(-sum(term.numpy() for term in terms))
    elbo = any_model.get_elbo(indices=range(20), n_samples=4000, return_mean=False, key_added=None)
    error = np.std(bounds, axis=0, ddof=1) * (2 / len(bounds)) ** 0.5
    assert_within_error(elbo, np.mean(bounds, axis=0), error, n_errors=6)


def test_masks_and_effects_only_where_the_model_has_them(any_model):
    has = {
        getter: hasattr(any_model, getter)
        for getter in ("get_perturbation_masks", "get_perturbation_effects")
    }
    expected = {CPAVAE: (False, True), SVAEPlus: (True, True), ConditionalVAE: (False, False)}
    assert tuple(has.values()) == expected[type(any_model)]
    assert isinstance(any_model, PerturbationModel)


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE])
def test_a_model_names_the_classes_that_say_what_it_can_do(model_cls):
    assert len(model_cls.__mro__) <= 10
    for method in ("predict_ate", "predict"):
        assert any(method in vars(base) for base in model_cls.__bases__)


@pytest.mark.parametrize("any_model", list(SETTINGS)[:3], indirect=True)
def test_perturbed_states_are_basal_states_plus_effects(any_model):
    effects = any_model.get_perturbation_effects(key_added=None).mean
    basal, perturbed = (
        any_model.get_latent_representation(representation=r, key_added=None)
        for r in ("basal", "perturbed")
    )
    for cell, label in enumerate(any_model.adata.obs["perturbation"]):
        names = [label] if label in effects.index else label.split("+")
        expected = effects.reindex(names).fillna(0).sum().to_numpy()
        np.testing.assert_allclose((perturbed - basal)[cell], expected, atol=1e-4)
    assert effects.abs().to_numpy().min() > 0


def test_the_order_of_names_and_of_labels_plays_no_part(any_model):
    found = {}
    for label in ("P001+P003", " P003 + P001", "P001+control+P003"):
        torch.manual_seed(0)
        found[label] = any_model.predict_ate([label], n_samples=200, key_added=None).X
    for values in found.values():
        np.testing.assert_array_equal(values, found["P001+P003"])
    torch.manual_seed(0)
    first, second = np.split(any_model.predict([SEEN, "P002"], output="rate").X, 2)
    torch.manual_seed(0)
    turned = np.split(any_model.predict(["P002", SEEN], output="rate").X, 2)
    np.testing.assert_allclose(turned, [second, first], rtol=1e-5)


@ALL
@pytest.mark.parametrize("evidence_cells", [0, -1.0, float("nan")])
def test_evidence_of_no_cells_is_refused(name, evidence_cells):
    model_cls, _ = SETTINGS[name]
    adata = small_screen()
    model_cls.setup_anndata(adata)
    with pytest.raises(SAMSError, match="evidence_cells"):
        model_cls(adata, evidence_cells=evidence_cells)


@ALL
def test_two_models_of_one_screen_do_not_disturb_each_other(name):
    model = train(name)
    before = results(model)
    other = SVAEPlus if name != "svae+" else SAMSVAE
    other.setup_anndata(model.adata)
    second = other(model.adata, n_latent=2, n_hidden=4)
    second.train(max_epochs=1, **TRAINING)
    for key, values in results(model).items():
        np.testing.assert_allclose(values, before[key], rtol=1e-5, atol=1e-5, err_msg=key)
    assert len(second.perturbations) == 4 + 2 * (other is SVAEPlus)


# Training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_screen():
    return simulate_screen(
        n_genes=60,
        n_controls=120,
        n_perturbations=4,
        cells_per_perturbation=80,
        n_combinations=1,
        cells_per_combination=80,
        n_latent=4,
        library_size=1500.0,
        seed=1,
    )


@ALL
def test_training_recovers_effects_on_expression(name, trained_screen):
    model_cls, settings = SETTINGS[name]
    adata = trained_screen.copy()
    model_cls.setup_anndata(adata)
    torch.manual_seed(0)
    model = model_cls(adata, n_latent=6, n_hidden=48, **settings)
    model.train(max_epochs=15, **(TRAINING | {"plan_kwargs": {"lr": 1e-2, "table_lr": 0.03}}))
    history = model.history["elbo_validation"].iloc[:, 0]
    assert history.iloc[-1] < history.iloc[0] - 1
    labels = [label for label in adata.obs["perturbation"].unique() if label != "control"]
    assert len(labels) == 5
    predicted = model.predict_ate(labels, n_samples=500, key_added=None).X
    truth = simulated_ate(adata, labels, n_samples=500).X
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.8
    shuffled = np.roll(truth, 1, axis=0)
    assert np.corrcoef(predicted.ravel(), shuffled.ravel())[0, 1] < 0.5
