"""Export results as files for spreadsheets and other languages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from scvi_sams._checks import (
    as_names,
    as_path,
    check_bool,
    check_choice,
    check_integer,
    check_number,
)
from scvi_sams._files import cannot_write, write_whole
from scvi_sams.exceptions import InvalidArgumentError, MissingPackageError, SavingError
from scvi_sams.interpretation._tables import MEANINGS, Sampling, result_tables

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

FORMATS = ("csv", "xlsx")
WORKBOOK = "results"
"""Name of the Excel file, without its extension."""
_MOST_ROWS = 1_048_575
"""Largest number of rows of a sheet, in addition to the header."""
_MOST_COLUMNS = 16_384


def export(
    model: PerturbationModel,
    folder: str | os.PathLike[str],
    *,
    formats: Literal["csv", "xlsx"] | Sequence[Literal["csv", "xlsx"]] = "csv",
    fdr: float = 0.05,
    n_genes: int = 50,
    n_samples: int = 5000,
    n_posterior_samples: int = 500,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write the results of a model as csv files, an Excel workbook, or both.

    Parameters
    ----------
    model
        Trained model with its data.
    folder
        Folder for the files; it is created if necessary.
    formats
        ``"csv"``: a file for each table. ``"xlsx"``: ``results.xlsx`` with a sheet for each table,
        which requires openpyxl (``pip install "scvi-sams[excel]"``). Gene names such as SEPT2 stay
        text in a workbook; Excel converts them to dates when it opens a csv file.
    fdr
        False discovery rate at which perturbations, mask entries and genes are called.
    n_genes
        Maximum number of differential genes per perturbation.
    n_samples, n_posterior_samples
        As in :func:`perturbation_hits`, :func:`target_knockdown`, :func:`guide_efficacy` and
        ``differential_expression``.
    overwrite
        Whether to replace the tables of an earlier export; those that this model does not have
        are then removed. Other files in the folder are kept.

    Returns
    -------
    Paths by the names of tables, and that of the workbook as ``"results"``. Tables that do not
    apply are omitted: a CPAVAE has no masks, a screen of drugs no knock-downs.

    - ``hits``: :func:`perturbation_hits`
    - ``differential_genes``: called genes of ``differential_expression``, most certain first
    - ``masks``, ``mask_q_values`` (:func:`entry_q_values`), ``effects_mean``, ``effects_sd``:
      perturbations x latent dimensions
    - ``programs``: genes x latent dimensions
    - ``direct_effects``: one row per effect with a local false sign rate below 0.05
    - ``knockdown``: :func:`target_knockdown`; ``guides``: :func:`guide_efficacy`; ``contexts``:
      :func:`context_effects`
    - ``cells``: :func:`cell_counts`
    - ``settings``: ``model.provenance``, one row per setting

    Raises
    ------
    MissingPackageError
        If a workbook is requested and openpyxl is not installed.
    SavingError
        If there are tables already, or nothing can be written.
    InvalidArgumentError
        If there is no such format, ``folder`` is the name of a csv or xlsx file, a number is out of
        range, or a table is too large for a sheet.

    Examples
    --------
    >>> paths = scvi_sams.tl.export(model, "tables", n_samples=200, n_posterior_samples=20)
    >>> paths["masks"].name
    'masks.csv'
    >>> pd.read_csv(paths["masks"], index_col="perturbation").shape
    (8, 6)
    """
    chosen = check_formats(formats)
    check_number(fdr=fdr, above=0, below=1)
    check_integer(n_genes=n_genes, n_samples=n_samples, n_posterior_samples=n_posterior_samples)
    check_bool(overwrite=overwrite)
    folder = as_path("folder", folder)
    if folder.exists() and not folder.is_dir():
        raise SavingError(f"{str(folder)!r} is a file. Name a folder.")
    suffix = folder.suffix[1:]
    if suffix in FORMATS:
        raise InvalidArgumentError(
            f"`folder` is {str(folder)!r}, the name of a file, but tables are written into a "
            f"folder: export(model, {str(folder.with_suffix(''))!r}, formats={suffix!r})."
        )
    earlier = _earlier(folder)
    if earlier and not overwrite:
        raise SavingError(
            f"{str(folder)!r} already has {earlier[0].name!r}. Export elsewhere, or pass "
            "overwrite=True."
        )
    tables = result_tables(model, Sampling(fdr, n_genes, n_samples, n_posterior_samples))
    return write_tables(tables, folder, chosen)


def check_formats(formats: str | Sequence[str]) -> list[str]:
    """Return formats as a list; an error if one is unknown or cannot be written."""
    chosen = as_names("formats", formats)
    if not chosen:
        raise InvalidArgumentError(f"`formats` is empty: name some of {list(FORMATS)}.")
    for one in chosen:
        check_choice("formats", one, FORMATS)
    if "xlsx" in chosen and importlib.util.find_spec("openpyxl") is None:
        raise MissingPackageError(
            "Excel workbooks require openpyxl, which is not installed: pip install "
            '"scvi-sams[excel]" (or pip install openpyxl). formats="csv" requires nothing.'
        )
    return chosen


def write_tables(
    tables: Mapping[str, pd.DataFrame], folder: Path, formats: Sequence[str]
) -> dict[str, Path]:
    """Write tables into a folder, replacing those of an earlier export."""
    if "xlsx" in formats:
        _check_sizes(tables)
    earlier = _earlier(folder)
    paths: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "csv" in formats:
            for name, table in tables.items():
                paths[name] = folder / f"{name}.csv"
                _write_csv(table, paths[name])
        if "xlsx" in formats:
            paths[WORKBOOK] = folder / f"{WORKBOOK}.xlsx"
            _write_workbook(tables, paths[WORKBOOK])
        for stale in set(earlier) - set(paths.values()):
            stale.unlink()
    except OSError as error:
        raise error if isinstance(error, SavingError) else cannot_write(folder, error) from error
    return paths


def _earlier(folder: Path) -> list[Path]:
    """Files of an earlier export."""
    names = [*(f"{name}.csv" for name in MEANINGS), f"{WORKBOOK}.xlsx"]
    return [folder / name for name in names if (folder / name).exists()]


def _has_names(table: pd.DataFrame) -> bool:
    """Whether the rows of a table have names rather than numbers."""
    return not isinstance(table.index, pd.RangeIndex)


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    label = str(table.index.name or "gene")
    has_names = _has_names(table)
    write_whole(path, lambda part: table.to_csv(part, index=has_names, index_label=label))


def _write_workbook(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    def write(part: Path) -> None:
        with pd.ExcelWriter(part, engine="openpyxl") as book:
            for name, table in tables.items():
                label = str(table.index.name or "gene")
                has_names = _has_names(table)
                table.to_excel(
                    book, sheet_name=name, index=has_names, index_label=label, freeze_panes=(1, 1)
                )

    write_whole(path, write)


def _check_sizes(tables: Mapping[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        n_rows, n_columns = table.shape
        if n_rows > _MOST_ROWS or n_columns >= _MOST_COLUMNS:
            raise InvalidArgumentError(
                f"The table {name!r} has {n_rows:,} rows and {n_columns:,} columns, more than an "
                'Excel sheet can store. Use formats="csv", or lower `n_genes`.'
            )
