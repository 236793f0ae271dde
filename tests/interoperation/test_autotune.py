"""Settings searched by scvi-tools' autotune."""

import numpy as np
import pytest
import scvi

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen

METRIC = "reconstruction_loss_validation"


@pytest.fixture
def tune():
    tune = pytest.importorskip("ray.tune")
    pytest.importorskip("hyperopt")
    # scvi-tools 1.4.2 does not import its autotune without.
    pytest.importorskip("scib_metrics")
    yield tune
    pytest.importorskip("ray").shutdown()
    scvi.settings.seed = None


def test_autotune_finds_settings(tune, tmp_path):
    from scvi.autotune import run_autotune

    adata = simulate_screen(n_genes=20, n_controls=60, n_perturbations=3, n_combinations=0)
    SAMSVAE.setup_anndata(adata)
    experiment = run_autotune(
        SAMSVAE,
        adata,
        metrics=METRIC,
        mode="min",
        search_space={
            "model_params": {"n_latent": tune.choice([2, 5]), "n_hidden": 16},
            "train_params": {
                "max_epochs": 3,
                "batch_size": 64,
                "plan_kwargs": {"lr": tune.loguniform(1e-3, 1e-2)},
            },
        },
        num_samples=2,
        scheduler="fifo",
        seed=0,
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
    )
    table = experiment.result_grid.get_dataframe()
    assert len(table) == 2
    assert experiment.result_grid.num_errors == 0
    assert np.isfinite(table[METRIC]).all()
    best = experiment.result_grid.get_best_result(METRIC, "min")
    assert best.metrics[METRIC] == table[METRIC].min()
    model = SAMSVAE(adata, **best.config["model_params"])
    assert model.module.n_latent == best.config["model_params"]["n_latent"]
