"""Checks of what a model is made of: sizes, priors, choices."""

from __future__ import annotations

from scvi_sams._checks import check_bool, check_choice, check_integer, check_number
from scvi_sams.module._likelihoods import LIKELIHOODS

_WHOLE = {"n_latent", "n_hidden", "n_layers", "effect_n_hidden", "effect_n_layers", "n_particles"}
_POSITIVE = {"effect_prior_scale", "mask_temperature"}
_POSITIVE_OR_NONE = {"mask_prior_concentration", "evidence_cells"}
_SHARES = {"mask_prior_probability", "mask_initial_probability"}
_FLAGS = {"correlated_basal", "correlated_effects"}


def validate_settings(**settings: object) -> None:
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
            check_integer(**argument)  # type: ignore[arg-type]
        elif name in _POSITIVE or (name in _POSITIVE_OR_NONE and value is not None):
            check_number(above=0, **argument)  # type: ignore[arg-type]
        elif name in _SHARES:
            check_number(above=0, below=1, **argument)  # type: ignore[arg-type]
        elif name == "global_kl_weight":
            check_number(at_least=0, **argument)  # type: ignore[arg-type]
        elif name == "mask_prior_beta":
            check_number(above=1, **argument)  # type: ignore[arg-type]
        elif name == "kl_estimator":
            check_choice(name, value, ("closed_form", "monte_carlo"))
        elif name == "gene_likelihood":
            check_choice(name, value, list(LIKELIHOODS))
        elif name in _FLAGS:
            check_bool(**argument)
