"""What an experiment of the SAMS-VAE paper is, and the settings that all three share.

Bereket & Karaletsos, NeurIPS 2023, arXiv 2311.02794. The paper's objective and optimiser, not the
defaults of this package: the plain ELBO (no coarsened evidence), no dense phase and no rotation,
Monte-Carlo divergences, one constant learning rate for networks and tables.

A comment that begins with "Assumed" marks what could not be learned from the text of the paper.
Some choices of this package have no argument that undoes them: the decoder's first layer starts at
0.4 times PyTorch's initial weights, and effects with a standard deviation of 0.1; an encoder that
sees the shift predicts the whole state and takes the shift away from it; weight decay spares tables
(mask logits, effects, dispersions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scvi_sams.evaluation import Split


@dataclass(frozen=True)
class Model:
    """A row of the table: a model class and its arguments."""

    model_class: type
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """Arguments of ``train``; ``plan`` is for the training plan."""

    n_steps: int
    batch_size: int
    gradient_clip_val: float
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Scoring:
    """How many samples the two scores rest on."""

    n_importance_samples: int
    n_ate_draws: int


@dataclass(frozen=True)
class Published:
    """A row of the paper's table; ``None`` where there is no number to stand beside."""

    model: str
    fraction: float | None
    iwelbo: float | None
    ate_pearson: float | None


@dataclass(frozen=True)
class Experiment:
    """An experiment: everything but the data, which the user brings.

    ``split`` takes labels, ``seed``, ``control``, ``delimiter`` and, unless ``fractions`` is
    ``None``, a ``fraction``. Where there is a ``reference``, the published IWELBOs are differences
    to that of this model and fraction.
    """

    models: Mapping[str, Model]
    split: Callable[..., Split]
    fractions: tuple[float, ...] | None
    delimiter: str | None
    published: tuple[Published, ...]
    reference: tuple[str, float] | None
    seeds: tuple[int, ...]
    training: Training
    scoring: Scoring


NETWORKS: dict[str, Any] = {
    "n_hidden": 400,
    "n_layers": 1,
    "gene_likelihood": "nb",
    "n_particles": 5,
    "kl_estimator": "monte_carlo",
    # Assumed: the number of latent dimensions, here the default of this package.
    "n_latent": 50,
}
"""Arguments of every model."""

ELBO: dict[str, Any] = {"evidence_cells": None, "global_kl_weight": 1.0}
"""Arguments of every model with global variables: the objective of appendix A.1 as it is."""

EFFECTS: dict[str, Any] = {"effect_prior_scale": 1.0}
"""Arguments of SAMS-VAE and CPA-VAE. Assumed: beta = 1, the scale of z_basal."""

MASKS: dict[str, Any] = {"mask_initial_probability": 0.5, "mask_temperature": 1.0}
"""Arguments of SAMS-VAE and SVAE+: logits start at 0, straight-through relaxed Bernoulli."""

# Assumed: alpha, here the default of this package.
BERNOULLI_PRIOR: dict[str, Any] = {
    "mask_prior_probability": 0.1,
    "mask_prior_concentration": None,
}
"""Arguments of SAMS-VAE."""

# Assumed: K_2 = 5 of the values 2, 5 and 10 that were tried.
BETA_PRIOR: dict[str, Any] = {"mask_prior_beta": 5.0}
"""Arguments of SVAE+."""

TRAINING = Training(
    # Assumed: that all three experiments took as many steps, and that the last one is scored.
    n_steps=30_000,
    batch_size=512,
    gradient_clip_val=100.0,
    plan={
        "lr": 3e-4,
        "table_lr": 3e-4,
        "lr_schedule": "constant",
        "dense_fraction": 0.0,
        "eps": 1e-8,
        "weight_decay": 1e-6,
        "n_epochs_kl_warmup": None,
        "n_steps_kl_warmup": None,
    },
)

SCORING = Scoring(n_importance_samples=100, n_ate_draws=2500)

# Assumed: the number of runs, and that each has its own split and initial weights.
SEEDS = (0, 1, 2)
