"""``fit``: from a file with counts to all results of a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import scvi
from anndata import AnnData
from rich.console import Console

from scvi_sams._files import UNREADABLE, write_h5ad, write_whole
from scvi_sams.cli._figures import draw_figures
from scvi_sams.cli._page import write_summary
from scvi_sams.exceptions import InvalidArgumentError, SavingError, UnreadableDataError
from scvi_sams.features._embedding import from_embedding
from scvi_sams.features._gmt import from_gmt
from scvi_sams.interpretation._export import check_formats, write_tables
from scvi_sams.interpretation._tables import Sampling, result_tables
from scvi_sams.model._comparators import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._mechanisms import LatentShiftMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._sams_vae import SAMSVAE

_MODELS: dict[str, type[PerturbationModel]] = {
    one.__name__: one for one in (SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE)
}
_STEPS = (
    "Reading the screen", "Training", "Writing tables", "Drawing figures",
    "Writing the annotated screen",
)  # fmt: skip


def fit(
    options: argparse.Namespace, command: str, warnings: Sequence[str], console: Console
) -> Path:
    """Train a model on a screen and write its results.

    Parameters
    ----------
    options
        Options of the command line.
    command
        The command as typed, for the record.
    warnings
        Warnings of the run so far; the summary contains those collected at the end.
    console
        Where to show progress.

    Returns
    -------
    Path of the summary.
    """
    formats = check_formats(options.format)
    features = _features(options)
    _check_folder(options.out, overwrite=options.overwrite)

    def begin(number: int) -> None:
        if not options.quiet:
            console.print(f"[{number + 1}/{len(_STEPS)}] {_STEPS[number]}", style="bold")

    begin(0)
    adata = read_screen(options.screen)
    scvi.settings.seed = options.seed
    model = _registered(adata, options, features)
    begin(1)
    with redirect_stdout(sys.stderr):  # like all other messages
        has_bar = console.is_terminal and not options.quiet
        model.train(max_epochs=options.max_epochs, enable_progress_bar=has_bar)
    options.out.mkdir(parents=True, exist_ok=True)
    # Before training, so that no later error costs the training.
    model.save(options.out / "model", overwrite=options.overwrite)
    begin(2)
    tables = result_tables(model, Sampling(fdr=options.fdr), keep=True)
    paths = write_tables(tables, options.out / "tables", formats)
    begin(3)
    _add_states(model)
    figures = draw_figures(model, tables, options.fdr, options.out / "figures")
    begin(4)
    target = options.out / "results.h5ad"
    write_whole(target, lambda partial: write_h5ad(adata, partial))
    page = options.out / "summary.html"
    write_summary(
        page,
        model,
        screen=str(options.screen),
        command=command,
        fdr=options.fdr,
        tables=tables,
        figures=figures,
        warnings=warnings,
        files=sorted(str(path.relative_to(options.out)) for path in paths.values()),
    )
    return page


def read_screen(path: Path) -> AnnData:
    """Read an h5ad file or a zarr folder into memory."""
    if not path.exists():
        raise UnreadableDataError(f"There is no file {str(path)!r}.")
    try:
        return ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    except UNREADABLE as error:
        raise UnreadableDataError(
            f"{str(path)!r} cannot be read as an h5ad file or a zarr folder: {error}. It is "
            "neither, or it is damaged or incomplete."
        ) from error


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise SavingError(f"{str(folder)!r} is a file. Name a folder with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SavingError(
            f"{str(folder)!r} is not empty. Name another folder with --out, or pass --overwrite."
        )


def _features(options: argparse.Namespace) -> pd.DataFrame | None:
    """Read features of perturbations, gene sets or vectors by the ending of the file."""
    if options.features is None:
        return None
    if options.model != "SAMSVAE":
        raise InvalidArgumentError(
            f"--features are for SAMSVAE; {options.model} learns about perturbations only from "
            "their cells."
        )
    is_gmt = ".gmt" in options.features.suffixes
    return from_gmt(options.features) if is_gmt else from_embedding(options.features)


def _registered(
    adata: AnnData, options: argparse.Namespace, features: pd.DataFrame | None
) -> PerturbationModel:
    """Register the screen and create a model."""
    model_class = _MODELS[options.model]
    control = options.control
    given = {
        "perturbation_key": options.perturbation,
        "control": control[0] if control and len(control) == 1 else control,
        "layer": options.layer,
        "batch_key": options.batch,
        "categorical_covariate_keys": options.covariate,
        "guide_key": options.guide,
        "context_key": options.context,
        "size_factor_key": options.size_factor,
        "preset": options.preset,
    }
    setup: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.delimiter is not None:
        setup["delimiter"] = options.delimiter or None
    model_class.setup_anndata(adata, **setup)
    settings: dict[str, Any] = {}
    if options.n_latent is not None:
        settings["n_latent"] = options.n_latent
    if features is not None:
        settings["perturbation_features"] = features
    return model_class(adata, **settings)


def _add_states(model: PerturbationModel) -> None:
    """Write latent states and effects on all genes into the screen."""
    model.get_latent_representation()
    if isinstance(model, LatentShiftMixin):
        model.get_latent_representation(representation="perturbed")
    is_count = model.module.likelihood.is_count_likelihood
    model.predict_ate(method="lograte" if is_count else "mean")
