"""The figures of a run, as files and as parts of its summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import within
from scvi_sams._files import write_whole
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._mechanisms import LatentShiftMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.pages._page import SMALL_TEXT, as_svg
from scvi_sams.plotting._contexts import context_effects
from scvi_sams.plotting._diagnostics import training_curves
from scvi_sams.plotting._genes import effect_volcano, program_genes
from scvi_sams.plotting._guides import guide_efficacy
from scvi_sams.plotting._latent import latent
from scvi_sams.plotting._matrices import direct_effects, masks

logger = logging.getLogger("scvi.sams")

_NAMES = (
    "volcanoes", "masks", "programs", "direct_effects", "guides", "contexts", "latent", "training",
)  # fmt: skip
_MOST_CELLS = 5000
"""Largest number of cells in a UMAP: more take minutes and look the same."""
_MOST_PANELS = 6
_MOST_COLOURS = 8
_SEED = 0

Tables = Mapping[str, pd.DataFrame]


class RunFigure(NamedTuple):
    """A figure and its description."""

    name: str
    caption: str
    svg: dict[str, str]


def draw_figures(
    model: PerturbationModel, tables: Tables, fdr: float, folder: Path
) -> list[RunFigure]:
    """Draw the figures that apply to a model and its tables, write them, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:  # remove those of an earlier run
        (folder / f"{name}.png").unlink(missing_ok=True)
    drawn = []
    for name, caption, draw in _drawings(model, tables, fdr):
        try:
            with mpl.rc_context(SMALL_TEXT):
                figure = draw()
        except SAMSError as error:  # nothing to draw, such as no guides or contexts
            logger.info(f"There is no figure {name!r}: {error}")
            continue
        settings: dict[str, Any] = {"dpi": 150, "bbox_inches": "tight"}
        write_whole(folder / f"{name}.png", partial(figure.savefig, **settings))
        drawn.append(RunFigure(name, caption, as_svg(figure, caption)))
        plt.close(figure)
    return drawn


def _drawings(
    model: PerturbationModel, tables: Tables, fdr: float
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Names of figures, their descriptions, and functions that draw them."""
    names = tables["hits"].index
    yield (
        "volcanoes",
        "Effects on genes, for the perturbations with the largest effects. Coloured genes have an "
        "effect of more than two posterior standard deviations.",
        lambda: _volcanoes(model.adata, names),
    )
    if "masks" in tables:
        called = called_entries(tables, fdr)
        yield (
            "masks",
            "Effects on latent dimensions: entries called by the masks and by a test on the cells.",
            lambda: _masks(called, tables["effects_mean"]),
        )
    if "programs" in tables:
        yield (
            "programs",
            "Genes that change most along the latent dimensions with the largest effects.",
            lambda: _programs(tables, fdr),
        )
    if "direct_effects" in tables:
        yield (
            "direct_effects",
            "Direct effects on single genes, besides the latent shift. Dots: the sign is certain.",
            lambda: _figure(direct_effects(model.get_direct_effects(key_added=None))),
        )
    if "guides" in tables:
        yield (
            "guides",
            "Effect of each guide relative to the effect of its perturbation, with intervals.",
            lambda: _figure(guide_efficacy(tables["guides"])),
        )
    if "contexts" in tables:
        yield (
            "contexts",
            "Effect sizes by context. Dots: the effect differs from the one that contexts share.",
            lambda: _figure(context_effects(tables["contexts"])),
        )
    yield (
        "latent",
        "UMAP of the cells: basal states, and states including the effects of perturbations.",
        lambda: _latent(model, names),
    )
    yield (
        "training",
        "Terms of the objective by epoch.",
        lambda: _figure(training_curves(model.history)[0]),
    )


def called_entries(tables: Tables, fdr: float) -> pd.DataFrame:
    """Mask entries called by masks and test, as in ``tl.called_masks``."""
    q_values, probability = tables["mask_q_values"], tables["masks"].to_numpy()
    called = within(q_values.to_numpy(), fdr)
    table = pd.DataFrame(called, index=q_values.index, columns=q_values.columns)
    table.attrs["expected_false"] = float(1 - probability[called].mean()) if called.any() else 0.0
    return table


def strongest_latents(tables: Tables, fdr: float) -> list[str]:
    """Latent dimensions that change genes, in the order of their called effects.

    If a model has no masks, all effects count.
    """
    effects = tables["effects_mean"].abs()
    size = (effects.where(called_entries(tables, fdr), 0) if "masks" in tables else effects).sum()
    is_used = (size > 0) & (tables["programs"].abs().sum() > 0)
    return [str(name) for name in size[is_used].sort_values(ascending=False).index]


def _figure(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def _panels(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    n_columns = min(n, 3)
    n_rows = -(-n // n_columns)
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    panels = list(np.ravel(figure.subplots(n_rows, n_columns, squeeze=False)))
    for unused in panels[n:]:
        figure.delaxes(unused)
    return figure, panels[:n]


def _volcanoes(adata: AnnData, names: pd.Index) -> Figure:
    chosen = names[:_MOST_PANELS]
    figure, panels = _panels(len(chosen), 3.6, 3.4)
    for ax, name in zip(panels, chosen, strict=True):
        effect_volcano(adata, name, label_top=8, ax=ax)
    return figure


def _masks(called: pd.DataFrame, effects: pd.DataFrame) -> Figure:
    """Called entries of the latent dimensions that have some; of all if none has."""
    used = called.columns[called.any()] if called.to_numpy().any() else called.columns
    return _figure(masks(called[used], effects=effects[used]))


def _programs(tables: Tables, fdr: float) -> Figure:
    chosen = strongest_latents(tables, fdr)[:_MOST_PANELS]
    if not chosen:
        raise SAMSError("Perturbations shift no latent dimension that changes a gene.")
    figure, panels = _panels(len(chosen), 3.0, 3.4)
    for ax, name in zip(panels, chosen, strict=True):
        program_genes(tables["programs"], name, n_genes=15, ax=ax)
    return figure


def _latent(model: PerturbationModel, names: pd.Index) -> Figure:
    adata = model.adata
    basis = [RESULT_KEYS.LATENT]
    if isinstance(model, LatentShiftMixin):
        basis.append(RESULT_KEYS.LATENT_PERTURBED)
    labels = registered_labels(model.adata_manager)
    n_shown = min(_MOST_CELLS, adata.n_obs)
    cells = np.random.default_rng(_SEED).choice(adata.n_obs, n_shown, replace=False)
    shown = AnnData(
        obs=pd.DataFrame({"perturbation": labels.canonical[cells]}, index=cells.astype(str)),
        obsm={key: adata.obsm[key][cells] for key in basis},
    )
    carried = set(shown.obs["perturbation"])
    strongest = [name for name in names if name in carried][:_MOST_COLOURS]
    highlight = [labels.control] * (labels.control in carried) + strongest
    return _figure(latent(shown, basis=basis, highlight=highlight or None)[0])
