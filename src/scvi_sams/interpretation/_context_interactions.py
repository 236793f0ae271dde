"""Whether perturbations do the same in all cell types, donors and batches."""

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
    """Say of columns of ``obs`` whether the effects of perturbations differ between their levels.

    Models take it that a perturbation shifts the latent state by the same in all cells. Where it
    does something in one cell type only, masks and effects are an average that holds nowhere. This
    test does not rest on the model: for each perturbation it compares the effects (cells less
    control cells) within the levels of a column with each other. ``train`` does so when it ends,
    and warns of columns that are not registered as contexts.

    Parameters
    ----------
    model
        Trained or not, and holding its cells.
    keys
        Columns to test. ``None``: batch, categorical covariates and context, and all columns of
        text, categories or booleans with 2 to 20 levels, where two levels have 15 control cells and
        15 cells of some perturbation.
    per_perturbation
        Return a row for each column and perturbation instead.
    max_cells
        Most cells that are read. Of larger screens a third are control cells, and the others are
        those of the perturbations that have most, at least 300 of each that has as many.

    Returns
    -------
    One row per column:

    - ``registered_as``: ``"batch"``, ``"categorical covariate"``, ``"context"`` or ``"not
      registered"``; ``n_levels``; ``n_tested``, perturbations (labels of cells, combinations too)
      with enough cells in two levels.
    - ``n_differ``: perturbations whose effects differ at a false discovery rate of .05 and by
      enough, a ``share`` of .15; ``most_different``: the one of these that differs most.
    - ``share``: of the squared effects of all tested perturbations, what levels do not share, less
      what chance makes of equal effects, from 0 to 1. An effect of one size in one of three levels
      and none in the others has a share of .67. It says little where ``p_value`` is large.
    - ``p_value``: of effects that are the same in all levels, for all perturbations (Simes).
    - ``is_balanced``: whether the cells of each perturbation are in the same levels as control
      cells are. Levels that perturbations change, such as clusters or phases of the cell cycle that
      were told from expression, are no contexts, and effects within them mean little.
    - ``differs``: whether ``train`` warns of such a column: ``p_value`` is at most .001, some
      perturbation differs, and the column is balanced or registered.

    With ``per_perturbation`` one row per column, ``perturbation`` and (where contexts are
    registered) ``context``: ``n_levels``, ``squared_effect`` and ``squared_difference`` (in
    units of what cells vary, times their number; by chance they may be below 0), their ``share``,
    ``p_value``, ``q_value`` and ``differs``.

    Where contexts are registered, other columns are tested within them. Cells are compared within
    registered batches and categories, and what depends linearly on continuous covariates is taken
    out.

    Raises
    ------
    SAMSError
        If the model has no data.
    MissingKeyError
        If ``adata.obs`` lacks a column.
    InvalidArgumentError
        If ``keys`` or ``max_cells`` is none.

    Notes
    -----
    Effects are compared as fold changes, on the axes in which cells vary most. On logarithms of
    counts plus one, what multiplies rates alike in two cell types is no longer the same effect once
    they express genes at different rates. The p-value of a perturbation is that of Brunner, Dette
    and Munk (1997) for groups of unequal variances.

    Examples
    --------
    A screen of three cell types, each perturbation active in one of them:

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
            "The model was loaded without data, and whether effects differ is seen in cells: load "
            "it with `adata`."
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
