"""Checks of the arguments of a model, before any of them is used."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.train._plan import PerturbationTrainingPlan

_OTHER_NAMES = {
    "n_latents": "n_latent",
    "latent_dim": "n_latent",
    "n_components": "n_latent",
    "hidden_dim": "n_hidden",
    "likelihood": "gene_likelihood",
}


def check_known_arguments(model_class: Any, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise if ``model_class(*given, **named)`` has an unknown argument."""
    if not given and not named:  # the model is being copied
        return
    own = signature(model_class.__init__)
    takes_all = any(one.kind == one.VAR_KEYWORD for one in own.parameters.values())
    for name in named:
        if name not in own.parameters and not takes_all:
            told = f"{model_class.__name__} has no setting `{name}`."
            raise InvalidArgumentError(f"{told} {_advice(name, model_class)}".rstrip())
    try:
        own.bind(None, *given, **named)
    except TypeError as error:
        raise InvalidArgumentError(
            f"{model_class.__name__}: {error}. Pass settings by name, such as n_latent=20."
        ) from None


def _advice(name: str, model_class: Any) -> str:
    """Where an unknown argument of a model belongs; empty if unclear."""
    own = [one for one in signature(model_class.__init__).parameters if one != "self"]
    setup, train = (
        signature(function).parameters
        for function in (model_class.setup_anndata, model_class.train)
    )
    meant = _OTHER_NAMES.get(name, name)
    if meant in own:
        return f"Did you mean `{meant}`?"
    if meant in setup:
        return f"It is one of {model_class.__name__}.setup_anndata: {meant}=..."
    if meant in train:
        return f"It is one of train: train({meant}=...)."
    if meant in signature(PerturbationTrainingPlan.__init__).parameters:
        return f"It is one of the training plan: train(plan_kwargs={{{meant!r}: ...}})."
    near = difflib.get_close_matches(name, own, n=2)
    if near:
        return f"Did you mean {' or '.join(f'`{one}`' for one in near)}?"
    return f"Its settings are {', '.join(one for one in own if one not in ('adata', 'registry'))}."
