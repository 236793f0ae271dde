"""Diagnostics of a model: training curves, and calibration of probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scvi_sams._checks import as_names
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError
from scvi_sams.metrics._recovery import Calibration
from scvi_sams.plotting._style import (
    COLOURS,
    GREY,
    SHADE,
    finish,
    literal,
    new_axes,
    new_panels,
    tidy,
)

_TERMS = {
    "elbo": "minus ELBO",
    "reconstruction_loss": "minus log p(x | z)",
    "kl_z_basal": "KL of basal states",
    "kl_masks": "KL of masks",
    "kl_effects": "KL of effects",
    "active_masks": "proportion of active masks",
}
"""Names of terms in history, and their labels: nats per cell, except for the last."""
_SIDES = {"train": ("#0072B2", "-"), "validation": ("#D55E00", "--")}
_FIRST_EPOCHS = 0.05
"""Proportion of epochs whose values may be outside the axes: the first ones are much larger."""
_PANELS_PER_ROW = 3
_LARGEST_POINT, _SMALLEST_POINT = 120, 12


def training_curves(
    history: Mapping[str, pd.DataFrame] | None,
    *,
    terms: Sequence[str] | None = None,
    axes: Sequence[Axes] | np.ndarray | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Sequence[Axes]:
    """Every term of the ELBO over epochs, for training and validation cells.

    Parameters
    ----------
    history
        ``model.history``, ``None`` before training.
    terms
        Some of ``"elbo"``, ``"reconstruction_loss"``, ``"kl_z_basal"``, ``"kl_masks"``,
        ``"kl_effects"`` and ``"active_masks"``; ``None`` for all terms of the model.
    axes
        One axes per term; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes, one per term. Nats per cell, lower is better for the first two; the divergences of
    masks and effects are divided between the cells. The dense phase is shaded.

    Raises
    ------
    MissingKeyError
        If the history has no such term, for example because the model is not trained.
    SAMSError
        If there is not one axes per term.

    Examples
    --------
    >>> axes = scvi_sams.pl.training_curves(model.history, terms=["elbo", "active_masks"])
    >>> len(axes)
    2
    """
    history = {} if history is None else history
    known = [term for term in _TERMS if any(key in history for key in _keys(term))]
    chosen = known if terms is None else as_names("terms", terms)
    absent = [term for term in chosen if term not in known]
    if absent or not chosen:
        raise MissingKeyError(
            f"The history has no {', '.join(map(repr, absent)) or 'terms of the ELBO'}; it has "
            f"{', '.join(map(repr, known)) or 'none'}."
        )
    n_columns = min(len(chosen), _PANELS_PER_ROW)
    size = (2.5 * n_columns, 1.9 * -(-len(chosen) // n_columns))
    panels = new_panels(axes, chosen, "terms", size, figsize, save, n_columns=n_columns)
    for ax, term in zip(panels, chosen, strict=True):
        _draw_term(ax, history, term)
    panels[0].legend(frameon=False, loc="upper right")
    finish(panels, save)
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
            ax.axvspan(dense.index[0], dense.index[dense > 0][-1], **SHADE)
    ax.set_title(_TERMS[term])
    ax.set_xlabel("epoch")
    ax.locator_params(axis="x", integer=True)
    if term != "active_masks":
        ax.set_ylabel("nats per cell")
    tidy(ax)


def mask_calibration(
    calibration: Calibration | Mapping[str, Calibration],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Reliability diagram: inclusion probability against the proportion of true entries.

    Calibrated probabilities are on the diagonal; overconfident ones are below it.

    Parameters
    ----------
    calibration
        Result of :func:`~scvi_sams.evaluation.mask_calibration`, or several by name.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. A point is a bin; its area increases with the logarithm of the number of entries in
    it. The legend contains expected calibration errors.

    Examples
    --------
    >>> truth = adata.uns["simulation"]
    >>> calibration = scvi_sams.evaluation.mask_calibration(
    ...     model.get_perturbation_masks(),
    ...     pd.DataFrame(truth["true_masks"], index=truth["perturbations"]),
    ... )
    >>> ax = scvi_sams.pl.mask_calibration({"small screen": calibration})
    """
    several = {"": calibration} if isinstance(calibration, Calibration) else calibration
    if not isinstance(several, Mapping) or not all(
        isinstance(one, Calibration) for one in several.values()
    ):
        raise InvalidArgumentError(
            "`calibration` must be the result of scvi_sams.evaluation.mask_calibration, or a dict "
            f"of several, not {type(calibration).__name__}."
        )
    ax = new_axes(ax, 4.6, 4.4, figsize, save)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
    most = max((one.bins["n_entries"].max() for one in several.values()), default=1)
    for number, (name, one) in enumerate(several.items()):
        bins = one.bins[one.bins["n_entries"] > 0]
        colour = COLOURS[number % len(COLOURS)]
        label = f"{literal(name)}: " if name else ""
        area = np.log1p(bins["n_entries"]) / np.log1p(most) * _LARGEST_POINT
        ax.plot(bins["predicted"], bins["observed"], color=colour, linewidth=1)
        ax.scatter(
            bins["predicted"],
            bins["observed"],
            s=area.clip(lower=_SMALLEST_POINT),
            color=colour,
            edgecolors=[ax.get_facecolor()],
            zorder=3,
            label=f"{label}calibration error {one.expected_calibration_error:.3f}",
        )
    ax.set(
        xlabel="inclusion probability",
        ylabel="proportion of true entries",
        xlim=(-0.04, 1.04),
        ylim=(-0.04, 1.04),
        aspect="equal",
    )
    ax.legend(frameon=False, loc="best")
    finish(ax, save)
    return ax
