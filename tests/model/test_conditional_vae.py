"""Conditional VAE as users call it: predictions in numpy, and what it does not have."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from model.builders import (
    N_LATENT,
    SHIFTS_ONLY,
    assert_within_error,
    decode,
    small_screen,
    train_small,
)
from scvi_sams import ConditionalVAE
from scvi_sams.exceptions import SAMSError

SINGLES = ["P001", "P002", "P003", "P004"]


@pytest.fixture(scope="module")
def conditional():
    return train_small(small_screen(), model_cls=ConditionalVAE, **SHIFTS_ONLY)


def test_conditional_predictions_are_those_of_the_dosed_sum_of_rows(conditional):
    """Cells keep their state, as encoded with their own rows; compared in numpy."""
    labels, dosages = ["P002", "P001+P004"], ["2", "0.5+3"]
    rows = conditional.module.decoder_rows.detach().numpy().astype(np.float64)
    added = [2 * rows[1], 0.5 * rows[0] + 3 * rows[3]]
    controls = np.flatnonzero(conditional.adata.obs["perturbation"] == "control")[:20]
    n_draws = 250
    rates = np.zeros((2, 20, conditional.adata.n_vars))
    for seed in range(n_draws):
        torch.manual_seed(seed)
        drawn = conditional.predict(
            labels, indices=controls, dosages=dosages, output="rate", adata=conditional.adata
        )
        rates += drawn.X.reshape(rates.shape) / n_draws
    cells = next(conditional._read(None, controls, None).cells())[1]
    with torch.no_grad():
        qz = conditional.module.encode(cells.x, torch.zeros(1, 1, 32), None)
    noise = np.random.default_rng(0).normal(size=(n_draws, 20, N_LATENT))
    z = qz.loc.numpy() + qz.scale.numpy() * noise
    weights = conditional.module.decoder.state_dict()
    first = z @ weights["from_z.weight"].numpy().T + weights["from_z.bias"].numpy()
    for label, row in enumerate(added):
        hidden = first + row
        hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        logits = hidden @ weights["to_genes.weight"].numpy().T + weights["to_genes.bias"].numpy()
        shares = softmax(logits, axis=-1)
        error = shares.std(0) * (2 / n_draws) ** 0.5
        assert_within_error(rates[label], shares.mean(0), error, n_errors=6)


def test_zero_rows_predict_the_same_for_all_perturbations():
    model = train_small(small_screen(), model_cls=ConditionalVAE, **SHIFTS_ONLY)
    with torch.no_grad():
        model.module.encoder_rows.zero_()
        model.module.decoder_rows.zero_()
    for method in ("mean", "lognorm"):
        ate = model.predict_ate([*SINGLES, "P001+P002"], method=method, key_added=None)
        assert not ate.X.any()
        assert not ate.layers["standard_error"].any()
    torch.manual_seed(0)
    cells = model.predict([*SINGLES, "control"], output="rate").X.reshape(5, -1, 24)
    for values in cells:
        np.testing.assert_array_equal(values, cells[0])


def test_conditional_effects_from_the_prior_match_a_hand_computation(conditional):
    row = conditional.module.decoder_rows[2].detach().numpy()
    ate = conditional.predict_ate(["P003"], method="mean", n_samples=20_000, key_added=None)
    z = np.random.default_rng(0).normal(size=(20_000, N_LATENT))
    weights = conditional.module.decoder.state_dict()
    first = z @ weights["from_z.weight"].numpy().T + weights["from_z.bias"].numpy() + row
    hidden = np.where(first > 0, first, 0.01 * first)
    logits = hidden @ weights["to_genes.weight"].numpy().T + weights["to_genes.bias"].numpy()
    effects = 1e4 * (softmax(logits, axis=-1) - softmax(decode(conditional, z), axis=-1))
    error = np.hypot(effects.std(0) / len(z) ** 0.5, ate.layers["standard_error"][0])
    assert_within_error(ate.X[0], effects.mean(0), error)


def test_conditional_basal_states_of_controls_need_no_rows(conditional):
    torch.manual_seed(0)
    from_controls = conditional.predict_ate(["P001"], basal="control", method="mean")
    assert from_controls.uns["ate"]["basal"] == "control"
    assert np.abs(from_controls.X).max() > 1


def test_the_conditional_vae_has_no_perturbed_state(conditional):
    with pytest.raises(SAMSError, match="ConditionalVAE has no perturbed state"):
        conditional.get_latent_representation(representation="perturbed")
