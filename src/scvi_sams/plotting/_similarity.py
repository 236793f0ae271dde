"""Similarity and interactions of perturbations: matrices of perturbations x perturbations."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from scvi_sams._checks import (
    check_axes,
    check_bool,
    check_frame,
    check_key,
    check_table,
    check_text,
)
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.interpretation._similarity import hierarchical_order
from scvi_sams.plotting._heatmap import FONT_SIZE, label_rows_and_columns

_NOT_KNOWN = "0.88"
_SHOWN = 0.99
"""Share of the interactions within the range of colours, where there are many."""
_MANY = 100
_ROUNDING = 1e-6


def similarity(similarity: pd.DataFrame, *, order: bool = True, ax: Axes | None = None) -> Axes:
    """Heatmap of the similarity of every two perturbations: pathways are blocks on the diagonal.

    Parameters
    ----------
    similarity
        Of :func:`scvi_sams.tl.perturbation_similarity`.
    order
        Put similar perturbations next to each other (average linkage of 1 - similarity); ``False``
        keeps the order of the table.
    ax
        Axes to draw on; ``None`` makes a figure of fitting size.

    Returns
    -------
    The axes. Tick labels are thinned where they would not fit.

    Raises
    ------
    SAMSError
        If rows and columns differ.

    Examples
    --------
    >>> table = scvi_sams.tl.perturbation_similarity(model.get_perturbation_effects().mean)
    >>> ax = scvi_sams.pl.similarity(table)
    """
    check_table(similarity=similarity)
    check_bool(order=order)
    check_axes(ax=ax)
    if not similarity.index.equals(similarity.columns):
        raise SAMSError(
            "Rows and columns of a similarity are the same perturbations; these differ."
        )
    table = similarity
    if order:
        leaves = hierarchical_order(table.to_numpy(np.float64))
        table = table.iloc[leaves, leaves]
    signed = bool((table < 0).any(axis=None))
    limits = (-1, 1) if signed else (0, 1)
    return _square(table, "RdBu_r" if signed else "Blues", limits, "similarity", ax)


def interaction_matrix(
    interactions: pd.DataFrame,
    score: str = "score",
    *,
    lower: str | None = None,
    delimiter: str = "+",
    order: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Matrix of the interaction of every pair, grey where there is none.

    Parameters
    ----------
    interactions
        One row per pair: ``obs`` of ``predict_interactions``, or the table of
        ``rank_unseen_pairs`` or :func:`scvi_sams.tl.genetic_interactions`. Larger
        combinations are left out.
    score
        Column to show; symmetric, unless ``lower`` is given.
    lower
        Column for the triangle below the diagonal, such as ``"predicted_relative"`` beside
        ``"observed_relative"`` above it.
    delimiter
        What joins the perturbations of a pair.
    order
        Put perturbations that interact alike next to each other; ``False`` sorts by name.
    ax
        Axes to draw on; ``None`` makes a figure of fitting size.

    Returns
    -------
    The axes; colours are centred on 0. Tick labels are thinned where they would not fit.

    Raises
    ------
    MissingKeyError
        If the table has no such column.
    SAMSError
        If it has no pair.

    Examples
    --------
    >>> table = scvi_sams.tl.genetic_interactions(model, n_samples=200)
    >>> ax = scvi_sams.pl.interaction_matrix(table, "observed_relative", lower="predicted_relative")
    """
    check_frame(interactions=interactions)
    check_text(score=score, delimiter=delimiter)
    check_key(lower=lower)
    check_bool(order=order)
    check_axes(ax=ax)
    for column in (score, lower):
        if column is not None and column not in interactions:
            raise MissingKeyError(
                f"The table has no column {column!r}; it has "
                f"{', '.join(map(repr, interactions.columns))}."
            )
    labels = interactions.get("combination", interactions.index)
    parts = [sorted(str(label).split(delimiter)) for label in labels]
    is_pair = np.array([len(names) == 2 for names in parts], dtype=bool)
    if not is_pair.any():
        raise SAMSError(f"The table has no pair of names joined by {delimiter!r}.")
    pairs = pd.DataFrame([names for names in parts if len(names) == 2])
    names = sorted(set(pairs[0]) | set(pairs[1]))
    upper = _matrix(names, pairs, interactions.loc[is_pair, score])
    table = upper if lower is None else _matrix(names, pairs, interactions.loc[is_pair, lower])
    leaves = np.arange(len(names))
    if order:
        known = np.nan_to_num(upper)
        norms = np.linalg.norm(known, axis=1, keepdims=True)
        units = np.divide(known, norms, out=np.zeros_like(known), where=norms > 0)
        leaves = hierarchical_order(units @ units.T)
    above, below = (values[np.ix_(leaves, leaves)] for values in (upper, table))
    shown = np.where(np.triu(np.ones_like(above, dtype=bool)), above, below)
    # A single extreme pair would leave all others pale.
    shares = (_SHOWN, 1) if np.isfinite(shown).sum() > _MANY else (1,)
    extreme = next((e for e in np.nanquantile(np.abs(shown), shares) if e > 0), 1.0)
    ordered = [names[leaf] for leaf in leaves]
    meaning = score if lower is None else f"above: {score}\nbelow: {lower}"
    frame = pd.DataFrame(shown, index=ordered, columns=ordered)
    return _square(frame, "RdBu_r", (-extreme, extreme), meaning.replace("_", " "), ax)


def _matrix(names: list[str], pairs: pd.DataFrame, values: pd.Series) -> np.ndarray:
    matrix = np.full((len(names), len(names)), np.nan)
    rows, columns = (pd.Index(names).get_indexer(pd.Index(pairs[side])) for side in (0, 1))
    matrix[rows, columns] = matrix[columns, rows] = values.to_numpy()
    return matrix


def _square(
    table: pd.DataFrame, colors: str, limits: tuple[float, float], meaning: str, ax: Axes | None
) -> Axes:
    if ax is None:
        side = float(np.clip(1.8 + 0.14 * len(table), 3.2, 9))
        _, ax = plt.subplots(figsize=(side + 0.9, side), layout="constrained")
    colormap = colormaps[colors].with_extremes(bad=_NOT_KNOWN)
    image = ax.imshow(
        np.ma.masked_invalid(table.to_numpy(np.float64)),
        interpolation="nearest",
        cmap=colormap,
        vmin=limits[0],
        vmax=limits[1],
    )
    beyond = np.nanmax(np.abs(table.to_numpy(np.float64))) > limits[1] + _ROUNDING
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.6, extend="both" if beyond else "neither")
    bar.set_label(meaning, fontsize=FONT_SIZE + 1)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    ax.figure.canvas.figure.draw_without_rendering()  # what fits depends on the final layout
    label_rows_and_columns(ax, table.index, table.columns)
    ax.set_xlabel(f"perturbation ({len(table)})", fontsize=FONT_SIZE + 1)
    return ax
