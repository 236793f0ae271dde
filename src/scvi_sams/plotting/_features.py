"""Weights of features of perturbations for latent dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pandas as pd
from matplotlib.axes import Axes

from scvi_sams._checks import check_choice, check_integer, check_number
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._matrices import marked_heatmap
from scvi_sams.plotting._style import finish

Part = Literal["mask", "effect"]
_COLUMNS = ("feature", "latent", "part", "weight", "lfsr")
_UNITS = {"mask": "log-odds", "effect": "latent units"}


def feature_importance(
    importance: pd.DataFrame,
    *,
    part: Part = "effect",
    max_lfsr: float = 0.001,
    n_features: int = 40,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Heatmap of the weights of features for latent dimensions; dots mark significant signs.

    Parameters
    ----------
    importance
        Table of :func:`scvi_sams.tl.feature_importance`.
    part
        ``"effect"``: the direction of shifts, in latent units. ``"mask"``: whether a dimension is
        shifted, in log-odds.
    max_lfsr
        Weights with a smaller local false sign rate are marked. A rate of 0.05 would mark many
        uninformative features (:func:`scvi_sams.tl.feature_importance`).
    n_features
        Largest number of rows: the features with the strongest marked weights.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes: features with a marked weight, strongest first, and latent dimensions with one.
    Colours are centred on 0. Tick labels are thinned if they do not fit.

    Raises
    ------
    MissingKeyError
        If the table has no such columns.
    InvalidArgumentError
        If ``importance`` is not a table, or another argument is out of its range.
    SAMSError
        If no weight has a local false sign rate below ``max_lfsr``.

    Examples
    --------
    >>> table = pd.DataFrame(
    ...     {
    ...         "feature": ["interferon", "ribosome"],
    ...         "latent": "latent_0",
    ...         "part": "effect",
    ...         "weight": [0.9, 0.1],
    ...         "lfsr": [0.0001, 0.4],
    ...     }
    ... )
    >>> ax = scvi_sams.pl.feature_importance(table)
    >>> ax.get_ylabel()
    'feature (1)'
    """
    if not isinstance(importance, pd.DataFrame):
        raise InvalidArgumentError(
            "`importance` must be the table of scvi_sams.tl.feature_importance, not of type "
            f"{type(importance).__name__}."
        )
    check_has("The table has no column", _COLUMNS, importance.columns)
    check_choice("part", part, get_args(Part))
    check_number(above=0, at_most=1, max_lfsr=max_lfsr)
    check_integer(n_features=n_features)
    of_part = importance[importance["part"] == part]
    sure = of_part[of_part["lfsr"] < max_lfsr]
    if sure.empty:
        raise SAMSError(
            f"No weight of {part}s has a local false sign rate below {max_lfsr:g}: features are "
            "hardly informative. Use a larger max_lfsr to show weights."
        )
    strength = sure["weight"].abs().groupby(sure["feature"], sort=False).max()
    rows = strength.sort_values(ascending=False, kind="stable").index[:n_features]
    sure = sure[sure["feature"].isin(rows)]
    columns = sorted(sure["latent"].unique(), key=lambda name: (len(name), name))
    values, lfsr = (
        of_part.pivot_table(index="feature", columns="latent", values=name).loc[rows, columns]
        for name in ("weight", "lfsr")
    )
    meaning = f"weight of {part}s ({_UNITS[part]} per SD)\n(dots: significant sign)"
    ax = marked_heatmap(values, lfsr.to_numpy() < max_lfsr, meaning, ax, figsize, save)
    ax.set_xlabel(f"latent dimension ({len(columns)})")
    ax.set_ylabel(f"feature ({len(rows)})")
    finish(ax, save)
    return ax
