"""Results as tables: passed directly, stored in an AnnData, or computed by a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.labels._rows import label_rows
from scvi_sams.model._direct_effects import DirectEffectTables
from scvi_sams.model._mechanisms import Effects
from scvi_sams.model._perturbation_model import PerturbationModel

Source: TypeAlias = pd.DataFrame | AnnData | PerturbationModel
"""A table, a screen in which it is stored, or the model that computes it."""
_TABLES_OF_EFFECTS = ("standard_error", "interval_low", "interval_high")


def _as_stored(stored: Any, _: AnnData) -> Any:
    return stored


class Slot(NamedTuple):
    """Where a model writes a result, and how to read it."""

    place: str
    """``"uns"`` or ``"varm"``."""
    key: str
    call: str
    """Method that writes it, for error messages."""
    ask: Callable[[Any], Any]
    """Compute it from a model, without writing anything."""
    read: Callable[[Any, AnnData], Any] = _as_stored
    """Convert the stored result, also after writing and reading a file, to that of the method."""


def _effects(stored: Any, _: AnnData) -> Effects:
    return Effects(stored["mean"], stored["sd"])


def _programs(stored: Any, adata: AnnData) -> pd.DataFrame:
    return stored.set_axis(adata.var_names, axis=0)


def _direct_effects(stored: Any, _: AnnData) -> DirectEffectTables:
    index = pd.Index(stored["perturbations"], name="perturbation")
    genes = pd.Index(stored["genes"])
    return DirectEffectTables(
        *(pd.DataFrame(stored[name], index, genes) for name in DirectEffectTables._fields)
    )


def _ate(stored: Any, _: AnnData) -> AnnData:
    names = [str(name) for name in stored["perturbations"]]
    obs = label_rows(names, list(stored["dosages"]))
    if "contexts" in stored:
        contexts = [str(name) for name in stored["contexts"]]
        obs = obs.assign(context=contexts)
        if len(set(contexts)) > 1:
            pairs = zip(obs.index, contexts, strict=True)
            obs.index = pd.Index([f"{name}:{context}" for name, context in pairs])
    layers = {name: stored[name] for name in _TABLES_OF_EFFECTS if name in stored}
    told = {"effect", "perturbations", "dosages", "genes", "contexts", *layers}
    description = {name: value for name, value in stored.items() if name not in told}
    var = pd.DataFrame(index=pd.Index(np.asarray(stored["genes"], dtype=object)))
    return AnnData(stored["effect"], obs=obs, var=var, layers=layers, uns={"ate": description})


def _of_method(
    place: str, key: str, name: str, read: Callable[[Any, AnnData], Any] = _as_stored
) -> Slot:
    """Return the slot of a method of models."""

    def ask(model: PerturbationModel) -> Any:
        method = getattr(model, name, None)
        if method is None:
            raise SAMSError(f"{type(model).__name__} has no {name}: it does not learn any.")
        return method(key_added=None)

    return Slot(place, key, f"model.{name}()", ask, read)


MASKS = _of_method("uns", RESULT_KEYS.MASKS, "get_perturbation_masks")
EFFECTS = _of_method("uns", RESULT_KEYS.EFFECTS, "get_perturbation_effects", _effects)
PROGRAMS = _of_method("varm", RESULT_KEYS.PROGRAMS, "get_latent_programs", _programs)
DIRECT_EFFECTS = _of_method(
    "uns", RESULT_KEYS.DIRECT_EFFECTS, "get_direct_effects", _direct_effects
)
ATE = _of_method("uns", RESULT_KEYS.ATE, "predict_ate", _ate)
TESTS = _of_method("uns", RESULT_KEYS.TESTS, "test_perturbations")


def result_of(source: Any, slot: Slot) -> Any:
    """Return a result of a model, read it from an AnnData, or return it as passed.

    Raises
    ------
    MissingKeyError
        If ``source`` is an AnnData without this slot; the message names the method that writes it.
    """
    if isinstance(source, PerturbationModel):
        return slot.ask(source)
    if not isinstance(source, AnnData):
        return source
    stored = getattr(source, slot.place)
    if slot.key not in stored:
        raise MissingKeyError(
            f"adata.{slot.place} has no {slot.key!r}, which {slot.call} writes. Call that, or pass "
            "the model or the table."
        )
    return slot.read(stored[slot.key], source)


def is_ate(adata: AnnData) -> bool:
    """Whether an AnnData is a table of effects, rather than a screen with stored results."""
    return "ate" in adata.uns or not any(str(key).startswith("sams_") for key in adata.uns)


def ate_of(source: AnnData | PerturbationModel) -> AnnData:
    """Return a table of effects, as passed, from a slot or from a model."""
    return source if isinstance(source, AnnData) and is_ate(source) else result_of(source, ATE)
