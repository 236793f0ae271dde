"""Which latent dimensions each perturbation moves."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage

from scvi_sams._checks import check_axes, check_bool, check_number, check_table
from scvi_sams.interpretation._programs import aligned_effects
from scvi_sams.plotting._heatmap import label_rows_and_columns


def masks(
    masks: pd.DataFrame,
    *,
    effects: pd.DataFrame | None = None,
    threshold: float | None = None,
    ax: Axes | None = None,
    order: bool = True,
) -> Axes:
    """Heatmap of perturbations x latent dimensions.

    Parameters
    ----------
    masks
        Posterior inclusion probabilities, perturbations x latent.
    effects
        Masked effects of the same perturbations on the same latent dimensions, as the ``mean`` of
        ``get_perturbation_effects``. If given, they are shown in colours centred on 0, instead of
        the probability.
    threshold
        Leave entries blank (0) whose inclusion probability is not greater than this; ``None``
        shows all.
    ax
        Axes to draw on; ``None`` makes a figure of fitting size.
    order
        Put perturbations with similar rows next to each other (average linkage, Euclidean
        distance) and the most active latent dimensions first. ``False`` keeps the order of
        ``masks``.

    Returns
    -------
    The axes. Tick labels are thinned where they would not fit.

    Raises
    ------
    MissingKeyError
        If ``effects`` lacks a perturbation or latent dimension of ``masks``.

    Examples
    --------
    >>> masks, effects = model.get_perturbation_masks(), model.get_perturbation_effects()
    >>> ax = scvi_sams.pl.masks(masks, effects=effects.mean, threshold=0.5)
    >>> ax.get_title() or ax.get_ylabel()
    'perturbation (8)'
    """
    check_table(masks=masks)
    if threshold is not None:
        check_number(threshold=threshold)
    check_bool(order=order)
    check_axes(ax=ax)
    table = masks if effects is None else aligned_effects(effects, masks)
    if threshold is not None:
        table = table.where(masks > threshold, 0)
    if order:
        activity = table.abs().sum(axis=0).to_numpy()
        table = table.iloc[_similar_rows(table.to_numpy()), np.argsort(-activity, kind="stable")]

    if ax is None:
        n_rows, n_columns = table.shape
        size = (np.clip(2.2 + 0.14 * n_columns, 4, 9), np.clip(1 + 0.14 * n_rows, 3, 10))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    values = table.to_numpy(np.float64)
    if effects is None:
        limits, colors, meaning = (0.0, 1.0), "Blues", "inclusion probability"
    else:
        extreme = np.abs(values).max(initial=0) or 1.0
        limits, colors, meaning = (-extreme, extreme), "RdBu_r", "expected effect (latent units)"
    image = ax.imshow(
        values, aspect="auto", interpolation="nearest", cmap=colors, vmin=limits[0], vmax=limits[1]
    )
    ax.figure.colorbar(image, ax=ax, label=meaning, shrink=0.6)
    ax.figure.canvas.figure.draw_without_rendering()  # what fits depends on the final layout
    n_rows, n_columns = table.shape
    label_rows_and_columns(ax, table.index, table.columns)
    ax.set_xlabel(f"latent dimension ({n_columns})")
    ax.set_ylabel(f"perturbation ({n_rows})")
    return ax


def _similar_rows(values: np.ndarray) -> np.ndarray:
    """Order rows so that similar ones are neighbours."""
    if len(values) < 3:
        return np.arange(len(values))
    return leaves_list(linkage(values, method="average", optimal_ordering=True))
