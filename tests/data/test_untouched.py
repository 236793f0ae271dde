"""Whatever is refused is refused with a typed error, and leaves the AnnData exactly as it was."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scvi_sams import SAMSVAE, exceptions

LABELS = ["control", "A", "B", "A+B"] * 6
SETUP = {
    "layer": "counts",
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
    "size_factor_key": "size",
}


class Case(NamedTuple):
    """Something wrong with data or arguments, and the error that it deserves."""

    error: type[exceptions.SAMSError]
    spoil: Callable[[AnnData], AnnData]
    arguments: Mapping[str, Any] = MappingProxyType({})


def column(key, value, row=1):
    """Set one value of a column of obs."""

    def spoil(adata):
        values = list(adata.obs[key])
        values[row] = value
        adata.obs[key] = pd.Series(values, index=adata.obs_names)
        return adata

    return spoil


def count(value, row=1):
    """Set one count, or all counts of a cell if it is zero."""

    def spoil(adata):
        counts = adata.layers["counts"].toarray()
        counts[row, slice(None) if value == 0 else 0] = value
        adata.layers["counts"] = sparse.csr_matrix(counts)
        return adata

    return spoil


def without(slot, key):
    def spoil(adata):
        del getattr(adata, slot)[key]
        return adata

    return spoil


def matrix(values, **uns):
    def spoil(adata):
        adata.obsm["dosage"] = values
        adata.uns.update(uns)
        return adata

    return spoil


def csr_with_explicit_zeros(value=1.0):
    """Build what a careless reader would tidy in place."""
    indptr = [0, 1, 2, 4, *[4] * (len(LABELS) - 3)]
    return sparse.csr_matrix((np.float32([0, value, 0, 1]), [1, 0, 0, 1], indptr), shape=(24, 2))


ANY_TIME = {
    "NaN label": Case(exceptions.InvalidPerturbationLabelError, column("perturbation", np.nan)),
    "empty name": Case(exceptions.InvalidPerturbationLabelError, column("perturbation", "A+")),
    "repeated name": Case(exceptions.InvalidPerturbationLabelError, column("perturbation", "A+A")),
    "no labels": Case(exceptions.MissingKeyError, without("obs", "perturbation")),
    "no layer": Case(exceptions.MissingKeyError, without("layers", "counts")),
    "no batch": Case(exceptions.MissingKeyError, without("obs", "batch")),
    "no category": Case(exceptions.MissingKeyError, without("obs", "donor")),
    "no covariate": Case(exceptions.MissingKeyError, without("obs", "age")),
    "no size factor": Case(exceptions.MissingKeyError, without("obs", "size")),
    "NaN batch": Case(exceptions.SAMSError, column("batch", None)),
    "NaN category": Case(exceptions.SAMSError, column("donor", None)),
}
OBSM = {"dosage_obsm_key": "dosage"}
AT_SETUP = ANY_TIME | {
    "no control": Case(exceptions.MissingControlError, lambda adata: adata, {"control": "NT"}),
    "no doses": Case(exceptions.MissingKeyError, lambda adata: adata, {"dosage_key": "dose"}),
    "bad dose": Case(exceptions.InvalidDosageError, column("age", -1.0), {"dosage_key": "age"}),
    "no guides": Case(exceptions.MissingKeyError, lambda adata: adata, {"guide_key": "guide"}),
    "a guide of all cells": Case(
        exceptions.InvalidPerturbationLabelError, lambda adata: adata, {"guide_key": "donor"}
    ),
    "no contexts": Case(exceptions.MissingKeyError, lambda adata: adata, {"context_key": "line"}),
    "perturbations as contexts": Case(
        exceptions.InvalidArgumentError, lambda adata: adata, {"context_key": "perturbation"}
    ),
    "NaN context": Case(
        exceptions.InvalidCovariateError,
        column("donor", None),
        {"context_key": "donor", "categorical_covariate_keys": None},
    ),
    "a context per cell": Case(
        exceptions.InvalidCovariateError, lambda adata: adata, {"context_key": "age"}
    ),
    "no matrix": Case(exceptions.MissingKeyError, lambda adata: adata, OBSM),
    "no names": Case(exceptions.InvalidDosageError, matrix(csr_with_explicit_zeros()), OBSM),
    "no names in uns": Case(
        exceptions.MissingKeyError,
        matrix(csr_with_explicit_zeros()),
        OBSM | {"perturbation_names": "names"},
    ),
    "wrong number of names": Case(
        exceptions.InvalidDosageError,
        matrix(csr_with_explicit_zeros(), names=["A"]),
        OBSM | {"perturbation_names": "names"},
    ),
    "negative dose in csr": Case(
        exceptions.InvalidDosageError,
        matrix(csr_with_explicit_zeros(-1)),
        OBSM | {"perturbation_names": ["A", "B"]},
    ),
    "NaN batch beside csr": Case(
        exceptions.SAMSError,
        lambda adata: column("batch", None)(matrix(csr_with_explicit_zeros())(adata)),
        OBSM | {"perturbation_names": ["A", "B"]},
    ),
}
COUNTS = {
    "negative count": Case(exceptions.InvalidCountsError, count(-1)),
    "fractional count": Case(exceptions.InvalidCountsError, count(0.5)),
    "NaN count": Case(exceptions.InvalidCountsError, count(np.nan)),
    "infinite count": Case(exceptions.InvalidCountsError, count(np.inf)),
    "empty cell": Case(exceptions.InvalidCountsError, count(0)),
    "size factor 0": Case(exceptions.InvalidCountsError, column("size", 0.0)),
    "negative size factor": Case(exceptions.InvalidCountsError, column("size", -1.0)),
    "NaN size factor": Case(exceptions.InvalidCountsError, column("size", np.nan)),
    "infinite size factor": Case(exceptions.InvalidCountsError, column("size", np.inf)),
}
COVARIATES = {
    "text as size factor": Case(exceptions.SAMSError, column("size", "large")),
    "NaN covariate": Case(exceptions.SAMSError, column("age", np.nan)),
    "text as covariate": Case(exceptions.SAMSError, column("age", "old")),
}
AT_QUERY = (
    ANY_TIME
    | COUNTS
    | COVARIATES
    | {
        "unknown perturbation": Case(
            exceptions.UnknownPerturbationError, column("perturbation", "Q")
        ),
        "unseen batch": Case(exceptions.SAMSError, column("batch", "z")),
        "unseen category": Case(exceptions.SAMSError, column("donor", "z")),
        "fewer genes": Case(exceptions.MissingKeyError, lambda adata: adata[:, :3].copy()),
        "genes in another order": Case(
            exceptions.MissingKeyError, lambda adata: adata[:, [1, 0, 2, 3]].copy()
        ),
    }
)


@pytest.fixture(scope="module")
def screen(make_screen):
    """Build a screen with all that can be registered."""

    def build():
        adata = make_screen(
            LABELS,
            batch=["x", "y"] * 12,
            donor=["p"] * 12 + ["q"] * 12,
            age=np.arange(24.0),
            size=np.arange(24) + 1.0,
        )
        adata.layers["counts"] = adata.X.copy()
        return adata

    return build


def setup(adata, **arguments):
    SAMSVAE.setup_anndata(adata, **SETUP | arguments)


def create(adata):
    setup(adata)
    return SAMSVAE(adata, n_latent=2, n_hidden=4, effect_n_hidden=4)


@pytest.fixture(scope="module")
def model(screen):
    model = create(screen())
    model.train(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    return model


def over(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@over(AT_SETUP)
def test_registration_refuses_with_a_typed_error(screen, case):
    adata = case.spoil(screen())
    with pytest.raises(case.error):
        setup(adata, **case.arguments)


@over(COUNTS | COVARIATES)
def test_a_model_refuses_values_with_a_typed_error(screen, case):
    adata = case.spoil(screen())
    with pytest.raises(case.error):
        create(adata)


@over(AT_QUERY)
def test_other_data_are_refused_with_a_typed_error(screen, model, case):
    adata = case.spoil(screen())
    with pytest.raises(case.error):
        model.get_latent_representation(adata)


@over(AT_SETUP)
@pytest.mark.parametrize("registered", [False, True], ids=["fresh", "registered"])
def test_a_refused_registration_leaves_adata_as_it_was(screen, assert_unchanged, case, registered):
    adata = screen()
    if registered:
        setup(adata)
    adata = case.spoil(adata)
    before = adata.copy()
    with pytest.raises((ValueError, KeyError, TypeError)):
        setup(adata, **case.arguments)
    assert_unchanged(adata, before)


@over(COUNTS)
def test_a_refused_model_leaves_adata_as_it_was(screen, assert_unchanged, case):
    adata = case.spoil(screen())
    setup(adata)
    before = adata.copy()
    with pytest.raises(exceptions.InvalidCountsError):
        SAMSVAE(adata)
    assert_unchanged(adata, before)


@over({name: case for name, case in AT_QUERY.items() if name not in COVARIATES} | COUNTS)
@pytest.mark.parametrize("state", ["fresh", "registered", "view"])
def test_refused_other_data_stay_as_they_were(screen, model, assert_unchanged, case, state):
    adata = screen()
    if state == "registered":
        create(adata)
    parent = adata = case.spoil(adata)
    if state == "view":
        adata = parent[:12]
    before, parent_before = adata.copy(), parent.copy()
    with pytest.raises((ValueError, KeyError, TypeError)):
        model.get_latent_representation(adata)
    assert_unchanged(adata, before)
    assert_unchanged(parent, parent_before)


@pytest.mark.parametrize("value", ["old", np.nan])
def test_a_covariate_is_refused_before_anything_is_written(screen, model, assert_unchanged, value):
    adata = column("age", value)(screen())
    before = adata.copy()
    with pytest.raises(exceptions.SAMSError):
        model.get_latent_representation(adata)
    assert_unchanged(adata, before)


@pytest.mark.parametrize("unseen", [0, 3])
def test_an_unseen_batch_is_refused_whatever_its_number(make_screen, assert_unchanged, unseen):
    adata = make_screen(LABELS, batch=[1, 2] * 12)
    SAMSVAE.setup_anndata(adata, batch_key="batch")
    model = SAMSVAE(adata, n_latent=2, n_hidden=4, effect_n_hidden=4)
    model.is_trained_ = True
    other = make_screen(["A", "B", "control"] * 3, batch=[1, unseen, 2] * 3)
    before = other.copy()
    with pytest.raises(exceptions.SAMSError, match=str(unseen)):
        model.get_latent_representation(other)
    assert_unchanged(other, before)


@pytest.mark.parametrize("case", ["fewer genes", "genes in another order"])
def test_a_refused_view_stays_a_view(screen, model, case):
    adata = screen()
    create(adata)
    view = adata[:, :3] if case == "fewer genes" else adata[:, [1, 0, 2, 3]]
    with pytest.raises(exceptions.MissingKeyError):
        model.get_latent_representation(view)
    assert view.is_view


def test_a_view_is_not_registered_and_stays_a_view(screen, assert_unchanged):
    adata = screen()
    setup(adata)
    before = adata.copy()
    view = adata[:12]
    with pytest.raises(ValueError, match="copy"):
        setup(view)
    assert view.is_view
    assert_unchanged(adata, before)


def test_refused_data_can_be_mended_and_read(screen, model):
    expected = model.get_latent_representation(screen())
    adata = count(0.5)(column("perturbation", "Q")(screen()))
    for mend in (column("perturbation", "A"), count(screen().layers["counts"][1, 0])):
        with pytest.raises(exceptions.SAMSError):
            model.get_latent_representation(adata)
        adata = mend(adata)
    np.testing.assert_array_equal(model.get_latent_representation(adata), expected)


def test_a_model_goes_on_working_after_a_refused_registration_of_its_data(screen):
    model = create(screen())
    model.is_trained_ = True
    expected = model.get_latent_representation()
    with pytest.raises(exceptions.MissingControlError):
        setup(model.adata, control="NT")
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    assert model.perturbations == ["A", "B"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no batch", ["'batch'"]),
        ("no layer", ["'counts'"]),
        ("NaN batch", ["batch", "c1"]),
        ("unseen batch", ["'z'", "'x'", "'y'"]),
        ("unseen category", ["'z'", "'p'", "'q'"]),
        ("unknown perturbation", ["'Q'", "'A', 'B'"]),
        ("fewer genes", ["1 are missing", "g3"]),
        ("genes in another order", ["order"]),
        ("NaN covariate", ["age"]),
        ("text as covariate", ["age"]),
        ("text as size factor", ["size"]),
    ],
)
def test_errors_name_what_is_wrong(screen, model, case, words):
    adata = AT_QUERY[case].spoil(screen())
    with pytest.raises(exceptions.SAMSError) as error:
        model.get_latent_representation(adata)
    for word in words:
        assert word in str(error.value)
