"""CPA-VAE as users call it: effects that add up, and their uncertainty."""

import numpy as np
import pandas as pd
import torch

from model.builders import N_LATENT, linear_normal
from scvi_sams import CPAVAE

EFFECTS = np.random.default_rng(5).normal(scale=1.5, size=(4, N_LATENT))


def test_cpa_effects_add_up_to_unseen_combinations_and_doses():
    model, weight = linear_normal(CPAVAE)
    with torch.no_grad():
        model.module.effects.loc.copy_(torch.as_tensor(EFFECTS))
        model.module.effects.log_scale.fill_(-14.0)
    labels = ["P001", "P002+P004", "P001+P002+P003"]
    ate = model.predict_ate(labels, dosages=["1", "0.5+2", "1"], method="mean", key_added=None)
    shifts = [EFFECTS[0], 0.5 * EFFECTS[1] + 2 * EFFECTS[3], EFFECTS[:3].sum(0)]
    np.testing.assert_allclose(ate.X, np.stack(shifts) @ weight.T, atol=2e-4)
    effects = model.get_perturbation_effects()
    np.testing.assert_allclose(effects.mean, EFFECTS, rtol=1e-5)
    np.testing.assert_allclose(effects.sd, np.exp(-14), rtol=1e-5)
    pd.testing.assert_frame_equal(model.adata.uns["sams_effects"]["mean"], effects.mean)


def test_cpa_uncertainty_of_effects_reaches_the_interval():
    model, weight = linear_normal(CPAVAE)
    with torch.no_grad():
        model.module.effects.loc.copy_(torch.as_tensor(EFFECTS))
        model.module.effects.log_scale.fill_(np.log(0.3))
    torch.manual_seed(0)
    n = 4_000
    ate = model.predict_ate(
        ["P001"], method="mean", n_posterior_samples=n, n_samples=n, key_added=None
    )
    sd = 0.3 * np.linalg.norm(weight, axis=1)
    # Samples have the posterior mean, which a linear decoder hands on without any error.
    np.testing.assert_allclose(ate.X[0], EFFECTS[0] @ weight.T, atol=1e-4 * sd.max())
    assert (ate.layers["standard_error"][0] < 1e-5 * sd).all()
    width = ate.layers["interval_high"][0] - ate.layers["interval_low"][0]
    np.testing.assert_allclose(width, 2 * 1.96 * sd, rtol=0.1)
