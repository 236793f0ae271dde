"""Small trained models, each made once; tests that change a model make their own."""

import pytest

from model.builders import COVARIATES, VARIANTS, small_screen, train_small


@pytest.fixture(scope="session", params=VARIANTS, ids=str)
def any_variant(request):
    return train_small(small_screen(), **VARIANTS[request.param])


@pytest.fixture(scope="session")
def mean_field():
    return train_small(small_screen(), **VARIANTS["mean field"])


@pytest.fixture(scope="session")
def default_model():
    return train_small(small_screen())


@pytest.fixture(scope="session")
def dosage_model():
    adata = small_screen(dosages=[0.5, 1.0, 2.0])
    return train_small(adata, {"dosage_key": "dosage"})


@pytest.fixture(scope="session")
def covariate_model():
    return train_small(small_screen(), COVARIATES)


@pytest.fixture(scope="session")
def size_factor_model():
    return train_small(small_screen(), {"size_factor_key": "transcriptome"})


@pytest.fixture(scope="session")
def poisson_model():
    return train_small(small_screen(), gene_likelihood="poisson")


@pytest.fixture(scope="session")
def normal_model():
    return train_small(small_screen(), {"layer": "normalised"}, gene_likelihood="normal")
