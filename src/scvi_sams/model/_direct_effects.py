"""Direct effects of perturbations on single genes, and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from scvi_sams._checks import as_names, check_bool, check_key
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.labels._names import check_known, listing
from scvi_sams.model._perturbation_model import PerturbationModel


class DirectEffectTables(NamedTuple):
    """Direct effects per unit dose, perturbations x genes each."""

    mean: pd.DataFrame
    sd: pd.DataFrame
    lfsr: pd.DataFrame


def direct_effect_tables(
    model: PerturbationModel, perturbations: Sequence[str] | None, key_added: str | None
) -> DirectEffectTables:
    """Look up the direct effects of some perturbations, and write them to the training data."""
    check_key(key_added=key_added)
    names = as_names(
        "perturbations", model.perturbations if perturbations is None else perturbations
    )
    unmeasured = [name for name in names if name in set(model.unmeasured)]
    if unmeasured:
        raise UnknownPerturbationError(
            f"There are no cells with {listing(unmeasured)}, but direct effects on genes are "
            "estimated from cells. predict_ate predicts the total effect."
        )
    check_known(names, model.perturbations)
    model._check_if_trained(warn=True)
    module = model.module
    if module.direct is None or not module.fits_direct_effects:
        raise SAMSError(
            "The model was made with direct_effects=False: perturbations change genes only through "
            "the latent state. Make and train a model with direct_effects=True."
        )
    if model.is_trained and not module.direct.is_estimated:
        raise SAMSError(
            "The model was trained with a version without direct effects. Train it again."
        )
    rows = torch.as_tensor(
        pd.Index(model.perturbations).get_indexer(pd.Index(names)), device=module.device
    )
    index = pd.Index(names, name="perturbation")
    genes = pd.Index(model.get_var_names())
    direct = DirectEffectTables(
        *(
            pd.DataFrame(module.direct.of_rows(rows, table).cpu().numpy(), index, genes)
            for table in ("mean", "sd", "sign_error")
        )
    )
    if key_added is not None and model.adata is not None:
        # As arrays: in files a DataFrame has one data set per column, and at most about 4,000.
        model.adata.uns[key_added] = {
            **{name: table.to_numpy(copy=True) for name, table in direct._asdict().items()},
            "perturbations": np.array(names, dtype=str),
            "genes": np.array(genes, dtype=str),
            "units": (
                "natural log of the rate"
                if module.likelihood.is_count_likelihood
                else "units of the data"
            ),
        }
        model.keep_provenance(model.adata, key_added)
    return direct


def switch_stacking(model: PerturbationModel, is_on: bool) -> None:
    """Turn stacking on or off; an error if it cannot be turned on."""
    check_bool(stacking=is_on)
    direct = model.module.direct
    if direct is not None and direct.estimates_weights:
        if is_on and model.is_trained and not direct.is_estimated:
            raise SAMSError("It was trained with a version without stacking. Train it again.")
        direct.stacked.fill_(is_on)
    elif is_on:
        raise SAMSError(
            "The model was made with stacking=False, so there are no weights. Make and train a "
            "model with stacking=True."
        )
