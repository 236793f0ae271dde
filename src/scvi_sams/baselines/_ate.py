"""Effects predicted without a model: what any model has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import as_names, check_ate
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.labels._spelling import Spelling
from scvi_sams.metrics._observed import ate_table, check_unique


def additive_ate(
    singles: ad.AnnData, combinations: Sequence[str], *, delimiter: str | None = "+"
) -> ad.AnnData:
    """Predict the effect of a combination as the sum of the effects of its perturbations.

    Parameters
    ----------
    singles
        ATE table that holds every single perturbation of the combinations, as
        :func:`observed_ate` returns it.
    combinations
        Labels to predict, in any spelling. A single perturbation predicts itself.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

    Returns
    -------
    An ATE table, combinations x genes, in the units of ``singles``. Where ``singles`` has standard
    errors, ``layers["standard_error"]`` combines them in quadrature. That ignores that observed
    singles share their control cells, so it is too small by the part that their error has in
    common.

    Raises
    ------
    UnknownPerturbationError
        If a perturbation of a combination is not in ``singles``.
    SAMSError
        If ``singles`` names a perturbation twice.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> singles = evaluation.observed_ate(adata, perturbations=["P001", "P007"])
    >>> additive = evaluation.additive_ate(singles, ["P001+P007"])
    >>> np.allclose(additive.X[0], singles.X.sum(axis=0))
    True
    """
    check_ate(singles=singles)
    combinations = as_names("combinations", combinations)
    spelling = Spelling.of("control", delimiter)
    parts = [spelling.perturbations(name) or [spelling.control_label] for name in combinations]
    return sum_of_effects(
        singles, [spelling.canonical(name) for name in singles.obs_names], combinations, parts
    )


def sum_of_effects(
    singles: ad.AnnData, rows: Sequence[str], combinations: Sequence[str], parts: list[list[str]]
) -> ad.AnnData:
    """Add up the effects of the parts of each combination; ``rows`` are canonical names."""
    check_unique(rows)
    missing = sorted({name for names in parts for name in names}.difference(rows))
    if missing:
        raise UnknownPerturbationError(
            f"The single effect of {', '.join(map(repr, missing))} is needed but not in the table. "
            "Estimate it first (observed_ate), or leave out its combinations."
        )
    positions = [pd.Index(rows).get_indexer(pd.Index(names)) for names in parts]

    def sums(values: np.ndarray) -> np.ndarray:
        summed = [values[members].sum(axis=0) for members in positions]
        return np.reshape(summed, (len(positions), singles.n_vars))

    return _in_units_of(
        singles, combinations, sums, lambda errors: np.sqrt(sums(np.square(errors)))
    )


def mean_ate(ate: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    """Predict the same effect for every perturbation: the mean over those of a table.

    A model that does not beat this baseline may have learned what perturbed cells have in common,
    but not what tells perturbations apart.

    Parameters
    ----------
    ate
        ATE table whose rows are averaged, each with the same weight: those of the training
        perturbations, as :func:`observed_ate` returns it.
    perturbations
        Labels to predict; they need not be in ``ate``.

    Returns
    -------
    An ATE table, perturbations x genes, in the units of ``ate``. Where ``ate`` has standard errors,
    ``layers["standard_error"]`` is their mean: an upper bound that holds however much of their
    error the rows share through their control cells.

    Raises
    ------
    SAMSError
        If ``ate`` has no rows.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> singles = evaluation.observed_ate(adata, perturbations=["P001", "P007"])
    >>> same = evaluation.mean_ate(singles, ["P003", "P004"])
    >>> np.allclose(same["P003"].X, same["P004"].X)
    True
    """
    check_ate(ate=ate)
    perturbations = as_names("perturbations", perturbations)
    if ate.n_obs == 0:
        raise SAMSError("There is no effect to average: the table has no perturbations.")

    def mean(values: np.ndarray) -> np.ndarray:
        return np.tile(np.mean(values, axis=0), (len(perturbations), 1))

    return _in_units_of(ate, perturbations, mean, mean)


def _in_units_of(
    table: ad.AnnData,
    names: Sequence[str],
    effect: Callable[[np.ndarray], np.ndarray],
    standard_error: Callable[[np.ndarray], np.ndarray],
) -> ad.AnnData:
    """Make an ATE table of the effects of another one, and of their errors where it has them."""
    layers = {}
    if "standard_error" in table.layers:
        layers["standard_error"] = standard_error(table.layers["standard_error"])
    return ate_table(
        effect(np.asarray(table.X)),
        names,
        table.var_names,
        description=dict(table.uns["ate"]),
        layers=layers,
    )
