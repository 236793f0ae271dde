"""The latent space with and without the effects of perturbations."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from scvi_sams._checks import as_axes, as_names, check_anndata, check_text
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

_TITLES = {
    RESULT_KEYS.LATENT: "basal state",
    RESULT_KEYS.LATENT_PERTURBED: "with perturbation effects",
}
_COLORS = (
    "#332288",
    "#88CCEE",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#AA4499",
    "#44AA99",
    "#882255",
    "#999933",
)
"""Paul Tol's "muted" scheme: distinct for colour-blind readers, with grey left for the rest."""
_REST_COLOR = "#DDDDDD"
_SEED = 0


def latent(
    adata: ad.AnnData,
    *,
    basis: Sequence[str] = (RESULT_KEYS.LATENT, RESULT_KEYS.LATENT_PERTURBED),
    color: str = "perturbation",
    axes: Sequence[Axes] | np.ndarray | None = None,
    highlight: Sequence[str] | None = None,
) -> Sequence[Axes]:
    """UMAPs of latent representations side by side, cells coloured by a label.

    Parameters
    ----------
    adata
        Cells with the representations in ``obsm``. Not changed: neighbours and UMAP (scanpy's, with
        a fixed seed) are computed on a copy of each representation. Subset large data first.
    basis
        Keys of ``adata.obsm``, one panel each.
    color
        Column of ``adata.obs`` with the label of each cell.
    axes
        One axes per panel; ``None`` makes a figure.
    highlight
        Labels to colour (at most nine), all others are grey. ``None`` colours the largest groups.

    Returns
    -------
    The axes, one per panel. The legend stands beside the last one.

    Raises
    ------
    MissingKeyError
        If a representation or the column is not in ``adata``.
    SAMSError
        If there are more labels to highlight than colours, labels that no cell carries, or not one
        axes per panel.

    Examples
    --------
    >>> latent = model.get_latent_representation()  # adata.obsm["X_sams"]
    >>> axes = scvi_sams.pl.latent(adata, basis=["X_sams"], highlight=["P001"])  # doctest: +SKIP
    """
    check_anndata(adata=adata)
    basis = as_names("basis", basis)
    if not basis:
        raise InvalidArgumentError("`basis` is empty: name representations of adata.obsm.")
    highlight = None if highlight is None else as_names("highlight", highlight)
    check_text(color=color)
    _check_keys_exist(adata, basis, color)
    labels = adata.obs[color].astype(str)
    color_of_label = dict(zip(_highlighted(labels, highlight), _COLORS, strict=False))
    if axes is None:
        _, grid = plt.subplots(
            1,
            len(basis),
            figsize=(3.8 * len(basis) + 1.4, 3.8),
            squeeze=False,
            layout="constrained",
        )
        axes = grid[0]
    panels = as_axes("axes", axes)
    if len(panels) != len(basis):
        raise SAMSError(f"{len(basis)} representations need as many axes, not {len(panels)}.")
    for ax, key in zip(panels, basis, strict=True):
        _draw_cells(ax, _umap(np.asarray(adata.obsm[key])), labels, color_of_label)
        ax.set(title=_TITLES.get(key, key), xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    _add_legend(panels[-1], labels, color_of_label, title=color)
    return panels


def _check_keys_exist(adata: ad.AnnData, basis: Sequence[str], color: str) -> None:
    absent = [key for key in basis if key not in adata.obsm]
    if absent:
        raise MissingKeyError(
            f"obsm has no {', '.join(map(repr, absent))}. Compute it first with the model's "
            "get_latent_representation."
        )
    if color not in adata.obs:
        raise MissingKeyError(f"obs has no column {color!r} to colour the cells by.")


def _highlighted(labels: pd.Series, highlight: Sequence[str] | None) -> list[str]:
    """Return the labels that get a colour, the largest group first unless they were chosen."""
    sizes = labels.value_counts()
    if highlight is None:
        by_size = sorted(sizes.index, key=lambda label: (-sizes[label], label))
        return by_size[: len(_COLORS)]
    absent = [label for label in highlight if label not in sizes]
    if absent:
        raise SAMSError(f"No cell carries the label {', '.join(map(repr, absent))} to highlight.")
    if len(highlight) > len(_COLORS):
        raise SAMSError(
            f"{len(highlight)} labels cannot be told apart by colour; highlight at most "
            f"{len(_COLORS)}."
        )
    return list(highlight)


def _umap(representation: np.ndarray) -> np.ndarray:
    cells = ad.AnnData(representation)
    sc.pp.neighbors(cells, use_rep="X", random_state=_SEED)
    sc.tl.umap(cells, random_state=_SEED)
    return cells.obsm["X_umap"]


def _draw_cells(
    ax: Axes, positions: np.ndarray, labels: pd.Series, color_of_label: dict[str, str]
) -> None:
    size = np.clip(20_000 / len(positions), 1, 14)
    colored = labels.isin(color_of_label).to_numpy()
    x, y = positions.T
    ax.scatter(x[~colored], y[~colored], s=size, color=_REST_COLOR, linewidths=0, rasterized=True)
    # In random order, so that no group is drawn on top of all others.
    cells = np.random.default_rng(_SEED).permutation(np.flatnonzero(colored))
    ax.scatter(
        x[cells],
        y[cells],
        s=size,
        c=labels.iloc[cells].map(color_of_label).tolist(),
        linewidths=0,
        rasterized=True,
    )


def _add_legend(ax: Axes, labels: pd.Series, color_of_label: dict[str, str], *, title: str) -> None:
    entries = dict(color_of_label)
    n_rest = labels.nunique() - len(color_of_label)
    if n_rest:
        entries[f"{n_rest} others"] = _REST_COLOR
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=value, label=label)
        for label, value in entries.items()
    ]
    ax.legend(
        handles=handles,
        title=title,
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
