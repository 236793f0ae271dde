"""Genetic interactions observed in cells, compared with those that a model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse, stats

from scvi_sams._checks import as_names, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._scale import check_same_scale, size_factor_record
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidDosageError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.interpretation._perturbations import unit_rows
from scvi_sams.labels._labels import Labels, parts_of_combination
from scvi_sams.labels._names import check_has
from scvi_sams.labels._rows import Dosage, groups_of_cells, label_rows
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.metrics._observed import (
    Average,
    check_unique,
    labelled_cells,
    normalised_expression,
    registered_levels,
    spelling_of,
)

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel


def observed_interactions(
    adata: AnnData,
    combinations: Sequence[str] | None = None,
    *,
    direction: AnnData | None = None,
    perturbation_key: str = "perturbation",
    control: Control = "control",
    dosage_key: str | None = None,
    method: Average = "lognorm",
    layer: str | None = None,
    size_factor_key: str | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    target_sum: float = 1e4,
    delimiter: str | None = "+",
) -> AnnData:
    """Observed interactions of combinations whose perturbations were also measured alone.

    With the means over cells of f of :func:`scvi_sams.evaluation.observed_ate`, for two
    perturbations ``interaction = mean(A+B) - mean(A) - mean(B) + mean(control)`` per gene, which is
    the effect of the combination minus the sum of the single effects.

    Parameters
    ----------
    adata
        Counts, cells x genes. Not changed.
    combinations
        Labels; ``None``: all measured combinations whose perturbations were also measured alone.
    direction
        Result of ``predict_interactions`` for these combinations: scores are taken along its
        additive expectation. Without it there are no scores, because along a direction estimated
        from the same few cells noise would look like buffering.
    perturbation_key, control, dosage_key, method, layer, size_factor_key, indices, target_sum, \
    delimiter
        As in :func:`scvi_sams.evaluation.observed_ate`.

    Returns
    -------
    AnnData, combinations x genes. ``X``: interaction; ``layers``: ``"effect"``, ``"additive"`` and
    the ``"standard_error"`` of the interaction (root of the summed variances of all means).
    ``obs``: ``perturbation`` and ``dosage``, ``n_cells`` of the combination, ``n_cells_single``,
    the smallest number of cells of its perturbations, and with ``direction``: ``score``,
    ``score_standard_error`` (from the scores of single cells, so that correlations between genes
    are accounted for) and ``additive_score``.

    Raises
    ------
    UnknownPerturbationError
        If a combination or one of its perturbations has no cells.
    InvalidDosageError
        If a perturbation has several doses in the required cells.
    ScaleMismatchError
        If ``direction`` has another method, target sum or size factor.
    SAMSError
        If a label is not a combination, occurs twice, or is not in ``direction``; if ``direction``
        has other genes; if no combination is left.
    MissingKeyError, MissingControlError, InvalidCountsError
        As for :func:`scvi_sams.evaluation.observed_ate`.

    Examples
    --------
    >>> observed = scvi_sams.tl.observed_interactions(adata, ["P001+P007"])
    >>> observed.shape
    (1, 100)
    >>> observed.obs[["n_cells", "n_cells_single"]].values.tolist()
    [[30, 60]]
    """
    check_number(target_sum=target_sum, above=0)
    spelling = spelling_of(adata, perturbation_key, control, delimiter)
    cells, labels = labelled_cells(adata, indices, perturbation_key, spelling, dosage_key)
    values = normalised_expression(
        cells, method, layer=layer, size_factor_key=size_factor_key, target_sum=target_sum
    )
    base, canonical = labels.control, spelling.canonical
    cells_of = {
        name: np.flatnonzero(labels.name_of_cell == place)
        for place, name in enumerate(labels.names)
    }
    if combinations is None:
        combinations = _complete_combinations(cells_of, spelling)
    combinations = as_names("combinations", combinations)
    if not combinations:
        raise InvalidArgumentError("`combinations` is empty: name some, or pass None for all.")
    names = [canonical(c) for c in combinations]
    check_unique(names)
    dosage_of = _one_dosage_each(labels, names)
    scale: dict[str, Any] = {"method": method, "target_sum": float(target_sum)}
    scale |= size_factor_record(size_factor_key) | registered_levels(cells, labels)
    directions = None
    if direction is not None:
        check_same_scale(direction=direction.uns.get("interaction", {}), observed=scale)
        named = [canonical(c) for c in direction.obs_names]
        directions = _directions(direction, adata.var_names, named, names)

    means: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    tables, summaries = [], []
    for place, name in enumerate(names):
        parts = parts_of_combination(name, spelling)
        _check_measured([name, *parts, base], cells_of)
        for group in (name, *parts, base):
            if group not in means:
                means[group] = _mean_and_squared_error(values[cells_of[group]])
        effect = means[name][0] - means[base][0]
        additive = sum(means[part][0] for part in parts) - len(parts) * means[base][0]
        weights = {name: 1, base: len(parts) - 1} | dict.fromkeys(parts, -1)
        squared = sum(weight**2 * means[group][1] for group, weight in weights.items())
        tables.append((effect - additive, effect, additive, np.sqrt(squared)))
        row: dict[str, float] = {
            "n_cells": len(cells_of[name]),
            "n_cells_single": min(len(cells_of[part]) for part in parts),
        }
        if directions is not None:
            projected = {
                group: _mean_and_squared_error(values[cells_of[group]] @ directions[place][:, None])
                for group in weights
            }
            row["score"] = float(sum(w * projected[g][0].item() for g, w in weights.items()))
            row["score_standard_error"] = float(
                np.sqrt(sum(w**2 * projected[g][1].item() for g, w in weights.items()))
            )
            row["additive_score"] = float(additive @ directions[place])
        summaries.append(row)
    interaction, *others = (np.array(rows) for rows in zip(*tables, strict=True))
    rows = label_rows(names, [dosage_of[name] for name in names]).rename_axis("combination")
    return AnnData(
        interaction,
        obs=rows.assign(**pd.DataFrame(summaries, index=rows.index)),
        var=pd.DataFrame(index=adata.var_names.copy()),
        layers=dict(zip(("effect", "additive", "standard_error"), others, strict=True)),
        uns={"interaction": scale},
    )


def genetic_interactions(
    model: PerturbationModel,
    combinations: Sequence[str] | None = None,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    key_added: str | None = RESULT_KEYS.INTERACTIONS,
    **predict_kwargs: Any,
) -> pd.DataFrame:
    """Compare interactions predicted by a model with those observed in its data.

    Parameters
    ----------
    model
        Model trained on counts with labels in obs and without doses; for other data combine
        ``predict_interactions`` and :func:`observed_interactions` yourself.
    combinations
        Labels; ``None``: all combinations whose perturbations were also measured alone.
    indices
        Cells of the training data for observed interactions, such as held-out cells; ``None``: all.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.
    **predict_kwargs
        Arguments of ``predict_interactions``. The default ``method`` is ``"lognorm"``, so that both
        kinds of scores refer to log-normalised counts in cells of the sizes of the screen
        (``"lograte"`` if a custom likelihood has no ``"lognorm"``).

    Returns
    -------
    One row per combination: ``n_cells``, ``n_cells_single``; ``predicted_score`` with its posterior
    interval ``predicted_low`` and ``predicted_high``; ``observed_score`` with
    ``observed_standard_error``, ``z``, two-sided ``p_value`` (normal) and ``fdr`` (Benjamini and
    Hochberg). Scores are interactions along the additive expectation of the model, in log2 units,
    negative if the combination is weaker than the sum. ``predicted_relative`` and
    ``observed_relative`` are relative to the additive expectation: -0.3 is a combination with 70 %
    of the sum. Sorted by ``p_value``.

    Raises
    ------
    SAMSError
        If the model was not trained on counts with labels without doses.
    UnknownPerturbationError
        If a combination or one of its perturbations has no cells.

    Examples
    --------
    >>> table = scvi_sams.tl.genetic_interactions(model, n_samples=200)
    >>> table.index.tolist() == table.sort_values("p_value").index.tolist()
    True
    >>> "predicted_score" in table and "observed_score" in table
    True
    """
    check_key(key_added=key_added)
    arguments = model._setup_arguments
    for key in ("dosage_key", "dosage_obsm_key"):
        if arguments[key] is not None:
            raise SAMSError(
                f"The model was registered with `{key}`, but observed interactions need a single "
                "dose. Use model.predict_interactions, and observed_interactions on the "
                "cells of one dose."
            )
    if not model.module.likelihood.is_count_likelihood:
        raise SAMSError(
            "Observed interactions are computed from counts, but the model has a normal "
            "likelihood. Use model.predict_interactions."
        )
    settings = {
        key: arguments[key]
        for key in ("perturbation_key", "control", "layer", "size_factor_key", "delimiter")
    } | {"indices": indices}
    model._check_has_data("indices")
    model._validate_anndata()
    if combinations is None:
        combinations = list(observed_interactions(model.adata, **settings).obs_names)
    method = "lognorm" if model.module.likelihood.has_laplace_transform else "lograte"
    predicted = model.predict_interactions(combinations, **{"method": method} | predict_kwargs)
    settings["target_sum"] = predicted.uns["interaction"]["target_sum"]
    observed = observed_interactions(model.adata, combinations, direction=predicted, **settings).obs
    z = observed["score"] / observed["score_standard_error"]
    p_value = pd.Series(2 * stats.norm.sf(np.abs(z)), index=z.index)
    table = observed[["n_cells", "n_cells_single"]].assign(
        predicted_score=predicted.obs["score"],
        predicted_low=predicted.obs["score_low"],
        predicted_high=predicted.obs["score_high"],
        predicted_relative=predicted.obs["score"] / predicted.obs["additive_score"],
        observed_score=observed["score"],
        observed_standard_error=observed["score_standard_error"],
        observed_relative=observed["score"] / observed["additive_score"],
        z=z,
        p_value=p_value,
        # A combination with a single cell has no standard error, and so no test.
        fdr=stats.false_discovery_control(p_value.fillna(1)),
    )
    table = table.sort_values("p_value", kind="stable")
    if key_added is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def _mean_and_squared_error(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over cells and the square of its standard error, NaN for a single cell."""
    n_cells = values.shape[0]
    dense_mean = np.asarray(values.mean(axis=0)).ravel()
    squares = values.power(2) if sparse.issparse(values) else np.square(values)
    spread = np.maximum(np.asarray(squares.mean(axis=0)).ravel() - dense_mean**2, 0)
    return dense_mean, spread / (n_cells - 1 if n_cells > 1 else np.nan)


def _complete_combinations(cells_of: dict[str, np.ndarray], spelling: Spelling) -> list[str]:
    split = {name: spelling.perturbations(name) for name in cells_of}
    found = [
        name for name, parts in split.items() if len(parts) > 1 and cells_of.keys() >= {*parts}
    ]
    if not found:
        raise SAMSError(
            "No combination was measured together with each of its perturbations alone. Check "
            "`delimiter`; predict_interactions does not require measured ones."
        )
    return sorted(found)


def _one_dosage_each(labels: Labels, combinations: list[str]) -> dict[str, Dosage]:
    """Dosage of each label; an error if a perturbation of the combinations has several doses."""
    needed = {name for label in combinations for name in labels.spelling.perturbations(label)}
    for code, name in enumerate(labels.vocabulary):
        doses = np.unique(labels.doses[labels.codes == code])
        if name in needed and len(doses) > 1:
            raise InvalidDosageError(
                f"{name!r} has the doses {', '.join(f'{dose:g}' for dose in doses[:5])}, but an "
                "interaction needs one dose of each perturbation. Pass the cells of one dose, "
                "and control cells, as `indices`."
            )
    names, dosages, _ = groups_of_cells(labels)
    return dict(zip(names, dosages, strict=True))


def _check_measured(groups: list[str], cells_of: dict[str, np.ndarray]) -> None:
    missing = [group for group in groups if group not in cells_of]
    if missing:
        raise UnknownPerturbationError(
            f"No cell used has {', '.join(map(repr, missing))}, which the interaction of "
            f"{groups[0]!r} requires. Remove it, or check `indices` and `delimiter`."
        )


def _directions(
    predicted: AnnData, genes: pd.Index, predicted_names: list[str], names: list[str]
) -> np.ndarray:
    """Unit vectors of the additive expectation, combinations x genes; zero where there is none."""
    if not predicted.var_names.equals(genes):
        raise SAMSError("`direction` has other genes than `adata`, or another order of genes.")
    advice = " Predict the interactions of the same combinations."
    check_has("`direction` has no", names, predicted_names, advice)
    rows = pd.Index(predicted_names).get_indexer(pd.Index(names))
    return unit_rows(np.asarray(predicted.layers["additive"], dtype=np.float64)[rows])
