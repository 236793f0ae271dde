"""Several models in one process: no registration reaches into another model."""

import gc
import pickle
import threading
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from scvi_sams import SAMSVAE
from scvi_sams.data._field import registered_labels, unpack_perturbations
from scvi_sams.exceptions import UnknownPerturbationError

LABELS = ["control", "A", "B", "B+A"] * 6
CODES = [[-1, -1], [0, -1], [1, -1], [0, 1]] * 6


def create(adata, **arguments):
    SAMSVAE.setup_anndata(adata, **arguments)
    return SAMSVAE(adata, n_latent=3, n_hidden=8, effect_n_hidden=4)


def train(model):
    model.train(
        max_epochs=1,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    return model


def encoded(adata):
    return unpack_perturbations(adata.obsm["_scvi_perturbations"])


def results(model):
    """What a user would see of a model; random numbers are the same in each call."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    # First what reads no cells itself: it must not depend on who registered the data last.
    ate = model.predict_ate(["A", "B+A"], n_samples=20, n_posterior_samples=10, basal="control")
    predicted = model.predict(["B+A"])
    return {
        "names": np.array(model.perturbations),
        "ate": ate.X,
        "prediction": predicted.X,
        "source cells": np.array(predicted.obs["source_cell"]),
        "latent": model.get_latent_representation(),
        "masks": model.get_perturbation_masks().to_numpy(),
        "codes": registered_labels(model.adata_manager).codes,
    }


def assert_same_results(now, then):
    for key, value in then.items():
        np.testing.assert_array_equal(now[key], value, err_msg=key)


def test_a_second_data_set_leaves_the_first_model_as_it_was(make_screen):
    first = train(create(make_screen(LABELS, batch=["x", "y"] * 12), batch_key="batch"))
    before = results(first)
    second = train(
        create(
            make_screen(["NT", "B", "A0", "B_A0_Z"] * 6, batch=["y", "w", "v"] * 8),
            control="NT",
            delimiter="_",
            batch_key="batch",
        )
    )
    assert second.perturbations == ["A0", "B", "Z"]
    np.testing.assert_array_equal(
        encoded(second.adata)[0][:4], [[-1, -1, -1], [1, -1, -1], [0, -1, -1], [0, 1, 2]]
    )
    assert_same_results(results(first), before)


def test_both_models_read_the_same_third_data_by_their_own_names(make_screen):
    first = train(create(make_screen(["control", "A", "C"] * 3)))
    second = train(create(make_screen(["control", "B", "C", "A"] * 3)))
    third = make_screen(["C", "A", "control"])
    for model, codes in ((first, [1, 0, -1]), (second, [2, 0, -1]), (first, [1, 0, -1])):
        model.get_latent_representation(third)
        np.testing.assert_array_equal(encoded(third)[0][:, 0], codes)
        assert model.adata is not third
    assert (first.perturbations, second.perturbations) == (["A", "C"], ["A", "B", "C"])


OTHER_SETUPS = {
    "control": {"control": "A"},
    "labels": {"perturbation_key": "swapped"},
    "more perturbations": {"perturbation_key": "longer"},
    "delimiter": {"delimiter": None},
    "batch": {"batch_key": "batch"},
}
SETUP = {"batch_key": "lane"}


@pytest.fixture
def shared_screen(make_screen):
    swapped = {"A": "B", "B": "A"}
    return make_screen(
        LABELS,
        swapped=[swapped.get(label, label) for label in LABELS],
        longer=[label.replace("A", "C+D+E") for label in LABELS],
        lane=["x"] * 12 + ["y"] * 12,
        batch=["v"] * 12 + ["u"] * 12,
    )


@pytest.mark.parametrize("setup", OTHER_SETUPS.values(), ids=OTHER_SETUPS)
def test_a_second_registration_of_the_same_data_leaves_the_first_model_as_it_was(
    shared_screen, setup
):
    adata = shared_screen
    first = train(create(adata, **SETUP))
    before = results(first)
    second = train(create(adata, **SETUP | setup))
    assert_same_results(results(first), before)
    assert second.registry_["setup_args"] != first.registry_["setup_args"]


@pytest.mark.parametrize("setup", OTHER_SETUPS.values(), ids=OTHER_SETUPS)
def test_a_model_trains_on_its_own_registration_after_a_second_one(shared_screen, setup):
    trained = []
    for arguments in (None, setup):
        torch.manual_seed(0)
        adata = shared_screen.copy()
        model = create(adata, **SETUP)
        if arguments is not None:
            create(adata, **SETUP | arguments)
        torch.manual_seed(0)
        train(model)
        np.testing.assert_array_equal(registered_labels(model.adata_manager).codes, CODES)
        trained.append(model.module.state_dict())
    for key, value in trained[1].items():
        torch.testing.assert_close(value, trained[0][key], rtol=0, atol=1e-6)


def test_names_stay_with_their_effects_when_labels_are_edited_and_registered_again(make_screen):
    adata = make_screen(LABELS)
    first = train(create(adata))
    before = first.get_perturbation_masks(key_added=None)
    latent = first.get_latent_representation()
    adata.obs["perturbation"] = [label.replace("A", "Z") for label in LABELS]
    second = create(adata)
    assert second.perturbations == ["B", "Z"]
    with pytest.raises(UnknownPerturbationError, match="'Z'"):
        first.get_latent_representation()
    assert first.perturbations == ["A", "B"]
    pd.testing.assert_frame_equal(first.get_perturbation_masks(key_added=None), before)
    adata.obs["perturbation"] = LABELS
    np.testing.assert_array_equal(first.get_latent_representation(), latent)


def test_lists_that_a_user_changes_later_do_not_reach_into_the_model(make_screen):
    controls, names = ["NT1", "NT2"], ["A", "B"]
    labelled = train(create(make_screen(["NT1", "NT2", "A", "A+NT1"] * 3), control=controls))
    adata = make_screen(LABELS)
    adata.obsm["dosage"] = np.array([[0, 0], [1, 0], [0, 2], [3, 4]] * 6)
    measured = train(create(adata, dosage_obsm_key="dosage", perturbation_names=names))
    controls.clear()
    names.reverse()
    ate = labelled.predict_ate(["NT2", "A+NT1"], method="mean", n_samples=4)
    np.testing.assert_array_equal(ate.X[0], np.zeros(4))
    other = adata[:4].copy()
    measured.get_latent_representation(other)
    np.testing.assert_array_equal(encoded(other)[1], [[0, 0], [1, 0], [2, 0], [3, 4]])
    np.testing.assert_array_equal(encoded(other)[0], [[-1, -1], [0, -1], [1, -1], [0, 1]])


# Threads -----------------------------------------------------------------------------------------


def perturbed(model):
    return model.get_latent_representation(
        representation="perturbed", mean_shifts=True, key_added=None, batch_size=8
    )


def run_together(*functions):
    """Run functions in a thread each; what they raise is raised here."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def two_models(shared_screen):
    return [train(create(shared_screen, **SETUP | OTHER_SETUPS[s])) for s in ("labels", "batch")]


def test_two_models_read_one_screen_in_two_threads(two_models):
    expected = [perturbed(model) for model in two_models]

    def read(model, values):
        for _ in range(40):
            np.testing.assert_array_equal(perturbed(model), values)

    run_together(*(lambda m=m, e=e: read(m, e) for m, e in zip(two_models, expected, strict=True)))


def test_results_of_two_threads_are_all_written(two_models):
    adata = two_models[0].adata

    def write(model, name):
        for place in range(20):
            model.get_reconstruction_error(n_samples=1, key_added=f"{name}{place}")

    run_together(*(lambda m=m, n=n: write(m, n) for m, n in zip(two_models, "ab", strict=True)))
    names = {f"{name}{place}" for name in "ab" for place in range(20)}
    assert names <= set(adata.obs)
    assert names <= set(adata.uns["sams_provenance"])
    assert adata.obs[sorted(names)].notna().all(axis=None)


def test_a_model_trains_while_another_predicts(two_models, shared_screen):
    first, second = two_models
    expected = perturbed(second)

    def weights(model):
        return {name: value.clone() for name, value in model.module.state_dict().items()}

    def read():
        for _ in range(40):
            np.testing.assert_array_equal(perturbed(second), expected)

    start = weights(first)
    torch.manual_seed(0)
    train(first)
    alone = weights(first)
    first.module.load_state_dict(start)
    torch.manual_seed(0)
    run_together(lambda: train(first), read)
    for name, value in weights(first).items():
        assert torch.equal(value, alone[name]), name


# Memory ------------------------------------------------------------------------------------------

GETTERS = {
    "bound": lambda model, query: model.get_elbo(query, n_samples=1),
    "latents": lambda model, query: model.get_latent_representation(query),
    "cells": lambda model, query: model.predict(["A"], adata=query),
}


@pytest.mark.parametrize("getter", GETTERS.values(), ids=GETTERS)
def test_other_data_is_freed_after_a_getter(make_screen, getter):
    model = train(create(make_screen(LABELS)))
    n_known = len(model._per_instance_manager_store[model.id])
    for _ in range(3):
        query = make_screen(["A", "B", "control"])
        getter(model, query)
        gone = weakref.ref(query)
        del query
        gc.collect()
        assert gone() is None
    assert len(model._per_instance_manager_store[model.id]) <= n_known + 1
    perturbed(model)


def test_data_that_a_model_was_given_later_stays(make_screen, tmp_path):
    train(create(make_screen(LABELS))).save(tmp_path / "model")
    model = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    model.get_elbo(make_screen(LABELS), n_samples=1)
    gc.collect()
    assert model.adata.n_obs == len(LABELS)
    perturbed(model)


def test_a_manager_takes_its_data_to_another_process(make_screen):
    model = create(make_screen(LABELS))
    copy = pickle.loads(pickle.dumps(model.adata_manager))
    gc.collect()
    np.testing.assert_array_equal(registered_labels(copy).codes, CODES)
