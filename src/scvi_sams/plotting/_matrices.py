"""Matrices: perturbations x latent dimensions, x genes, and x perturbations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar

from scvi_sams._checks import check_integer, check_number, check_table
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.interpretation._interactions import genetic_interactions
from scvi_sams.interpretation._perturbations import (
    cosine_similarity,
    hierarchical_order,
    perturbation_similarity,
)
from scvi_sams.interpretation._programs import aligned_effects
from scvi_sams.interpretation._row_order import order_of_rows
from scvi_sams.interpretation._stored import DIRECT_EFFECTS, MASKS, Slot, Source, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.model._direct_effects import DirectEffectTables
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.plotting._labels import label_rows_and_columns
from scvi_sams.plotting._style import ROW, TEXT, finish, new_axes

_NOT_KNOWN = "0.88"
_INTERACTIONS = Slot(
    "uns",
    RESULT_KEYS.INTERACTIONS,
    "scvi_sams.tl.genetic_interactions(model)",
    partial(genetic_interactions, key_added=None),
)
_SHOWN = 0.99
"""Proportion of the interactions within the colour range, if there are many."""
_MANY = 100
_ROUNDING = 1e-6


def masks(
    masks: Source,
    *,
    effects: Source | None = None,
    threshold: float | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    order: bool = True,
) -> Axes:
    """Heatmap of perturbations x latent dimensions.

    Parameters
    ----------
    masks
        Posterior inclusion probabilities, perturbations x latent, or the booleans of
        :func:`scvi_sams.tl.called_masks`: other entries are then blank, and the title contains the
        number of called entries and the expected proportion of false ones. Or a model, or an
        AnnData in whose ``uns`` the probabilities are stored.
    effects
        Masked effects of the same perturbations on the same latent dimensions, such as the
        ``mean`` of ``get_perturbation_effects``; or a model or an AnnData with them. They are shown
        in colours centred on 0, instead of the probability.
    threshold
        Entries with an inclusion probability up to this are blank (0); ``None`` shows all. A
        threshold does not control the error rate: to show reliable entries, pass the result of
        :func:`scvi_sams.tl.called_masks`.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.
    order
        Put perturbations with similar rows next to each other (average linkage, Euclidean
        distance; more than 500 in groups of k-means, the same in every call) and the most active
        latent dimensions first. ``False`` keeps the order of ``masks``.

    Returns
    -------
    The axes. Tick labels are thinned if they do not fit.

    Raises
    ------
    MissingKeyError
        If ``effects`` lacks a perturbation or latent dimension of ``masks``.

    Examples
    --------
    >>> called, effects = scvi_sams.tl.called_masks(model), model.get_perturbation_effects()
    >>> ax = scvi_sams.pl.masks(called, effects=effects.mean)
    >>> ax.get_ylabel()
    'perturbation (8)'
    """
    masks = result_of(masks, MASKS)
    check_table(masks=masks)
    if threshold is not None:
        check_number(threshold=threshold)
    title = ""
    if all(pd.api.types.is_bool_dtype(kind) for kind in masks.dtypes):
        title = _rate(masks)
        masks, threshold = masks.astype(float), 0.5
    table = masks if effects is None else aligned_effects(effects, masks)
    if threshold is not None:
        table = table.where(masks > threshold, 0)
    if order:
        leaves = order_of_rows(table.to_numpy(np.float64))
        table = table.iloc[leaves, np.argsort(-table.abs().sum().to_numpy(), kind="stable")]
    n_rows, n_columns = table.shape
    ax = new_axes(
        ax,
        float(np.clip(2.2 + ROW * n_columns, 4, 9)),
        float(np.clip(1 + ROW * n_rows, 3, 10)),
        figsize,
        save,
    )
    if effects is None:
        limits, colours, meaning = (0.0, 1.0), "Blues", "inclusion probability"
    else:
        extreme = table.abs().to_numpy().max() or 1.0
        limits, colours, meaning = (-extreme, extreme), "RdBu_r", "expected effect (latent units)"
    heatmap(ax, table, colours, limits).set_label(meaning)
    label_rows_and_columns(ax, table.index, table.columns)
    ax.set_xlabel(f"latent dimension ({n_columns})")
    ax.set_ylabel(f"perturbation ({n_rows})")
    ax.set_title(title, fontsize=TEXT)
    finish(ax, save)
    return ax


def _rate(called: pd.DataFrame) -> str:
    """Number of called entries and expected proportion of false ones, if known."""
    if "expected_false" not in called.attrs:
        return ""
    n_called = int(called.to_numpy().sum())
    return f"{n_called} entries called, {called.attrs['expected_false']:.1%} expected to be false"


def direct_effects(
    effects: DirectEffectTables | AnnData | PerturbationModel,
    *,
    max_lfsr: float = 0.05,
    n_perturbations: int = 40,
    n_genes: int = 60,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Heatmap of the strongest direct effects, perturbations x genes; dots mark certain signs.

    Parameters
    ----------
    effects
        Result of ``get_direct_effects``; or a model, or an AnnData in whose ``uns`` it is stored.
    max_lfsr
        Effects with a smaller local false sign rate are marked.
    n_perturbations, n_genes
        Largest numbers of rows and columns: those with the strongest marked effects. Genes are
        chosen for the perturbations that are shown.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. Colours are centred on 0, in the units of the table. Perturbations with similar
    effects are next to each other (average linkage, Euclidean distance), and genes are in the order
    of the perturbations that change them most, so that own genes of perturbations are on the
    diagonal. Tick labels are thinned if they do not fit.

    Raises
    ------
    InvalidArgumentError
        If ``effects`` is something else, or a number is out of range.
    SAMSError
        If no effect has a local false sign rate below ``max_lfsr``.

    Examples
    --------
    >>> direct = model.get_direct_effects()
    >>> ax = scvi_sams.pl.direct_effects(direct, max_lfsr=1, n_genes=20)
    >>> ax.get_xlabel()
    'gene (20)'
    """
    effects = result_of(effects, DIRECT_EFFECTS)
    if not isinstance(effects, DirectEffectTables):
        raise InvalidArgumentError(
            "`effects` must be the result of model.get_direct_effects(), not of type "
            f"{type(effects).__name__}."
        )
    mean, _, lfsr = effects
    check_number(above=0, at_most=1, max_lfsr=max_lfsr)
    check_integer(n_perturbations=n_perturbations, n_genes=n_genes)
    is_sure = lfsr.to_numpy() < max_lfsr
    if not is_sure.any():
        raise SAMSError(
            f"No direct effect has a local false sign rate below {max_lfsr:g}: all effects of "
            "these perturbations on genes are in the latent state, or they have few cells."
        )
    strength = np.where(is_sure, np.abs(mean.to_numpy()), 0)
    rows = _strongest(strength.max(axis=1), n_perturbations)
    columns = _strongest(strength[rows].max(axis=0), n_genes)
    values = mean.to_numpy()[np.ix_(rows, columns)]
    leaves = order_of_rows(values)
    rows, values = rows[leaves], values[leaves]
    along = np.argsort(strength[np.ix_(rows, columns)].argmax(axis=0), kind="stable")
    columns, values = columns[along], values[:, along]
    table = pd.DataFrame(values, index=mean.index[rows], columns=mean.columns[columns])
    marked = is_sure[np.ix_(rows, columns)]
    meaning = "direct effect per unit dose\n(dots: certain sign)"
    ax = marked_heatmap(table, marked, meaning, ax, figsize, save)
    ax.set_xlabel(f"gene ({len(columns)})")
    ax.set_ylabel(f"perturbation ({len(rows)})")
    finish(ax, save)
    return ax


def marked_heatmap(
    table: pd.DataFrame,
    is_marked: np.ndarray,
    meaning: str,
    ax: Axes | None,
    figsize: tuple[float, float] | None,
    save: str | Path | None,
) -> Axes:
    """Draw entries in colours centred on 0, with dots on some."""
    n_rows, n_columns = table.shape
    ax = new_axes(
        ax,
        float(np.clip(2.2 + ROW * n_columns, 4, 10)),
        float(np.clip(1.2 + ROW * n_rows, 3, 8)),
        figsize,
        save,
    )
    values = np.abs(table.to_numpy())
    extreme = np.nanmax(values)
    bar = heatmap(ax, table, "RdBu_r", (-extreme, extreme))
    bar.set_label(meaning)
    rows, columns = np.nonzero(is_marked)
    dots = np.where(values[rows, columns] > extreme / 2, "white", "black")
    ax.scatter(columns, rows, s=4, c=dots, linewidths=0)
    label_rows_and_columns(ax, table.index, table.columns)
    return ax


def _strongest(strength: np.ndarray, n: int) -> np.ndarray:
    """Positions of the ``n`` largest positive values, the largest first."""
    order = np.argsort(-strength, kind="stable")[:n]
    return order[strength[order] > 0]


def similarity(
    similarity: Source,
    *,
    order: bool = True,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Heatmap of the similarity of all pairs of perturbations; pathways are diagonal blocks.

    Parameters
    ----------
    similarity
        Table of :func:`scvi_sams.tl.perturbation_similarity`; or a model, or an AnnData with its
        results, for which it is computed with default arguments.
    order
        Put similar perturbations next to each other (average linkage of 1 - similarity); ``False``
        keeps the order of the table.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. Tick labels are thinned if they do not fit.

    Raises
    ------
    SAMSError
        If rows and columns differ.

    Examples
    --------
    >>> table = scvi_sams.tl.perturbation_similarity(model.get_perturbation_effects().mean)
    >>> ax = scvi_sams.pl.similarity(table)
    """
    if isinstance(similarity, AnnData | PerturbationModel):
        similarity = perturbation_similarity(similarity)
    check_table(similarity=similarity)
    if not similarity.index.equals(similarity.columns):
        raise SAMSError(
            "Rows and columns of a similarity must be the same perturbations; these differ."
        )
    table: pd.DataFrame = similarity
    if order:
        leaves = hierarchical_order(table.to_numpy(np.float64))
        table = table.iloc[leaves, leaves]
    signed = bool((table < 0).any(axis=None))
    limits = (-1, 1) if signed else (0, 1)
    return _square(table, "RdBu_r" if signed else "Blues", limits, "similarity", ax, figsize, save)


def interaction_matrix(
    interactions: Source,
    score: str = "score",
    *,
    lower: str | None = None,
    delimiter: str = "+",
    order: bool = True,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Matrix of the interactions of all pairs, grey where unknown.

    Parameters
    ----------
    interactions
        One row per pair: ``obs`` of ``predict_interactions``, or the table of
        ``rank_unseen_pairs`` or :func:`scvi_sams.tl.genetic_interactions`. Larger
        combinations are ignored. Or an AnnData in whose ``uns`` the last is stored, or a model, for
        which it is computed; then name a ``score``, such as ``"observed_relative"``.
    score
        Column to show; symmetric, unless ``lower`` is given.
    lower
        Column for the triangle below the diagonal, such as ``"predicted_relative"`` with
        ``"observed_relative"`` above it.
    delimiter
        Separator between the perturbations of a pair.
    order
        Put perturbations with similar interactions next to each other; ``False`` sorts by name.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes; colours are centred on 0. Tick labels are thinned if they do not fit.

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
    interactions = result_of(interactions, _INTERACTIONS)
    columns = (score,) if lower is None else (score, lower)
    check_has("The table has no column", columns, interactions.columns)
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
        leaves = hierarchical_order(cosine_similarity(np.nan_to_num(upper)))
    above, below = (values[np.ix_(leaves, leaves)] for values in (upper, table))
    shown = np.where(np.triu(np.ones_like(above, dtype=bool)), above, below)
    # A single extreme pair would make all others pale.
    shares = (_SHOWN, 1) if np.isfinite(shown).sum() > _MANY else (1,)
    extreme = next((e for e in np.nanquantile(np.abs(shown), shares) if e > 0), 1.0)
    ordered = [names[leaf] for leaf in leaves]
    meaning = score if lower is None else f"above: {score}\nbelow: {lower}"
    frame = pd.DataFrame(shown, index=ordered, columns=ordered)
    meaning = meaning.replace("_", " ")
    return _square(frame, "RdBu_r", (-extreme, extreme), meaning, ax, figsize, save)


def _matrix(names: list[str], pairs: pd.DataFrame, values: pd.Series) -> np.ndarray:
    matrix = np.full((len(names), len(names)), np.nan)
    rows, columns = (pd.Index(names).get_indexer(pd.Index(pairs[side])) for side in (0, 1))
    matrix[rows, columns] = matrix[columns, rows] = values.to_numpy()
    return matrix


def _square(
    table: pd.DataFrame,
    colours: str,
    limits: tuple[float, float],
    meaning: str,
    ax: Axes | None,
    figsize: tuple[float, float] | None,
    save: str | Path | None,
) -> Axes:
    side = float(np.clip(1.8 + ROW * len(table), 3.2, 9))
    ax = new_axes(ax, side + 0.9, side, figsize, save)
    bar = heatmap(ax, table, colours, limits)
    ax.set_aspect("equal")
    bar.set_label(meaning)
    label_rows_and_columns(ax, table.index, table.columns)
    ax.set_xlabel(f"perturbation ({len(table)})")
    finish(ax, save)
    return ax


def heatmap(ax: Axes, table: pd.DataFrame, colours: str, limits: tuple[float, float]) -> Colorbar:
    """Draw the entries, unknown ones in grey, and label the colours."""
    values = np.ma.masked_invalid(table.to_numpy(np.float64))
    image = ax.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps[colours].with_extremes(bad=_NOT_KNOWN),
        vmin=limits[0],
        vmax=limits[1],
    )
    beyond = np.abs(values).max() > limits[1] + _ROUNDING
    return ax.figure.colorbar(image, ax=ax, shrink=0.6, extend="both" if beyond else "neither")
