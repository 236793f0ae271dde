"""What models of scvi-tools have and these have not says why, and what to use instead."""

import inspect

import numpy as np
import pytest
from scvi.model import SCVI

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import NotSupportedError, SAMSError
from scvi_sams.model._not_supported import NOT_SUPPORTED

CLASSES = (SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE)
KNOWN = {"minified_data_type"}  # a property that says "not minified"


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_it_says_why_and_counts_as_not_there(default_model, name):
    with pytest.raises(NotSupportedError, match=f"SAMSVAE has no `{name}`: .{{20,}}"):
        getattr(default_model, name)
    for model_class in CLASSES:
        with pytest.raises(NotSupportedError, match=f"{model_class.__name__} has no `{name}`"):
            getattr(model_class, name)
        assert not hasattr(model_class, name)


def test_every_public_method_of_scvi_is_there_or_says_why():
    public = {name for name, _ in inspect.getmembers(SCVI) if not name.startswith("_")}
    assert {name for name in public if not hasattr(SAMSVAE, name)} - KNOWN <= set(NOT_SUPPORTED)


def test_what_is_named_instead_exists():
    for reason in NOT_SUPPORTED.values():
        for word in ("get_iwelbo", "get_normalized_expression", "posterior_predictive_sample"):
            assert word not in reason or hasattr(SAMSVAE, word)


def test_the_posterior_of_basal_states_has_mean_and_variance(default_model):
    cells = [5, 2, 9, 2]
    mean, variance = default_model.get_latent_representation(indices=cells, return_dist=True)
    np.testing.assert_array_equal(
        mean, default_model.get_latent_representation(indices=cells, key_added=None)
    )
    draws = default_model.get_latent_representation(
        indices=cells, give_mean=False, mean_shifts=True, n_samples=4000, key_added=None
    )
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.12)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.1)


def test_the_variance_of_perturbed_states_is_no_posterior_of_one_cell(default_model):
    with pytest.raises(SAMSError, match="`return_dist` is for basal states"):
        default_model.get_latent_representation(representation="perturbed", return_dist=True)
