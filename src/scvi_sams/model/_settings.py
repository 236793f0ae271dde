"""Checks of what a model is made of: sizes, priors, choices."""

from __future__ import annotations

from scvi_sams._arguments import (
    refuse_other_choices,
    refuse_other_than_flag,
    refuse_other_than_number,
    refuse_other_than_whole,
)
from scvi_sams.module import LIKELIHOODS

_WHOLE = {"n_latent", "n_hidden", "n_layers", "effect_n_hidden", "effect_n_layers", "n_particles"}
_POSITIVE = {"effect_prior_scale", "mask_temperature"}
_POSITIVE_OR_NONE = {"mask_prior_concentration", "evidence_cells"}
_SHARES = {"mask_prior_probability", "mask_initial_probability"}
_FLAGS = {"correlated_basal", "correlated_effects"}


def refuse_invalid_settings(**settings: object) -> None:
    """Raise an error if a setting of a model is of the wrong type or out of range.

    Parameters
    ----------
    **settings
        Arguments of the model and its module, by name; those that are not known are passed over.

    Raises
    ------
    InvalidArgumentError
        Naming the setting, its value and what it may be.
    """
    for name, value in settings.items():
        argument = {name: value}
        if name in _WHOLE:
            refuse_other_than_whole(**argument)  # type: ignore[arg-type]
        elif name in _POSITIVE or (name in _POSITIVE_OR_NONE and value is not None):
            refuse_other_than_number(above=0, **argument)  # type: ignore[arg-type]
        elif name in _SHARES:
            refuse_other_than_number(above=0, below=1, **argument)  # type: ignore[arg-type]
        elif name == "global_kl_weight":
            refuse_other_than_number(at_least=0, **argument)  # type: ignore[arg-type]
        elif name == "mask_prior_beta":
            refuse_other_than_number(above=1, **argument)  # type: ignore[arg-type]
        elif name == "kl_estimator":
            refuse_other_choices(name, value, ("closed_form", "monte_carlo"))
        elif name == "gene_likelihood":
            refuse_other_choices(name, value, list(LIKELIHOODS))
        elif name in _FLAGS:
            refuse_other_than_flag(**argument)
