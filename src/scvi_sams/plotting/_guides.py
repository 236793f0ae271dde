"""Efficacy of guides, grouped by perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from scvi_sams._checks import as_names, check_choice, check_integer
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError
from scvi_sams.interpretation._guides import guide_efficacy as table_of_guides
from scvi_sams.interpretation._stored import Slot, Source, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._style import (
    GREY,
    ROW,
    SHADE,
    TEXT,
    finish,
    legend_below,
    literal,
    new_axes,
    tidy,
)

_SHOWN = {
    "response_rate": ("rate_low", "rate_high", "proportion of responding cells"),
    "effect_size": ("effect_low", "effect_high", "proportion of the effect of the perturbation"),
}
_KINDS = {
    "works": ("o", "#0072B2"),
    "does nothing": ("o", "#D55E00"),
    "differs from siblings": ("D", "#CC79A7"),
}
"""Marker and colour; guides without an effect are hollow."""
_UNKNOWN = "0.6"
_GAP = 0.6
"""Rows between perturbations."""
_SLOT = Slot(
    "uns",
    RESULT_KEYS.GUIDES,
    "scvi_sams.tl.guide_efficacy(model)",
    partial(table_of_guides, key_added=None),
)


def guide_efficacy(
    guides: Source,
    *,
    value: Literal["response_rate", "effect_size"] | None = None,
    perturbations: Sequence[str] | None = None,
    n_perturbations: int = 20,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Dots and intervals of guides, grouped by perturbation.

    Parameters
    ----------
    guides
        Result of :func:`scvi_sams.tl.guide_efficacy`, or a model, for which it is computed with
        default arguments (nothing is written), or an AnnData in whose ``uns`` it is stored.
    value
        Column to draw; ``None`` for the response rate, or the effect size if there are no rates.
    perturbations
        Names; ``None`` for those with an effect (``acts``).
    n_perturbations
        Largest number to draw, unless ``perturbations`` are named: those with flagged guides come
        first, then those whose guides differ most.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes, a row per guide. Guides without an effect are hollow, those that differ from their
    siblings are diamonds. For a named perturbation without a clear effect the names are grey, and
    nothing is drawn.

    Raises
    ------
    MissingKeyError
        If there is no such perturbation, or the table lacks a column.
    SAMSError
        If there is nothing to draw: no perturbation has an effect, or rates are requested for a
        model with ``responses=False``.

    Examples
    --------
    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=50, n_perturbations=3, n_combinations=0, guides_per_perturbation=2
    ... )
    >>> scvi_sams.SAMSVAE.setup_anndata(screen, guide_key="guide")
    >>> of_guides = scvi_sams.SAMSVAE(screen, n_latent=4, n_hidden=16)
    >>> of_guides.train(max_epochs=2, enable_progress_bar=False)
    >>> table = scvi_sams.tl.guide_efficacy(of_guides, n_samples=200)
    >>> ax = scvi_sams.pl.guide_efficacy(table, perturbations=["P001"])
    """
    check_integer(n_perturbations=n_perturbations)
    if value is not None:
        check_choice("value", value, tuple(_SHOWN))
    table = _table(guides)
    if value is None:
        value = "response_rate" if table["response_rate"].notna().any() else "effect_size"
    blocks, title = _blocks(table, value, perturbations, n_perturbations)
    n_rows = sum(len(block) for block in blocks)
    height = ROW * (n_rows + _GAP * len(blocks))
    ax = new_axes(ax, 4.2, float(np.clip(1.1 + height, 2, 14)), figsize, save)
    low, high, meaning = _SHOWN[value]
    names: list[object] = []
    places: list[float] = []
    start = 0.0
    for number, block in enumerate(blocks):
        rows = start + np.arange(len(block))
        if number % 2:
            ends = (rows[0] - (1 + _GAP) / 2, rows[-1] + (1 + _GAP) / 2)
            ax.axhspan(*ends, zorder=0, **SHADE)
        for place, (_, row) in zip(rows, block.iterrows(), strict=True):
            _draw(ax, place, row[value], row[low], row[high], _kind(row))
        names.extend(block.index)
        places.extend(rows)
        start = rows[-1] + 1 + _GAP
    for reference in (0.0, 1.0):
        ax.axvline(reference, color=GREY, linewidth=0.8, zorder=1)
    if value == "response_rate":
        ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(start - _GAP / 2 - 0.5, -0.5 - _GAP / 2)
    _name_rows(ax, blocks, names, places)
    ax.set_xlabel(meaning)
    ax.set_title(title, fontsize=TEXT, loc="left")
    tidy(ax)
    _explain(ax, blocks)
    finish(ax, save)
    return ax


def _table(guides: Any) -> pd.DataFrame:
    guides = result_of(guides, _SLOT)
    if not isinstance(guides, pd.DataFrame):
        raise InvalidArgumentError(
            "`guides` must be the result of tl.guide_efficacy(model), or a model, not "
            f"{type(guides).__name__}."
        )
    columns = ["perturbation", "acts", "does_nothing", "differs_from_siblings", *_SHOWN]
    columns += [bound for bounds in _SHOWN.values() for bound in bounds[:2]]
    absent = [column for column in columns if column not in guides]
    if absent:
        raise MissingKeyError(
            f"`guides` has no column {absent[0]!r}: pass the result of tl.guide_efficacy(model)."
        )
    return guides


def _blocks(
    table: pd.DataFrame, value: str, perturbations: Sequence[str] | None, n_perturbations: int
) -> tuple[list[pd.DataFrame], str]:
    """Rows of each perturbation to draw, and a title that names what is not drawn."""
    grouped = table.groupby("perturbation", sort=False, observed=True)
    of_perturbation = {str(name): rows for name, rows in grouped}
    if perturbations is not None:
        named = as_names("perturbations", perturbations)
        if not named:
            raise InvalidArgumentError(
                "`perturbations` is empty: name some, or pass None for those that have an effect."
            )
        check_has("The table has no perturbation", named, pd.Index(of_perturbation))
        return [of_perturbation[name] for name in named], ""
    known = {name: rows for name, rows in of_perturbation.items() if rows[value].notna().any()}
    if not known:
        raise SAMSError(
            f"No perturbation has a guide with a known {value.replace('_', ' ')}: none has a clear "
            "effect, or, for rates, the model was made with responses=False."
        )

    def rank(name: str) -> tuple[bool, float]:
        rows = known[name]
        flagged = rows[["does_nothing", "differs_from_siblings"]].any(axis=None)
        return not flagged, float(rows[value].min() - rows[value].max())

    shown = sorted(known, key=rank)[:n_perturbations]
    left_out = len(of_perturbation) - len(known)
    parts = [f"{len(shown)} of {len(known)} perturbations"] if len(shown) < len(known) else []
    parts += [f"{left_out} without a clear effect are not shown"] if left_out else []
    return [rows for name, rows in known.items() if name in shown], "; ".join(parts)


def _kind(row: pd.Series) -> str:
    if row["differs_from_siblings"]:
        return "differs from siblings"
    return "does nothing" if row["does_nothing"] else "works"


def _draw(ax: Axes, place: float, value: float, low: float, high: float, kind: str) -> None:
    marker, colour = _KINDS[kind]
    ax.plot([low, high], [place, place], color=colour, linewidth=1.3, zorder=2)
    face = ax.get_facecolor() if kind == "does nothing" else colour
    ax.plot(value, place, marker=marker, markersize=4, color=colour, markerfacecolor=face, zorder=3)


def _name_rows(
    ax: Axes, blocks: list[pd.DataFrame], names: Sequence[object], places: Sequence[float]
) -> None:
    """Name guides on the left and their perturbations on the right."""
    ax.set_yticks(list(places), [literal(name) for name in names])
    acts = np.concatenate([block["acts"].to_numpy(bool) for block in blocks])
    for label, is_known in zip(ax.get_yticklabels(), acts, strict=True):
        label.set_color(rcParams["ytick.color"] if is_known else _UNKNOWN)
    start = 0
    for block in blocks:
        name = str(block["perturbation"].iloc[0])
        middle = float(np.mean(places[start : start + len(block)]))
        colour = rcParams["text.color"] if block["acts"].any() else _UNKNOWN
        ax.annotate(
            literal(name),
            (1.02, middle),
            xycoords=ax.get_yaxis_transform(),
            fontsize=TEXT,
            va="center",
            color=colour,
            annotation_clip=False,
        )
        start += len(block)


def _explain(ax: Axes, blocks: list[pd.DataFrame]) -> None:
    """Legend of the markers of flagged guides, if there are any."""
    found = {_kind(row) for block in blocks for _, row in block.iterrows()}
    flagged = [kind for kind in _KINDS if kind in found and kind != "works"]
    handles = [
        Line2D(
            [],
            [],
            marker=_KINDS[kind][0],
            color=_KINDS[kind][1],
            markerfacecolor=ax.get_facecolor() if kind == "does nothing" else _KINDS[kind][1],
            markersize=4,
            linewidth=1.3,
            label=kind,
        )
        for kind in flagged
    ]
    if handles:
        legend_below(ax, handles=handles)
