"""Checks that predicted and observed cells have the same scale and doses."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._constants import REGISTERED_DOSES
from scvi_sams._scale import NO_SIZE_FACTOR
from scvi_sams.exceptions import ScaleMismatchError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._rows import dosage_text, groups_of_cells

_CELLS_LOOKED_AT = 200
_SAME_TOTAL = 0.01
"""Totals with a smaller relative difference are equal: values have single precision."""
_SIMILAR_TOTAL = 1.5
"""Largest ratio of totals of predicted cells with a size factor to those of observed cells."""


def check_same_cell_scale(predicted: ad.AnnData, observed: ad.AnnData) -> None:
    """Raise if cells of ``predict`` are not normalised like the observed ones.

    The normalisation of predicted cells is in ``uns["prediction"]``, or is inferred if they were
    normalised later; cells without a record are accepted. That of observed cells is inferred from
    their total, unless genes were removed after normalisation.
    """
    record = predicted.uns.get("prediction", {})
    if "output" not in record:
        return
    target_sum = _total_of_predicted(predicted, record)
    base = observed.uns.get("log1p", {}).get("base")
    if base is not None and not np.isclose(base, np.e):
        raise ScaleMismatchError(
            f"The observed cells are logarithms to the base {base:g}, the predicted ones natural "
            "logarithms. Omit `base` in scanpy.pp.log1p."
        )
    total = _common_total(observed)
    if total is None or target_sum is None:
        return
    size_factor = record.get("size_factor_key", NO_SIZE_FACTOR)
    told = f"target_sum is {target_sum:g} in the predicted and {total:g} in the observed cells"
    if size_factor == NO_SIZE_FACTOR or record["output"] != "lognorm":
        if abs(total / target_sum - 1) > _SAME_TOTAL:
            raise ScaleMismatchError(
                f"{told}. Normalise both alike: scanpy.pp.normalize_total(observed, "
                f"target_sum={target_sum:g}), or predict(target_sum={total:g})."
            )
    elif not 1 / _SIMILAR_TOTAL < np.median(_totals(predicted)) / total < _SIMILAR_TOTAL:
        raise ScaleMismatchError(
            f"{told}, and the size of a cell is {size_factor!r} in the predicted and the sum of "
            "its counts in the observed cells. Divide observed counts by that size factor and "
            f"multiply them by {target_sum:g}."
        )


def _total_of_predicted(predicted: ad.AnnData, record: dict[str, Any]) -> float | None:
    """Total to which predicted cells are normalised; an error if they are not normalised."""
    if record["output"] == "lognorm":
        return float(record["target_sum"])
    if "log1p" in predicted.uns:
        return _common_total(predicted)
    raise ScaleMismatchError(
        f"The predicted cells are from predict(output={record['output']!r}), but observed cells "
        "must be log1p-normalised: use predict(output='lognorm'), or normalise both alike "
        "(scanpy.pp.normalize_total, scanpy.pp.log1p)."
    )


def check_same_cell_doses(
    predicted: ad.AnnData, observed: ad.AnnData, labels: Labels, observed_labels: Labels
) -> None:
    """Raise if both sides have doses and these differ."""
    if "dosage" not in predicted.obs or REGISTERED_DOSES not in observed.uns:
        return
    texts = predicted.obs["dosage"].map(dosage_text).to_numpy(dtype=object)
    of_predicted = pd.Series(texts).groupby(labels.canonical).agg(set)
    names, dosages, _ = groups_of_cells(observed_labels)
    of_observed = pd.Series([dosage_text(d) for d in dosages]).groupby(names).agg(set)
    for name in observed_labels.perturbed_names:
        if name in of_predicted and of_predicted[name] != of_observed[name]:
            predicted_doses, observed_doses = (
                ", ".join(sorted(doses[name])) for doses in (of_predicted, of_observed)
            )
            raise ScaleMismatchError(
                f"The dosage of {name!r} is {predicted_doses} in the predicted and "
                f"{observed_doses} in the observed cells. Predict the doses that were observed "
                "(`dosages` of predict), and score one dose at a time."
            )


def _common_total(cells: ad.AnnData) -> float | None:
    """Sum of normalised counts per cell, if equal in all cells; ``None`` otherwise."""
    totals = _totals(cells)
    common = float(np.median(totals)) if len(totals) > 1 else 0.0
    is_common = common > 0 and np.abs(totals / common - 1).max() < _SAME_TOTAL
    return common if is_common else None


def _totals(cells: ad.AnnData) -> np.ndarray:
    rows = np.unique(
        np.linspace(0, cells.n_obs - 1, min(cells.n_obs, _CELLS_LOOKED_AT)).astype(int)
    )
    values: Any = cells.X[rows]
    dense = values.toarray() if sparse.issparse(values) else np.asarray(values)
    return np.expm1(dense.astype(np.float64)).sum(axis=1)
