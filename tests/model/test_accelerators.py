"""Models that train and answer as on an accelerator, on the device of a processor."""

import numpy as np
import torch

from model.builders import TRAINING
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen


def train(seed):
    adata = simulate_screen(
        n_genes=60,
        n_controls=200,
        n_perturbations=6,
        cells_per_perturbation=60,
        n_combinations=2,
        cells_per_combination=30,
        n_latent=4,
        mask_probability=0.4,
        library_size=600.0,
    )
    torch.manual_seed(seed)
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=6, n_hidden=32, effect_n_hidden=16)
    model.train(max_epochs=30, data_on_device=True, **(TRAINING | {"plan_kwargs": {}}))
    return model


def test_bound_and_effects_are_those_of_a_processor(monkeypatch):
    """Other random numbers, as other rows are drawn: within what seeds differ by."""
    ends, effects = {}, {}
    for is_accelerator in (False, True):
        monkeypatch.setattr(
            "scvi_sams._torch.is_accelerator", lambda device, answer=is_accelerator: answer
        )
        models = [train(seed) for seed in range(3)]
        ends[is_accelerator] = [float(m.history["elbo_validation"].iloc[-1, 0]) for m in models]
        effects[is_accelerator] = [m.predict_ate(n_samples=300).X for m in models]
    here, there = np.array(ends[True]), np.array(ends[False])
    assert abs(here.mean() - there.mean()) < 3 * max(here.std(ddof=1), there.std(ddof=1))
    for one, other in zip(effects[True], effects[False], strict=True):  # of one seed
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98
