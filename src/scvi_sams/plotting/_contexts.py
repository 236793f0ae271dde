"""Perturbations in contexts: where they act, how strongly, and where effects differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scvi_sams._checks import as_names
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError
from scvi_sams.interpretation._contexts import context_effects as table_of_pairs
from scvi_sams.interpretation._stored import Slot, Source, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._labels import label_rows_and_columns
from scvi_sams.plotting._matrices import heatmap
from scvi_sams.plotting._style import GREY, ROW, TEXT, finish, lay_out, new_axes, points

_COLUMNS = (
    "perturbation", "context", "is_measured", "acts", "differs", "effect", "pattern",
)  # fmt: skip
_PARTLY = "shared, partly called"
_GROUPS = {
    "shared": "shared",
    _PARTLY: "no difference\ncalled",
    "differs in": "differ",
    "only in": "in some only",
    "unclear": "unclear",
    "none": "none",
}
"""Beginnings of patterns, in the order in which they are drawn, and the names of the groups."""
_DOT = 2.6
"""Largest diameter of a dot, in points."""
_SHARE_OF_ROW = 0.6
"""Largest proportion of a cell of the heatmap that a dot takes."""
_SLOT = Slot(
    "uns",
    RESULT_KEYS.CONTEXT_EFFECTS,
    "scvi_sams.tl.context_effects(model)",
    partial(table_of_pairs, key_added=None),
)


def context_effects(
    effects: Source,
    *,
    perturbations: Sequence[str] | None = None,
    order: bool = True,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Heatmap of effect sizes, perturbations x contexts; dots mark where they differ.

    Parameters
    ----------
    effects
        Result of :func:`scvi_sams.tl.context_effects`, or a model, for which it is computed with
        default arguments (nothing is written), or an AnnData in whose ``uns`` it is stored.
    perturbations
        Names, which are always drawn; ``None`` for those with a call.
    order
        Group perturbations by ``pattern``, within groups by the contexts in which they act, the
        strongest first; ``False`` keeps the order of the table, or of ``perturbations``.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. Pairs that are not called to act are white, unmeasured pairs grey. Perturbations that
    are called in some contexts only, without a called difference, are a group of their own, "no
    difference called". A dot marks a
    context that differs from the others, a hollow dot one in which the effect is absent. Tick
    labels are thinned if they do not fit.

    Raises
    ------
    InvalidArgumentError
        If ``effects`` is neither a table nor a model, or ``perturbations`` is empty.
    MissingKeyError
        If there is no such perturbation, or the table lacks a column.
    SAMSError
        If no perturbation has a call, or the model has no contexts.

    Examples
    --------
    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=50, n_perturbations=3, n_combinations=0, n_cell_types=2
    ... )
    >>> scvi_sams.SAMSVAE.setup_anndata(screen, context_key="cell_type")
    >>> in_contexts = scvi_sams.SAMSVAE(screen, n_latent=4, n_hidden=16)
    >>> in_contexts.train(max_epochs=2, enable_progress_bar=False)
    >>> table = scvi_sams.tl.context_effects(in_contexts)
    >>> ax = scvi_sams.pl.context_effects(table, perturbations=["P001", "P002"])
    >>> ax.get_xlabel()
    'context (2)'
    """
    table = _table(effects)
    named = _named(table, perturbations)
    pattern = table.drop_duplicates("perturbation").set_index("perturbation")["pattern"].loc[named]
    group = pattern.astype(str).str.split(":").str[0]
    contexts = list(dict.fromkeys(table["context"].astype(str)))
    effect, acts, differs, measured = (
        table.pivot(index="perturbation", columns="context", values=column)
        .loc[named, contexts]
        .to_numpy(dtype)
        for column, dtype in (
            ("effect", np.float64), ("acts", bool), ("differs", bool), ("is_measured", bool),
        )
    )  # fmt: skip
    shown = np.where(acts, effect, 0.0)
    # An effect that is called in some contexts, but whose absence in the others is not.
    group = group.mask((group == "shared") & (measured & ~acts).any(axis=1), _PARTLY)
    if order:
        rows = _order(group, acts, shown)
        named = [named[row] for row in rows]
        shown, differs, measured = shown[rows], differs[rows], measured[rows]
        group = group.iloc[rows]
    n_rows, n_columns = shown.shape
    below = 0.06 * max(len(name) for name in contexts)  # for vertical names
    height = float(np.clip(0.8 + below + ROW * n_rows, 2.4 + below, 10))
    width = float(np.clip(3.0 + 0.2 * n_columns, 3.4, 10))
    ax = new_axes(ax, width, height, figsize, save)
    values = pd.DataFrame(np.where(measured, shown, np.nan), index=named, columns=contexts)
    bar = heatmap(ax, values, "Blues", (0, shown.max() or 1.0))
    bar.set_label("size of the effect\n(latent units)")
    _mark(ax, shown, differs)
    label_rows_and_columns(ax, values.index, values.columns)
    if order:
        _name_groups(ax, group)
    ax.set_xlabel(f"context ({n_columns})")
    ax.set_ylabel(f"perturbation ({n_rows})")
    n_all = table["perturbation"].nunique()
    left_out = "" if n_rows == n_all else f"{n_rows} of {n_all} perturbations"
    ax.set_title(left_out, fontsize=TEXT, loc="left")
    finish(ax, save)
    return ax


def _table(effects: Any) -> pd.DataFrame:
    effects = result_of(effects, _SLOT)
    if not isinstance(effects, pd.DataFrame):
        raise InvalidArgumentError(
            "`effects` must be the result of tl.context_effects(model), or a model, not "
            f"{type(effects).__name__}."
        )
    absent = [column for column in _COLUMNS if column not in effects]
    if absent:
        raise MissingKeyError(
            f"`effects` has no column {absent[0]!r}: pass the result of tl.context_effects(model)."
        )
    return effects


def _named(table: pd.DataFrame, perturbations: Sequence[str] | None) -> list[str]:
    """Perturbations to draw, in the requested order or that of the table."""
    there = list(dict.fromkeys(table["perturbation"].astype(str)))
    if perturbations is not None:
        named = as_names("perturbations", perturbations)
        if not named:
            raise InvalidArgumentError(
                "`perturbations` is empty: name some, or pass None for those with a call."
            )
        check_has("The table has no perturbation", named, there)
        return list(dict.fromkeys(named))
    does_something = set(table.loc[table["pattern"] != "none", "perturbation"].astype(str))
    if not does_something:
        raise SAMSError(
            "No perturbation is called to act in any context. Name some in `perturbations` "
            "to draw them anyway, or use a larger `fdr` in tl.context_effects."
        )
    return [name for name in there if name in does_something]


def _order(group: pd.Series, acts: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Order rows by pattern, then by the contexts in which they act, then by effect size."""
    kinds = list(_GROUPS)
    rank = np.array([kinds.index(kind) if kind in kinds else len(kinds) for kind in group])
    strength = -shown.max(axis=1)
    if not shown.shape[1]:
        return np.lexsort((strength, rank))
    # Acting in earlier contexts comes first.
    return np.lexsort((strength, *(~acts[:, ::-1]).T, rank))


def _mark(ax: Axes, shown: np.ndarray, differs: np.ndarray) -> None:
    """Dots where contexts differ; hollow where no effect is left."""
    rows, columns = np.nonzero(differs)
    size = shown[rows, columns]
    edge = np.where(size > shown.max() / 2, "white", "black")
    face = np.where(size > 0, edge, "none")
    lay_out(ax)
    points_per_row = ax.get_window_extent().height * 72 / ax.figure.dpi / len(shown)
    diameter = min(_DOT, _SHARE_OF_ROW * points_per_row)
    ax.scatter(columns, rows, s=diameter**2, c=face, edgecolors=edge.tolist(), linewidths=0.6)


def _name_groups(ax: Axes, group: pd.Series) -> None:
    """Lines between patterns, and their names on the right."""
    kinds = group.to_numpy()
    starts = np.flatnonzero(np.r_[True, kinds[1:] != kinds[:-1]])
    ends = np.r_[starts[1:], len(kinds)]
    lines = ax.get_window_extent().height * 72 / ax.figure.dpi / len(kinds) / points(TEXT)
    for start, end in zip(starts, ends, strict=True):
        if start:
            ax.axhline(start - 0.5, color=GREY, linewidth=0.6)
        name = _GROUPS.get(kinds[start], kinds[start])
        if (end - start) * lines >= 1.2 * (1 + name.count("\n")):
            ax.annotate(
                name,
                (1.02, (start + end - 1) / 2),
                xycoords=ax.get_yaxis_transform(),
                fontsize=TEXT,
                va="center",
                annotation_clip=False,
            )
