"""Test whether perturbations have the same effect in all cell types, donors and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from scvi_sams._checks import as_list, check_bool, check_integer, check_key
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.model._context_tests import MOST_CELLS, context_tests

if TYPE_CHECKING:
    from scvi_sams.model._screen_model import ScreenModel


def context_interactions(
    model: ScreenModel,
    keys: str | Sequence[str] | None = None,
    *,
    per_perturbation: bool = False,
    max_cells: int = MOST_CELLS,
) -> pd.DataFrame:
    """Test for columns of ``obs`` whether effects of perturbations differ between their levels.

    Models assume that a perturbation shifts the latent state by the same amount in all cells. If it
    acts in one cell type only, masks and effects are an average that applies to none. This test
    does not depend on the model: for each perturbation it compares the effects (cells minus control
    cells) in the levels of a column. ``train`` runs it at the end, and warns of columns that are
    not registered as contexts.

    Parameters
    ----------
    model
        Trained or untrained model with its data.
    keys
        Columns to test. ``None``: batch, categorical covariates and context, and all text,
        categorical or boolean columns with 2 to 20 levels, of which two have 15 control cells and
        15 cells of some perturbation.
    per_perturbation
        Return one row for each column and perturbation instead.
    max_cells
        Largest number of cells to read. In larger screens a third are control cells; the others
        are from the perturbations with most cells, at least 300 of each that has as many.

    Returns
    -------
    One row per column:

    - ``registered_as``: ``"batch"``, ``"categorical covariate"``, ``"context"`` or ``"not
      registered"``; ``n_levels``; ``n_tested``, perturbations (labels of cells, combinations too)
      with enough cells in two levels.
    - ``n_differ``: perturbations whose effects differ at a false discovery rate of 0.05 and with a
      ``share`` of at least 0.15; ``most_different``: the one of these that differs most.
    - ``share``: proportion of the squared effects of all tested perturbations that levels do not
      share, corrected for chance, from 0 to 1. An effect in one of three levels and none in the
      others has a share of 0.67. Not meaningful if ``p_value`` is large.
    - ``p_value``: of the hypothesis that effects are the same in all levels, over all perturbations
      (Simes).
    - ``is_balanced``: whether cells of each perturbation are distributed over the levels as control
      cells are. Levels that depend on perturbations, such as clusters or cell cycle phases inferred
      from expression, are not contexts, and effects within them are hard to interpret.
    - ``differs``: whether ``train`` warns of such a column: ``p_value`` is at most 0.001, some
      perturbation differs, and the column is balanced or registered.

    With ``per_perturbation`` one row per column, ``perturbation`` and (if contexts are registered)
    ``context``: ``n_levels``, ``squared_effect`` and ``squared_difference`` (in units of the
    variance between cells, times their number; they may be negative by chance), their ``share``,
    ``p_value``, ``q_value`` and ``differs``.

    If contexts are registered, other columns are tested within them. Cells are compared within
    registered batches and categories, and linear effects of continuous covariates are removed.

    Raises
    ------
    SAMSError
        If the model has no data.
    MissingKeyError
        If ``adata.obs`` lacks a column.
    InvalidArgumentError
        If ``keys`` or ``max_cells`` is invalid.

    Notes
    -----
    Effects are compared as fold changes, on the axes in which cells vary most. On logarithms of
    counts plus one, equal fold changes in two cell types are not equal effects if the types express
    genes at different rates. The p-value of a perturbation is that of Brunner, Dette and Munk
    (1997) for groups with unequal variances.

    Examples
    --------
    A screen of three cell types; each perturbation acts in one of them:

    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=100,
    ...     n_perturbations=10,
    ...     n_combinations=0,
    ...     n_cell_types=3,
    ...     cell_type_specific_share=1.0,
    ... )
    >>> scvi_sams.SAMSVAE.setup_anndata(screen, categorical_covariate_keys=["cell_type"])
    >>> of_types = scvi_sams.SAMSVAE(screen, n_latent=5, n_hidden=16)
    >>> table = scvi_sams.tl.context_interactions(of_types)
    >>> table["registered_as"].to_dict(), table["differs"].to_dict()
    ({'cell_type': 'categorical covariate'}, {'cell_type': True})
    """
    check_integer(at_least=100, max_cells=max_cells)
    check_bool(per_perturbation=per_perturbation)
    if model.adata is None:
        raise SAMSError(
            "The model was loaded without data, but effects are compared between cells: load it "
            "with `adata`."
        )
    if keys is not None:
        keys = [keys] if isinstance(keys, str) else as_list("keys", keys, "names of columns")
        for key in keys:
            check_key(keys=key)
        check_has("adata.obs has no column", keys, model.adata.obs.columns)
    model._validate_anndata()
    counts = model.module.likelihood.is_count_likelihood
    found = context_tests(model.adata_manager, keys, counts=counts, most_cells=max_cells)
    return found.perturbations if per_perturbation else found.columns
