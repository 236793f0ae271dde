"""Genes of a program or perturbation, dose-response curves, and predictions vs observations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from scvi_sams._checks import as_names, check_ate, check_integer, check_number, check_table
from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError
from scvi_sams.interpretation._perturbations import SURE
from scvi_sams.interpretation._programs import top_genes
from scvi_sams.interpretation._stored import PROGRAMS, Source, ate_of, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.metrics._ate import align_ate, effect_metrics
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.plotting._labels import label_points
from scvi_sams.plotting._style import (
    COLOURS,
    GREY,
    ROW,
    SHADE,
    TEXT,
    finish,
    lay_out,
    literal,
    new_axes,
    points,
    tidy,
)

_UP, _DOWN, _REST = "#D55E00", "#0072B2", "#BBBBBB"
_CURVE_COLOURS = (*COLOURS, GREY)
_LINE_STYLES = ("-", "--", "-.", ":")
_FDR = 0.05
_NAME_SPACING = 1.35
"""Distance of names at the end of curves, in lines of text."""
_MOST_LETTERS = 36
"""Length of a line of the units of an axis."""
_MANY = 3000
"""Number of points from which on hexagons with counts are drawn instead."""


def program_genes(
    programs: Source,
    latent: str,
    *,
    n_genes: int = 20,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Bars of the genes that change most with a latent dimension, increases above decreases.

    Parameters
    ----------
    programs
        Result of ``get_latent_programs``; or a model, or an AnnData in whose ``varm`` it is stored.
    latent
        Latent dimension, such as ``"latent_0"``.
    n_genes
        Number of genes, those with the largest absolute change.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingKeyError
        If there is no such latent dimension.
    SAMSError
        If no gene changes with it, for example because it is switched off.

    Examples
    --------
    >>> ax = scvi_sams.pl.program_genes(model.get_latent_programs(), "latent_0")
    """
    programs = result_of(programs, PROGRAMS)
    check_table(programs=programs)
    check_has("There is no latent dimension", [latent], programs.columns)
    genes = top_genes(programs[[latent]], n_genes).sort_values("change", kind="stable")
    if genes.empty:
        raise SAMSError(f"No gene changes with {latent!r}: it is switched off.")
    ax = new_axes(ax, 3.4, float(np.clip(0.9 + ROW * len(genes), 2, 9)), figsize, save)
    colours = np.where(genes["change"] > 0, _UP, _DOWN)
    places = np.arange(len(genes))
    ax.barh(places, genes["change"], color=colours, height=0.75)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(places, genes["gene"].map(literal))
    ax.set_ylim(-0.7, len(genes) - 0.3)
    ax.set_xlabel("change of expression\n(log2 per unit)")
    ax.set_title(literal(latent.replace("_", " ")))
    tidy(ax)
    finish(ax, save)
    return ax


def effect_volcano(
    ate: ad.AnnData | PerturbationModel,
    perturbation: str,
    *,
    min_effect: float = 0.1,
    label_top: int = 12,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Effect of a perturbation on every gene against its certainty.

    Parameters
    ----------
    ate
        ATE table: from ``predict_ate`` (best with ``method="lograte"``, without count noise) or
        :func:`scvi_sams.evaluation.observed_ate`. Or a screen in whose ``uns`` a prediction is
        stored, or a model, for which ``predict_ate`` is called with default arguments.
    perturbation
        Row of the table.
    min_effect
        Smallest absolute effect of a coloured gene.
    label_top
        Number of genes to name, the strongest of the coloured ones; names without free space are
        omitted.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. For an observation, the y axis is -log10 of the two-sided p-value (normal), and
    coloured genes have a false discovery rate below 5 % (Benjamini and Hochberg). For a prediction,
    it is the effect size divided by its posterior SD; for coloured genes it exceeds two.

    Raises
    ------
    MissingKeyError
        If the table has no such row, or no standard errors.

    Examples
    --------
    >>> ate = model.predict_ate(["P001"], method="lograte", n_samples=200)
    >>> ax = scvi_sams.pl.effect_volcano(ate, "P001")
    """
    if isinstance(ate, ad.AnnData | PerturbationModel):
        ate = ate_of(ate)
    check_ate(ate=ate)
    check_number(min_effect=min_effect, at_least=0)
    check_integer(at_least=0, label_top=label_top)
    check_has("The table has no row", [perturbation], ate.obs_names)
    if "standard_error" not in ate.layers:
        raise MissingKeyError("The table has no layer 'standard_error', which is required.")
    row = ate.obs_names.get_loc(perturbation)
    effect = np.asarray(ate.X[row], dtype=np.float64)
    error = np.asarray(ate.layers["standard_error"][row], dtype=np.float64)
    n_samples = ate.uns.get("ate", {}).get("n_posterior_samples")
    ratio = np.divide(np.abs(effect), error, out=np.zeros_like(effect), where=error > 0)
    if n_samples is None:
        p_value = 2 * stats.norm.sf(ratio)
        height = -(np.log(2) + stats.norm.logsf(ratio)) / np.log(10)
        is_sure = stats.false_discovery_control(p_value) < _FDR
        meaning = "-log10 p-value"
    else:
        height = ratio / n_samples**0.5
        is_sure = height > SURE
        meaning = "|effect| / posterior SD"
    is_sure &= np.abs(effect) >= min_effect
    ax = new_axes(ax, 4.2, 4, figsize, save)
    colours = np.where(is_sure, np.where(effect > 0, _UP, _DOWN), _REST)
    order = np.argsort(is_sure, kind="stable")
    ax.scatter(effect[order], height[order], s=9, c=colours[order], linewidths=0, alpha=0.8)
    for border in (-min_effect, min_effect):
        ax.axvline(border, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    low, high = min(effect.min(), -1.5 * min_effect), max(effect.max(), 1.5 * min_effect)
    margin = 0.1 * (high - low) or 1.0
    ax.set_xlim(low - margin, high + margin)
    ax.set_ylim(0, 1.12 * height.max() or 1.0)
    units = ate.uns.get("ate", {}).get("units", "")
    ax.set_xlabel(_effect_label(units))
    ax.set_ylabel(meaning)
    n_up, n_down = int((is_sure & (effect > 0)).sum()), int((is_sure & (effect < 0)).sum())
    ax.set_title(f"{literal(perturbation)}: {n_up} up, {n_down} down")
    tidy(ax)
    strongest = np.argsort(-np.where(is_sure, np.abs(effect), -1), kind="stable")[:label_top]
    strongest = strongest[is_sure[strongest]]
    label_points(ax, effect, height, {place: ate.var_names[place] for place in strongest})
    finish(ax, save)
    return ax


def dose_response(
    curves: ad.AnnData,
    perturbation: str,
    genes: Sequence[str] | None = None,
    *,
    n_genes: int = 5,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Effect of a perturbation on some genes by dose, with intervals.

    Parameters
    ----------
    curves
        Result of ``predict_dose_response``.
    perturbation
        Perturbation to draw.
    genes
        Genes to draw; ``None`` for the ``n_genes`` with the largest effect at any dose.
    n_genes
        See ``genes``.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes; names are at the ends of the curves, doses beyond the measured range are shaded.

    Raises
    ------
    MissingKeyError
        If the table has no such perturbation or gene.

    Examples
    --------
    >>> curves = dosed_model.predict_dose_response(["P001"], n_samples=200)
    >>> ax = scvi_sams.pl.dose_response(curves, "P001", n_genes=3)
    """
    check_ate(curves=curves)
    check_integer(n_genes=n_genes)
    names = curves.obs["perturbation"].astype(str)
    check_has("The table has no curves of", [perturbation], names.unique())
    rows = np.flatnonzero(names == perturbation)
    rows = rows[np.argsort(curves.obs["dosage"].to_numpy()[rows], kind="stable")]
    effect = np.asarray(curves.X)[rows]
    if genes is None:
        chosen = np.argsort(-np.abs(effect).max(axis=0), kind="stable")[:n_genes]
    else:
        genes = as_names("genes", genes)
        if not genes:
            raise InvalidArgumentError("`genes` is empty: name some, or None for the strongest.")
        check_has("The table has no gene", genes, curves.var_names)
        chosen = curves.var_names.get_indexer(pd.Index(genes))
    ax = new_axes(ax, 4.4, 3.4, figsize, save)
    dose = curves.obs["dosage"].to_numpy(np.float64)[rows]
    low, high = (np.asarray(curves.layers[f"interval_{side}"])[rows] for side in ("low", "high"))
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    opacity = min(0.15, 0.5 / max(1, len(chosen)))  # many intervals hide each other
    for number, gene in enumerate(chosen):
        colour = _CURVE_COLOURS[number % len(_CURVE_COLOURS)]
        style = _LINE_STYLES[number // len(_CURVE_COLOURS) % len(_LINE_STYLES)]
        ax.fill_between(dose, low[:, gene], high[:, gene], color=colour, alpha=opacity, linewidth=0)
        ax.plot(dose, effect[:, gene], color=colour, linestyle=style, linewidth=1.5)
    measured = curves.obs["is_measured_range"].to_numpy(bool)[rows]
    if not measured.all():
        start = dose[measured].max() if measured.any() else dose[0]
        ax.axvspan(start, dose[-1], zorder=-1, **SHADE)
        ax.text(
            start, 1, " not measured", transform=ax.get_xaxis_transform(), va="bottom",
            fontsize=TEXT, color=GREY,
        )  # fmt: skip
    ax.set_xlim(dose[0], dose[-1])
    ax.set_xlabel("dose")
    units = curves.uns.get("ate", {}).get("units", "")
    ax.set_ylabel(_effect_label(units))
    ax.set_title(literal(perturbation), pad=12)
    tidy(ax)
    _name_ends(ax, float(dose[-1]), effect[-1, chosen], [str(g) for g in curves.var_names[chosen]])
    finish(ax, save)
    return ax


def _effect_label(units: str) -> str:
    return "\n".join(["effect", *textwrap.wrap(literal(units), _MOST_LETTERS)])


def _name_ends(ax: Axes, x: float, ends: np.ndarray, names: list[str]) -> None:
    """Name curves at their ends, moved apart to avoid overlaps."""
    lay_out(ax)
    low, high = ax.get_ylim()
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    step = _NAME_SPACING * points(TEXT) / height * (high - low)
    order = np.argsort(ends, kind="stable")
    places = ends[order].astype(np.float64)
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + step)
    places -= (places - ends[order]).mean()  # centred on the ends, but within the axes
    places += max(low - places[0], 0) - max(places[-1] - high, 0)
    for place, which in zip(places, order, strict=True):
        ax.annotate(
            literal(names[which]),
            (x, ends[which]),
            xytext=(1.03, place),
            textcoords=ax.get_yaxis_transform(),
            fontsize=TEXT,
            va="center",
            color=_CURVE_COLOURS[which % len(_CURVE_COLOURS)],
            annotation_clip=False,
        )


def ate_scatter(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    label_top: int = 8,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Predicted against observed effect of every gene and perturbation, with the identity line.

    Parameters
    ----------
    predicted, observed
        ATE tables, as for :func:`scvi_sams.evaluation.compare_ate`. Failed predictions are drawn,
        and scored, as no effect, and their number is shown.
    label_top
        Number of entries with the largest absolute observed effect to name; names without free
        space are omitted.
    control, delimiter
        Spelling of labels.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes, both directions in the same units and limits. The annotated Pearson correlation is
    that of the row ``"all"`` of :func:`scvi_sams.evaluation.compare_ate`.

    Raises
    ------
    SAMSError, MissingKeyError
        If the tables cannot be compared.

    Examples
    --------
    >>> observed = scvi_sams.evaluation.observed_ate(adata)
    >>> predicted = model.predict_ate(list(observed.obs_names), n_samples=200)
    >>> ax = scvi_sams.pl.ate_scatter(predicted, observed)
    >>> ax.figure.savefig("ate.png")
    """
    check_integer(at_least=0, label_top=label_top)
    predicted_effects, observed_effects, missing = align_ate(
        predicted, observed, control=control, delimiter=delimiter
    )
    x, y = observed_effects.ravel(), predicted_effects.ravel()
    ax = new_axes(ax, 5.6, 4.8, figsize, save)

    ends = min(x.min(), y.min(), 0), max(x.max(), y.max(), 0)
    margin = 0.08 * (ends[1] - ends[0]) or 1.0
    ends = ends[0] - margin, ends[1] + margin
    _draw_points(ax, x, y, ends)
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle="--", zorder=3)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set(xlabel="observed effect", ylabel="predicted effect")
    ax.set_title(literal(observed.uns["ate"].get("units", "")), fontsize=TEXT)
    lines = [f"Pearson {effect_metrics(y, x)['pearson']:.3f}"]
    lines += [counted(observed.n_obs, "perturbation"), counted(observed.n_vars, "gene")]
    if n_missing := int(missing.sum()):
        lines += [f"{n_missing:,} not predicted (drawn at 0)"]
    summary = ax.text(
        0.03,
        0.97,
        "\n".join(lines),
        transform=ax.transAxes,
        va="top",
        fontsize=TEXT,
    )

    strongest = np.argsort(-np.abs(x), kind="stable")[:label_top]
    names = {place: _entry_name(observed, place) for place in strongest}
    label_points(ax, x, y, names, avoid=[summary])
    finish(ax, save)
    return ax


def _draw_points(ax: Axes, x: np.ndarray, y: np.ndarray, ends: tuple[float, float]) -> None:
    for draw_line in (ax.axhline, ax.axvline):
        draw_line(0, color=GREY, alpha=0.4, linewidth=0.8, zorder=0)
    if len(x) < _MANY:
        ax.scatter(x, y, s=10, alpha=0.5, color="#0072B2", linewidths=0)
        return
    hexagons = ax.hexbin(
        x,
        y,
        gridsize=70,
        extent=(*ends, *ends),
        bins="log",
        mincnt=1,
        cmap="viridis",
        linewidths=0.1,
    )
    ax.figure.colorbar(hexagons, ax=ax, label="gene-perturbation pairs", shrink=0.6)


def _entry_name(observed: ad.AnnData, position: int) -> str:
    row, column = divmod(int(position), observed.n_vars)
    gene = observed.var_names[column]
    return gene if observed.n_obs == 1 else f"{gene} ({observed.obs_names[row]})"
