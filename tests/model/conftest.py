"""Small trained models, each made once; tests that change a model make their own.

Those whose predictions are decoded by hand are the paper's model, without direct effects.
"""

import pytest

from model.builders import COVARIATES, SHIFTS_ONLY, VARIANTS, small_screen, train_small


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
    return train_small(small_screen(), COVARIATES, **SHIFTS_ONLY)


@pytest.fixture(scope="session")
def size_factor_model():
    return train_small(small_screen(), {"size_factor_key": "transcriptome"}, **SHIFTS_ONLY)


@pytest.fixture(scope="session")
def poisson_model():
    return train_small(small_screen(), gene_likelihood="poisson", **SHIFTS_ONLY)


@pytest.fixture(scope="session")
def normal_model():
    setup = {"layer": "normalised"}
    return train_small(small_screen(), setup, gene_likelihood="normal", **SHIFTS_ONLY)
