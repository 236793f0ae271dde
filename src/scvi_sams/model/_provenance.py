"""What a model was trained with, kept in the model, in its saves and beside its results."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from anndata import AnnData
from scvi import settings
from scvi.model.base import BaseModelClass

from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._versions import installed_versions


class ProvenanceMixin(BaseModelClass):
    """Adds a record of settings, seed and versions."""

    # scvi-tools saves attributes whose names end so.
    trainings_: tuple[dict[str, Any], ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """How the model came about: nothing but strings, numbers, booleans, lists and dicts.

        ``"model"``: its class. ``"settings"``: the arguments that it was made with. ``"setup"``:
        those of ``setup_anndata``. ``"trainings"``: for each call of :meth:`train` that ended
        without an error the ``"settings"``, ``"n_training_cells"``, the ``"seed"`` (of
        ``scvi.settings``; ``None`` if it was not set) and the ``"versions"`` of packages. Saved
        with the model, and written beside every result, as JSON, in ``uns["sams_provenance"]``.

        Examples
        --------
        >>> model.provenance["model"], model.provenance["settings"]["n_latent"]
        ('SAMSVAE', 6)
        >>> [training["seed"] for training in model.provenance["trainings"]]
        [0]
        """
        given = self.init_params_
        made_with = dict(given["non_kwargs"])
        for further in given["kwargs"].values():
            made_with |= further
        record = {
            "model": type(self).__name__,
            "settings": {k: v for k, v in made_with.items() if k != "registry"},
            "setup": self.registry_[SETUP_ARGUMENTS_KEY],
            "trainings": self.trainings_,
        }
        # A copy; objects, such as a configuration, are described.
        return json.loads(json.dumps(record, default=_as_plain))

    def keep_provenance(self, adata: AnnData, key: str) -> None:
        """Write in ``adata.uns["sams_provenance"]``, as JSON, what made the result ``key``."""
        records = dict(adata.uns.get(RESULT_KEYS.PROVENANCE, {}))
        adata.uns[RESULT_KEYS.PROVENANCE] = records | {key: json.dumps(self.provenance)}

    def _record_training(self, n_training_cells: int, **arguments: Any) -> None:
        training = {
            "settings": {k: deepcopy(v) for k, v in arguments.items() if v is not None},
            "n_training_cells": n_training_cells,
            "seed": settings.seed,
            "versions": installed_versions(),
        }
        self.trainings_ = (*self.trainings_, json.loads(json.dumps(training, default=_as_plain)))


def _as_plain(value: Any) -> Any:
    """Turn numbers and arrays of numpy to plain ones, and anything else to its description."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
