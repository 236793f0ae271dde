"""Expression that dask would compute later is refused with a word on what to do."""

import numpy as np
import pytest
import torch

from model.builders import TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import InvalidCountsError

da = pytest.importorskip("dask.array")


def lazy_screen():
    adata = small_screen()
    adata.X = da.from_array(adata.X.toarray(), chunks=(50, adata.n_vars))
    return adata


@pytest.mark.parametrize("place", ["X", "layer"])
def test_lazy_expression_is_refused_before_training(place):
    adata = lazy_screen()
    if place == "layer":
        adata.layers["counts"] = adata.X
    SAMSVAE.setup_anndata(adata, layer="counts" if place == "layer" else None)
    with pytest.raises(InvalidCountsError, match=r"dask\..*to_memory"):
        SAMSVAE(adata, n_latent=3, n_hidden=8)


def test_loaded_it_gives_the_numbers_of_any_other():
    scores = []
    for adata in (small_screen(), lazy_screen().to_memory()):
        SAMSVAE.setup_anndata(adata)
        torch.manual_seed(0)
        model = SAMSVAE(adata, n_latent=3, n_hidden=8)
        model.train(**TRAINING)
        torch.manual_seed(1)
        scores.append(model.get_elbo(key_added=None, return_mean=False))
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
