"""The latent space with and without the effects of perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties

from scvi_sams._checks import as_names
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._style import TEXT, finish, literal, new_panels, points

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
"""Paul Tol's "muted" scheme: distinct for colour-blind readers; grey is for the rest."""
_REST_COLOR = "#DDDDDD"
_SEED = 0


def latent(
    adata: ad.AnnData,
    *,
    basis: Sequence[str] = (RESULT_KEYS.LATENT, RESULT_KEYS.LATENT_PERTURBED),
    color: str = "perturbation",
    axes: Sequence[Axes] | np.ndarray | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    highlight: Sequence[str] | None = None,
) -> Sequence[Axes]:
    """UMAPs of latent representations side by side, with cells coloured by a label.

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
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.
    highlight
        Labels to colour (at most nine); all others are grey. ``None`` colours the largest groups.

    Returns
    -------
    The axes, one per panel. The legend is beside the last one.

    Raises
    ------
    MissingKeyError
        If a representation or the column is not in ``adata``.
    SAMSError
        If there are more labels to highlight than colours, labels without cells, or the number of
        axes differs from that of panels.

    Examples
    --------
    >>> latent = model.get_latent_representation()  # adata.obsm["X_sams"]
    >>> axes = scvi_sams.pl.latent(adata, basis=["X_sams"], highlight=["P001"])  # doctest: +SKIP
    """
    basis = as_names("basis", basis)
    if not basis:
        raise InvalidArgumentError("`basis` is empty: name representations in adata.obsm.")
    highlight = None if highlight is None else as_names("highlight", highlight)
    check_has("adata.obs has no column", [color], adata.obs.columns)
    advice = " Compute it first with the model's get_latent_representation."
    check_has("adata.obsm has no", basis, adata.obsm.keys(), advice)
    labels = adata.obs[color].astype(str)
    palette = dict(zip(_highlighted(labels, highlight), _COLORS, strict=False))
    n_others = labels.nunique() - len(palette)
    if n_others:
        others = f"{n_others} others"
        labels = labels.where(labels.isin(palette), others)
        palette[others] = _REST_COLOR
    shown = pd.Categorical(labels, list(palette)).rename_categories(literal)
    colours = {literal(name): colour for name, colour in palette.items()}
    # Grey cells first, the rest in random order, so that no group covers all others.
    cells = np.random.default_rng(_SEED).permutation(len(labels))
    cells = cells[np.argsort(labels.map(palette).iloc[cells] != _REST_COLOR, kind="stable")]
    size = (3.8 * len(basis) + 1.4, 3.8)
    panels = new_panels(axes, basis, "representations", size, figsize, save, n_columns=len(basis))
    for ax, key in zip(panels, basis, strict=True):
        drawn = ad.AnnData(
            obs=pd.DataFrame({color: shown[cells]}, index=cells.astype(str)),
            obsm={"X_umap": _umap(np.asarray(adata.obsm[key]))[cells]},
        )
        sc.pl.embedding(
            drawn,
            "umap",
            color=color,
            palette=colours,
            size=float(np.clip(20_000 / len(cells), 1, 14)),
            marker="o",
            linewidths=0,
            legend_loc="right margin" if ax is panels[-1] else "none",
            legend_fontsize=points(TEXT),
            frameon=True,
            title=literal(_TITLES.get(key, key)),
            ax=ax,
            show=False,
        )
        ax.set(xlabel="UMAP 1", ylabel="UMAP 2")
        for cells_drawn in ax.collections:
            cells_drawn.set_rasterized(True)
    legend = panels[-1].get_legend()
    legend.set_title(literal(color), prop=FontProperties(size=TEXT))  # type: ignore[union-attr]
    finish(panels, save)
    return panels


def _highlighted(labels: pd.Series, highlight: Sequence[str] | None) -> list[str]:
    """Return the labels to colour, the largest group first unless they were chosen."""
    sizes = labels.value_counts()
    if highlight is None:
        by_size = sorted(sizes.index, key=lambda label: (-sizes[label], label))
        return by_size[: len(_COLORS)]
    check_has("No cell has the label", highlight, sizes.index)
    if len(highlight) > len(_COLORS):
        raise SAMSError(
            f"{len(highlight)} labels cannot be distinguished by colour; highlight at most "
            f"{len(_COLORS)}."
        )
    return list(highlight)


def _umap(representation: np.ndarray) -> np.ndarray:
    cells = ad.AnnData(representation)
    sc.pp.neighbors(cells, use_rep="X", random_state=_SEED)
    sc.tl.umap(cells, random_state=_SEED)
    return cells.obsm["X_umap"]
