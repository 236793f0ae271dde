"""Data that change after they were registered raise an error wherever they are read."""

import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from model.builders import TRAINING, copy_without_registration, small_screen, train_small
from scvi_sams import SAMSVAE, tl
from scvi_sams.data._fingerprint import column_digest, values_digest
from scvi_sams.exceptions import (
    ChangedDataError,
    InvalidCountsError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

SETUP = {
    "dosage_key": "amount",
    "batch_key": "lane",
    "continuous_covariate_keys": ["age"],
    "size_factor_key": "transcriptome",
}


def screen():
    adata = small_screen()
    adata.obs["amount"] = np.linspace(0.5, 1, adata.n_obs)
    return adata


@pytest.fixture
def trained():
    return train_small(screen(), SETUP)


READERS = {
    "latent states": lambda model: model.get_latent_representation(),
    "some cells": lambda model: model.get_elbo(indices=[0, 1]),
    "counterfactual cells": lambda model: model.predict(["P001"]),
    "basal states of controls": lambda model: model.predict_ate(["P001"], basal="control"),
    "programs": lambda model: model.get_latent_programs(),
    "differential expression": lambda model: model.differential_expression(group1="P001"),
    "observed knockdown": lambda model: tl.target_knockdown(
        model, target_genes={"P001": model.get_var_names()[0]}
    ),
    "tests of cells": lambda model: model.test_perturbations(),
    "training": lambda model: model.train(max_epochs=1, **TRAINING),
}


def log_normalise(adata):
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_counts_normalised_in_place_raise_what_a_copy_raises(trained, read):
    log_normalise(trained.adata)
    copied = copy_without_registration(trained.adata)
    with pytest.raises(InvalidCountsError, match="fractional"):
        trained.get_latent_representation(copied)
    with pytest.raises(InvalidCountsError, match=r"^adata\.X changed since .*fractional"):
        read(trained)


def test_interactions_of_a_model_are_not_those_of_normalised_counts():
    model = train_small(screen(), {"batch_key": "lane"})
    log_normalise(model.adata)
    with pytest.raises(InvalidCountsError, match=r"adata\.X changed since"):
        tl.genetic_interactions(model, n_samples=20, n_posterior_samples=10)


def test_a_layer_that_shares_memory_is_found_at_registration_and_when_it_changed(caplog):
    adata = screen()
    adata.layers["counts"] = adata.X
    with caplog.at_level("WARNING", logger="scvi.sams"):
        model = train_small(adata, SETUP | {"layer": "counts"})
    assert "adata.layers['counts'] = adata.X.copy()" in caplog.text
    log_normalise(adata)
    with pytest.raises(InvalidCountsError, match=r"^adata\.layers\['counts'\] changed since"):
        model.get_elbo()


def test_a_layer_of_its_own_stays_what_it_was_and_is_not_warned_of(caplog):
    adata = screen()
    adata.layers["counts"] = adata.X.copy()
    with caplog.at_level("WARNING", logger="scvi.sams"):
        model = train_small(adata, SETUP | {"layer": "counts"})
    assert "one array" not in caplog.text
    before = model.get_latent_representation()
    log_normalise(adata)
    np.testing.assert_array_equal(model.get_latent_representation(), before)


def double_a_count(adata):
    adata.X[3, 5] += 1


def other_column(key, change):
    def edit(adata):
        adata.obs[key] = change(adata.obs[key])

    return edit


LEGAL_CHANGES = {
    "one count": (double_a_count, r"adata\.X"),
    "doses": (other_column("amount", lambda doses: doses / 2), r"adata\.obs\['amount'\]"),
    "ages": (other_column("age", lambda ages: ages + 1), r"adata\.obs\['age'\]"),
    "sizes": (other_column("transcriptome", lambda size: size * 2), r"obs\['transcriptome'\]"),
    "lanes": (other_column("lane", lambda lanes: lanes.to_numpy()[::-1]), r"obs\['lane'\]"),
    "labels": (
        other_column("perturbation", lambda labels: labels.replace("P001", "P002")),
        r"adata\.obs\['perturbation'\]",
    ),
    "fewer cells": (
        lambda adata: adata._inplace_subset_obs(np.arange(100)),
        "the number of cells",
    ),
}


@pytest.mark.filterwarnings("ignore:.*replace:FutureWarning")
@pytest.mark.parametrize(("change", "names"), LEGAL_CHANGES.values(), ids=LEGAL_CHANGES)
def test_what_could_be_registered_anew_is_not_taken_for_what_was_registered(trained, change, names):
    change(trained.adata)
    with pytest.raises(ChangedDataError, match=names):
        trained.get_latent_representation()
    with pytest.raises(ChangedDataError, match=names):
        trained.train(max_epochs=1, **TRAINING)
    assert trained.get_latent_representation(trained.adata.copy(), key_added=None).shape[1] == 4


def test_genes_filtered_sorted_or_renamed_in_place_raise_what_a_copy_raises(trained):
    adata = trained.adata
    names = adata.var_names
    adata.var_names = [f"ENSG{gene}" for gene in range(adata.n_vars)]
    with pytest.raises(MissingKeyError, match="24 are missing"):
        trained.get_latent_representation()
    adata.var_names = names
    trained.get_latent_representation()
    adata._inplace_subset_var(names[::-1])
    with pytest.raises(MissingKeyError, match="their order differs"):
        trained.predict(["P001"])
    adata._inplace_subset_var(names[:20])
    with pytest.raises(MissingKeyError, match="4 are missing"):
        trained.get_latent_programs()


def test_data_that_are_put_back_are_read_again(trained):
    counts, before = trained.adata.X.copy(), trained.get_latent_representation()
    log_normalise(trained.adata)
    with pytest.raises(SAMSError):
        trained.get_latent_representation()
    trained.adata.X = counts
    np.testing.assert_array_equal(trained.get_latent_representation(), before)


def test_the_same_values_in_another_form_are_the_same(trained):
    adata, before = trained.adata, trained.get_latent_representation()
    adata.X = adata.X.toarray().astype(np.float64)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).astype("category")
    adata.obs["lane"] = adata.obs["lane"].astype(str)
    np.testing.assert_allclose(trained.get_latent_representation(), before, atol=1e-6)


def test_labels_that_change_between_registration_and_model_raise():
    adata = screen()
    SAMSVAE.setup_anndata(adata)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).str.replace("P00", "gene")
    with pytest.raises(UnknownPerturbationError, match=r"obs\['perturbation'\] changed.*'gene1'"):
        SAMSVAE(adata, n_latent=3)


def test_a_dosage_matrix_is_compared_too():
    adata = screen()
    adata.obsm["amounts"] = np.eye(adata.n_obs)[:, :3]
    setup = {"dosage_obsm_key": "amounts", "perturbation_names": ["A", "B", "C"]}
    model = train_small(adata, setup)
    adata.obsm["amounts"][0, 0] = 0.5
    with pytest.raises(ChangedDataError, match=r"adata\.obsm\['amounts'\]"):
        model.get_elbo()


def test_other_cells_that_change_are_registered_and_checked_anew(trained):
    other = copy_without_registration(trained.adata)
    before = trained.get_latent_representation(other)
    other.obs["perturbation"] = "control"
    as_controls = trained.get_latent_representation(other)
    fresh = copy_without_registration(other)
    np.testing.assert_array_equal(as_controls, trained.get_latent_representation(fresh))
    assert np.abs(as_controls - before).max() > 0.01
    log_normalise(other)
    for _ in range(2):
        with pytest.raises(InvalidCountsError, match="fractional"):
            trained.get_latent_representation(other)


def test_what_reads_no_cells_is_indifferent_to_them():
    model = train_small(screen())
    masks = model.get_perturbation_masks()
    log_normalise(model.adata)
    pd.testing.assert_frame_equal(model.get_perturbation_masks(), masks)
    assert np.isfinite(model.predict_ate(["P001"], n_samples=20, n_posterior_samples=10).X).all()


def test_large_matrices_are_sampled_and_columns_read_in_full():
    values = np.random.default_rng(0).poisson(2.0, (5000, 500)).astype(np.float32)
    before = values_digest(values, "adata.X")
    assert values_digest(np.log1p(values), "adata.X") != before
    assert values_digest(values[::-1], "adata.X") != before
    assert values_digest(values[:, ::-1], "adata.X") != before
    labels = pd.Series(["A", "B"] * 50_000)
    changed = labels.copy()
    changed.iloc[77_777] = "A"
    assert column_digest(labels) == column_digest(labels.astype("category"))
    assert column_digest(labels) != column_digest(changed)


def test_results_name_the_genes_that_were_registered():
    model = train_small(small_screen())
    genes = model.adata.var_names.copy()
    expected = model.predict_ate(["P001"], n_samples=20, n_posterior_samples=4)
    model.adata.var_names = genes[::-1]
    found = model.predict_ate(["P001"], n_samples=20, n_posterior_samples=4)
    assert found.var_names.equals(genes)
    assert expected.var_names.equals(genes)
    assert list(model.get_var_names()) == list(genes)
    model.adata._inplace_subset_var(np.arange(5))
    assert model.predict_ate(["P001"], n_samples=20, n_posterior_samples=4).var_names.equals(genes)
