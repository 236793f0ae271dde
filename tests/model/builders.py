"""Small screens, trained models, and the decoder in numpy, for the tests of what users get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import softmax

from scvi_sams import SAMSVAE, SVAEPlus
from scvi_sams.datasets import simulate_screen

SHIFTS_ONLY = {"direct_effects": False, "stacking": False}
"""The paper's model: whatever perturbations do they do by shifts, so that the decoder in numpy
predicts it. With the defaults of the models predictions have a term more (test_direct_effects)."""

VARIANTS = {
    "mean field": SHIFTS_ONLY | {"correlated_basal": False, "correlated_effects": False},
    "correlated basal": SHIFTS_ONLY | {"correlated_basal": True, "correlated_effects": False},
    "correlated effects": SHIFTS_ONLY | {"correlated_basal": False, "correlated_effects": True},
    "both correlated": SHIFTS_ONLY | {"correlated_basal": True, "correlated_effects": True},
}
"""The rows of the paper's table."""

COVARIATES: dict[str, Any] = {
    "batch_key": "lane",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}
TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    # A few epochs are too few for two phases.
    "plan_kwargs": {"dense_fraction": 0.0},
}
N_LATENT = 4
_LEAKY_SLOPE = 0.01


def small_screen(**changes: Any) -> AnnData:
    """Simulate 150 cells x 24 genes, with covariates, size factor and normalised values beside."""
    sizes = {
        "n_genes": 24,
        "n_controls": 50,
        "n_perturbations": 4,
        "cells_per_perturbation": 18,
        "n_combinations": 2,
        "cells_per_combination": 14,
        "n_latent": N_LATENT,
        "library_size": 300.0,
        "seed": 3,
    }
    adata = simulate_screen(**(sizes | changes))
    rng = np.random.default_rng(0)
    # Controls first would let a mix-up of rows pass.
    adata = adata[rng.permutation(adata.n_obs)].copy()
    adata.obs["lane"] = pd.Categorical(rng.choice(["lane_b", "lane_a"], adata.n_obs))
    adata.obs["donor"] = pd.Categorical(rng.choice(["d1", "d2", "d3"], adata.n_obs))
    adata.obs["age"] = rng.normal(size=adata.n_obs)
    counts = adata.X.toarray()
    adata.obs["transcriptome"] = counts.sum(axis=1) * rng.uniform(5, 20, adata.n_obs) / 1e4
    adata.layers["normalised"] = np.log1p(100 * counts / counts.sum(axis=1, keepdims=True))
    return adata


def train_small(
    adata: AnnData,
    setup: dict[str, Any] | None = None,
    *,
    max_epochs: int = 2,
    spread: bool = True,
    train: dict[str, Any] | None = None,
    model_cls: Any = SAMSVAE,
    **model_kwargs: Any,
) -> Any:
    """Register, build and train a small model.

    Parameters
    ----------
    spread
        Give the parameters values far apart after training, as after a long training, so that a
        term that is left out or added twice shows.
    model_cls
        Which model.
    """
    model_cls.setup_anndata(adata, **(setup or {}))
    torch.manual_seed(0)
    sizes = {"n_latent": N_LATENT, "n_hidden": 16}
    if model_cls is SAMSVAE:
        sizes["effect_n_hidden"] = 8
    model = model_cls(adata, **(sizes | model_kwargs))
    model.train(max_epochs=max_epochs, **(TRAINING | (train or {})))
    if spread:
        _spread_parameters(model)
    return model


def _spread_parameters(model: Any) -> None:
    rng = np.random.default_rng(1)
    scales = dict.fromkeys(["masks.logits", "effects.loc", "effects.log_scale", "means"], 1.5)
    with torch.no_grad():
        for name, parameter in sorted(model.module.named_parameters()):
            scale = scales.get(
                name, (0.3 if "log_variance" in name else 1) / parameter.shape[-1] ** 0.5
            )
            if name != "decoder.to_genes.bias" and not name.startswith("likelihood"):
                values = rng.normal(scale=scale, size=parameter.shape)
                parameter.copy_(torch.as_tensor(values, dtype=torch.float32))


def set_effects(model: SAMSVAE, effects: np.ndarray, scale: float | np.ndarray = 1e-6) -> None:
    """Give mean-field effects these means and standard deviations, with every mask on."""
    with torch.no_grad():
        model.module.masks.logits.fill_(40.0)
        model.module.effects.loc.copy_(torch.as_tensor(effects))
        scales = np.broadcast_to(scale, effects.shape)
        model.module.effects.log_scale.copy_(torch.as_tensor(np.log(scales)))


def make_decoder_linear(model: SAMSVAE, weight: np.ndarray, bias: np.ndarray) -> None:
    """Make the decoder ``weight @ z + bias``: leaky_relu(a) - leaky_relu(-a) = (1 + slope) a.

    Parameters
    ----------
    weight
        Genes x latent dimensions.
    bias
        One value per gene.
    """
    decoder = model.module.decoder
    identity = np.eye(weight.shape[1])
    weight = weight / (1 + _LEAKY_SLOPE)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        n_units = 2 * weight.shape[1]
        decoder.from_z.weight[:n_units] = torch.as_tensor(np.concatenate([identity, -identity]))
        decoder.to_genes.weight[:, :n_units] = torch.as_tensor(
            np.concatenate([weight, -weight], axis=1)
        )
        decoder.to_genes.bias.copy_(torch.as_tensor(bias))


def linear_normal(model_cls: Any) -> tuple[Any, np.ndarray]:
    """Train a model, then let shifts add ``weight @ shift`` to expression; returns weight too."""
    adata = small_screen()
    settings = {"gene_likelihood": "normal"} | ({} if model_cls is SVAEPlus else SHIFTS_ONLY)
    model = train_small(adata, {"layer": "normalised"}, model_cls=model_cls, **settings)
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, adata.n_vars))
    return model, weight


def copy_without_registration(adata: AnnData) -> AnnData:
    """Copy data as if it had never been registered."""
    adata = adata.copy()
    for slot in (adata.obs, adata.obsm, adata.uns):
        for key in [key for key in slot if key.startswith("_scvi")]:
            del slot[key]
    return adata


def decode(model: SAMSVAE, z: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
    """Decode in numpy: logits of the genes at ``z`` (any leading axes) with one hidden layer."""
    weights = {
        name: value.detach().cpu().numpy().astype(np.float64)
        for name, value in model.module.decoder.state_dict().items()
    }
    hidden = z @ weights["from_z.weight"].T + weights["from_z.bias"]
    if covariates is not None:
        hidden = hidden + covariates @ weights["from_covariates.weight"].T
    hidden = np.where(hidden > 0, hidden, _LEAKY_SLOPE * hidden)
    return hidden @ weights["to_genes.weight"].T + weights["to_genes.bias"]


def decode_shares(
    model: SAMSVAE, z: np.ndarray, covariates: np.ndarray | None = None
) -> np.ndarray:
    """Decode in numpy: shares of the library."""
    return softmax(decode(model, z, covariates), axis=-1)


def covariates_of(obs: pd.DataFrame) -> np.ndarray:
    """Write batch, donor and age as the networks read them: categories in alphabetical order."""
    columns = [obs["lane"] == lane for lane in ("lane_a", "lane_b")]
    columns += [obs["donor"] == donor for donor in ("d1", "d2", "d3")]
    return np.column_stack([*columns, obs["age"]]).astype(np.float64)


def shift_of(model: SAMSVAE, label: str, dosage: str | float = 1.0) -> np.ndarray:
    """Sum by hand the mean effects of a label's perturbations, each times its dose."""
    means = model.get_perturbation_effects(key_added=None).mean
    names = [name for name in label.split("+") if name != "control"]
    doses = [float(dose) for dose in str(dosage).split("+")]
    doses = doses * len(names) if len(doses) == 1 else doses
    shift = np.zeros(means.shape[1])
    for name, dose in zip(names, doses[: len(names)], strict=True):
        shift += dose * means.loc[name].to_numpy()
    return shift


def assert_within_error(estimate: Any, expected: Any, error: Any, *, n_errors: float = 5) -> None:
    """Compare a Monte-Carlo estimate with its expectation, given its standard error."""
    estimate, expected, error = (np.asarray(a, dtype=float) for a in (estimate, expected, error))
    assert estimate.shape == expected.shape
    distance = np.abs(estimate - expected)
    allowed = n_errors * error + 1e-5 * (1 + np.abs(expected))
    assert (distance <= allowed).all(), (
        f"{(distance > allowed).sum()} of {distance.size} values are off, at worst by "
        f"{(distance / allowed).max() * n_errors:.1f} standard errors"
    )
