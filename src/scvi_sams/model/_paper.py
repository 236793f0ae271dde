"""The models as published: settings, objective and optimiser in one value."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

from scvi_sams._checks import check_integer
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._sams_vae import SAMSVAE

_MODEL: dict[str, Any] = {
    "n_latent": 50,
    "n_hidden": 400,
    "n_layers": 1,
    "gene_likelihood": "nb",
    "n_particles": 5,
    "kl_estimator": "monte_carlo",
    # The plain bound of appendix A.1.
    "global_kl_weight": 1.0,
    "evidence_cells": None,
    "correlated_basal": True,
    "correlated_effects": True,
    "effect_prior_scale": 1.0,
    "effect_n_hidden": 200,
    "effect_n_layers": 2,
    "mask_prior_probability": 0.1,
    "mask_prior_concentration": None,
    "mask_prior_beta": 5.0,
    # Logits start at 0; straight-through gradients of a relaxed Bernoulli.
    "mask_initial_probability": 0.5,
    "mask_temperature": 1.0,
    "direct_effects": False,
    "stacking": False,
}
_PLAN: dict[str, Any] = {
    "lr": 3e-4,
    "table_lr": 3e-4,
    "lr_schedule": "constant",
    "dense_fraction": 0.0,
    "max_curvature": None,
    "eps": 1e-8,
    "weight_decay": 1e-6,
    "n_epochs_kl_warmup": None,
    "n_steps_kl_warmup": None,
}


class PaperSettings(NamedTuple):
    """Arguments of a model and of its training; see :func:`paper_settings`."""

    model: dict[str, Any]
    """Arguments of the model class, besides ``adata``."""
    train: dict[str, Any]
    """Arguments of ``train``."""


def paper_settings(
    model_class: type[PerturbationModel] = SAMSVAE, *, n_steps: int = 30_000
) -> PaperSettings:
    """Return the settings of the SAMS-VAE paper, instead of the defaults of this package.

    The plain evidence lower bound with Monte Carlo divergences, five particles and Adam at a
    constant learning rate, masks trained from the start: without dense phase, rotation, latents
    that are switched off, coarsened evidence, direct effects and stacking. All are ordinary
    arguments, and can be changed before they are passed on.

    Parameters
    ----------
    model_class
        :class:`SAMSVAE`, or one of the comparators of the paper (:class:`CPAVAE`,
        :class:`SVAEPlus`, :class:`ConditionalVAE`).
    n_steps
        Number of training steps, with 512 cells each.

    Returns
    -------
    ``model``, the arguments of the class, and ``train``, those of :meth:`SAMSVAE.train`. Each call
    returns new dicts.

    Raises
    ------
    InvalidArgumentError
        If ``model_class`` is not a model of this package, or ``n_steps`` not a positive integer.

    Notes
    -----
    Bereket & Karaletsos, NeurIPS 2023, arXiv 2311.02794, sections 3 and 4 and appendix A.1. The
    following are not in the text of the paper, and assumed: 50 latent dimensions, an effect prior
    of scale 1 (that of z_basal), a mask prior of 0.1, for SVAE+ ``K_2 = 5`` (of 2, 5 and 10 that
    they tried), and 30,000 steps. The paper's four variants differ in ``correlated_basal`` and
    ``correlated_effects`` (here both). The network of correlated effects is that of its Replogle
    screen; on the Norman screen it was ``effect_n_hidden=400, effect_n_layers=4``.

    Remaining differences concern initial values and the form of the posterior, not the objective:
    the decoder's first layer starts at 0.4 times PyTorch's weights, effects with an SD of 0.1; an
    encoder with the shift as input predicts the full state and subtracts the shift; weight decay is
    not applied to tables (mask logits, effects, dispersions).

    Examples
    --------
    >>> paper = scvi_sams.paper_settings(n_steps=2)
    >>> scvi_sams.SAMSVAE.setup_anndata(adata)
    >>> published = scvi_sams.SAMSVAE(adata, **paper.model | {"n_latent": 6})
    >>> published.train(**paper.train, enable_progress_bar=False)

    Masks have their KL term from the first step:

    >>> float(published.history["dense_phase"].to_numpy().max())
    0.0
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PerturbationModel)):
        raise InvalidArgumentError(
            f"`model_class` must be a model of this package, such as SAMSVAE, not {model_class!r}."
        )
    check_integer(n_steps=n_steps)
    known = signature(model_class).parameters
    train = {
        "max_epochs": n_steps,  # an epoch has at least one step
        "max_steps": n_steps,
        "batch_size": 512,
        "gradient_clip_val": 100.0,
        "early_stopping": False,
        "plan_kwargs": dict(_PLAN),
    }
    return PaperSettings({name: v for name, v in _MODEL.items() if name in known}, train)
