import anndata as ad
import pytest
import scanpy as sc
import scvi

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen


@pytest.fixture(scope="session")
def model():
    """Trained for some seconds: enough to predict strong effects."""
    scvi.settings.seed = 0
    adata = simulate_screen(
        n_genes=60,
        n_controls=200,
        n_perturbations=6,
        cells_per_perturbation=80,
        n_combinations=3,
        cells_per_combination=40,
        n_latent=4,
        mask_probability=0.4,
        library_size=1000.0,
    )
    adata.var_names = [f"G{number:03d}" for number in range(60)]
    SAMSVAE.setup_anndata(adata)
    trained = SAMSVAE(adata, n_latent=6, n_hidden=64)
    trained.train(max_epochs=30, batch_size=128, accelerator="cpu", enable_progress_bar=False)
    yield trained
    scvi.settings.seed = None


@pytest.fixture
def observed(model):
    """Log-normalised cells as other packages expect them."""
    cells = ad.AnnData(model.adata.X.copy(), obs=model.adata.obs[["perturbation"]].copy())
    cells.var_names = model.adata.var_names
    return normalised(cells)


@pytest.fixture
def predicted(model, observed):
    """Drawn cells of every perturbation, beside the observed control cells."""
    scvi.settings.seed = 1
    cells = model.predict(list(model.perturbations), output="counts")
    controls = observed[observed.obs["perturbation"] == "control"]
    return ad.concat([normalised(cells), controls], index_unique="-")


def normalised(cells):
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells
