"""How training went, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scvi_sams._checks import as_axes, as_names
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

_TERMS = {
    "elbo": "minus ELBO",
    "reconstruction_loss": "minus log p(x | z)",
    "kl_z_basal": "KL of basal states",
    "kl_masks": "KL of masks",
    "kl_effects": "KL of effects",
    "active_masks": "share of active masks",
}
"""What history calls a term, and what it is: in nats per cell, but for the last."""
_SIDES = {"train": ("#0072B2", "-"), "validation": ("#D55E00", "--")}
_FIRST_EPOCHS = 0.05
"""Share of the epochs whose values may lie outside: the first ones dwarf all others."""
_FONT_SIZE = 7
_PANELS_PER_ROW = 3


def training_curves(
    history: Mapping[str, pd.DataFrame],
    *,
    terms: Sequence[str] | None = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> Sequence[Axes]:
    """Every term of the ELBO over the epochs, of training and validation cells.

    Parameters
    ----------
    history
        ``model.history``.
    terms
        Some of ``"elbo"``, ``"reconstruction_loss"``, ``"kl_z_basal"``, ``"kl_masks"``,
        ``"kl_effects"`` and ``"active_masks"``; ``None`` for all that the model has.
    axes
        One axes per term; ``None`` makes a figure.

    Returns
    -------
    The axes, one per term. Nats per cell, lower is better for the first two; the divergences of
    masks and effects are shared out among the cells. The dense phase is shaded.

    Raises
    ------
    MissingKeyError
        If the history has no such term.
    SAMSError
        If there is not one axes per term.

    Examples
    --------
    >>> axes = scvi_sams.pl.training_curves(model.history, terms=["elbo", "active_masks"])
    >>> len(axes)
    2
    """
    if not isinstance(history, Mapping):
        raise InvalidArgumentError(
            f"`history` must be the history of a trained model, not {type(history).__name__}."
        )
    known = [term for term in _TERMS if any(key in history for key in _keys(term))]
    chosen = known if terms is None else as_names("terms", terms)
    absent = [term for term in chosen if term not in known]
    if absent or not chosen:
        raise MissingKeyError(
            f"The history has no {', '.join(map(repr, absent)) or 'terms of the ELBO'}; it has "
            f"{', '.join(map(repr, known)) or 'none'}."
        )
    if axes is None:
        n_columns = min(len(chosen), _PANELS_PER_ROW)
        n_rows = -(-len(chosen) // n_columns)
        figure, grid = plt.subplots(
            n_rows,
            n_columns,
            figsize=(2.5 * n_columns, 1.9 * n_rows),
            layout="constrained",
            squeeze=False,
        )
        axes = list(grid.ravel())
        for unused in axes[len(chosen) :]:
            figure.delaxes(unused)
        axes = axes[: len(chosen)]
    panels = as_axes("axes", axes)
    if len(panels) != len(chosen):
        raise SAMSError(f"{len(chosen)} terms need as many axes, not {len(panels)}.")
    for ax, term in zip(panels, chosen, strict=True):
        _draw_term(ax, history, term)
    panels[0].legend(frameon=False, fontsize=_FONT_SIZE, loc="upper right")
    return panels


def _keys(term: str) -> list[str]:
    return [term] if term == "active_masks" else [f"{term}_{side}" for side in _SIDES]


def _draw_term(ax: Axes, history: Mapping[str, pd.DataFrame], term: str) -> None:
    later = []
    for key in _keys(term):
        if key not in history:
            continue
        side = key.removeprefix(f"{term}_")
        colour, style = _SIDES.get(side, ("#009E73", "-"))
        curve = history[key].iloc[:, 0].astype(float)
        curve = curve[np.isfinite(curve)]
        ax.plot(curve.index, curve, color=colour, linestyle=style, linewidth=1.3, label=side)
        later.append(curve.iloc[int(np.ceil(_FIRST_EPOCHS * len(curve))) :])
    values = pd.concat(later)
    if len(values):
        margin = 0.06 * (values.max() - values.min()) or 0.05 * abs(values.max()) or 0.05
        ax.set_ylim(values.min() - margin, values.max() + margin)
    if "dense_phase" in history:
        dense = history["dense_phase"].iloc[:, 0].astype(float)
        if (dense > 0).any():
            ax.axvspan(dense.index[0], dense.index[dense > 0][-1], color="0.93", linewidth=0)
    ax.set_title(_TERMS[term], fontsize=_FONT_SIZE + 1)
    ax.set_xlabel("epoch", fontsize=_FONT_SIZE)
    if term != "active_masks":
        ax.set_ylabel("nats per cell", fontsize=_FONT_SIZE)
    ax.tick_params(labelsize=_FONT_SIZE - 1, length=2)
    ax.spines[["top", "right"]].set_visible(False)
