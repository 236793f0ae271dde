"""Checks of batches, covariates and genes before registration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._constants import LARGEST_INPUT
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidCovariateError,
    MissingKeyError,
    RegistrationError,
)
from scvi_sams.labels._names import check_has, factorize, listing, numbers_in, shown


def check_keys_exist(adata: AnnData, **keys_of_slot: Iterable[str | None]) -> None:
    """Raise if a slot of the AnnData lacks one of its keys; ``None`` is ignored."""
    for slot, keys in keys_of_slot.items():
        wanted = [key for key in keys if key is not None]
        check_has(f"adata.{slot} has no", wanted, getattr(adata, slot).keys())


def only_column(adata: AnnData, key: str) -> pd.Series:
    """Return a column of obs; an error if the name is not unique."""
    column = adata.obs[key]
    if isinstance(column, pd.DataFrame):
        raise RegistrationError(
            f"adata.obs has more than one column {key!r}. Rename or drop one of them."
        )
    return column


def validate_table(adata: AnnData, keys: Iterable[str | None]) -> None:
    """Raise without cells or genes, or if names of genes or columns are not unique.

    ``keys`` are the columns of obs to check; ``None`` is ignored.
    """
    if 0 in adata.shape:
        raise RegistrationError(
            f"There are {counted(adata.n_obs, 'cell')} and {counted(adata.n_vars, 'gene')} to "
            "learn from. Check what was filtered out of `adata`."
        )
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()].unique()
        raise RegistrationError(
            f"{counted(len(twice), 'gene name occurs', 'gene names occur')} more than once, such "
            f"as {listing(twice)}; genes are found and reported by name. Make them unique: "
            "adata.var_names_make_unique()."
        )
    columns = adata.obs.columns
    twice = [key for key in keys if key is not None and (columns == key).sum() > 1]
    if twice:
        raise RegistrationError(
            f"adata.obs has more than one column {listing(twice)}. Rename or drop one of them."
        )


_SELECT_GENES = " Select and order them: adata[:, model.adata.var_names].copy()."


def check_genes(
    adata: AnnData, expected: Sequence[str] | np.ndarray, advice: str = _SELECT_GENES
) -> None:
    """Raise if the genes are not those of the training data, in the same order."""
    genes = pd.Index(np.asarray(expected, dtype=object))
    found = pd.Index(np.asarray(adata.var_names, dtype=object))
    if genes.equals(found):
        return
    missing, others = genes.difference(found), found.difference(genes)
    if len(missing):
        difference = f"{len(missing)} are missing, such as {list(missing[:3])}"
    elif len(others):
        difference = f"{len(others)} are new, such as {list(others[:3])}"
    else:
        difference = "their order differs"
    raise MissingKeyError(
        f"The genes differ from those of the training data: {difference}.{advice}"
    )


def validate_categories(
    column: pd.Series, known: Iterable[object] | None, training_key: str
) -> None:
    """Raise if a category is missing, or is not one of the known ones.

    ``known`` are the categories of the training data (``None``: not checked), and ``training_key``
    is the argument of ``setup_anndata`` that named the column.
    """
    missing = column.isna().to_numpy()
    if missing.any():
        raise InvalidCovariateError(
            f"{missing.sum()} of {counted(len(column), 'cell')} "
            f"{plural(missing.sum(), 'has', 'have')} no value in the column {column.name!r} "
            f"(`{training_key}`), for example {listing(column.index[missing])}. Fill it, or remove "
            "these cells."
        )
    _, categories = factorize(column, InvalidCovariateError)
    if known is None:
        try:
            sorted(categories)
        except TypeError:
            raise InvalidCovariateError(
                f"The column {column.name!r} mixes text and numbers. Make it one of them, for "
                f"example adata.obs[{column.name!r}].astype(str)."
            ) from None
        return
    known = list(known)
    unseen = [category for category in categories if category not in known]
    if unseen:
        raise InvalidCovariateError(
            f"The column {column.name!r} (`{training_key}`) has {listing(unseen)}, which are not "
            f"in the training data: these have {listing(known, limit=10)}. Remove these cells, or "
            "train a model with them."
        )


def numbers_of(column: pd.Series) -> np.ndarray:
    """Return a column as numbers, NaN where missing; an error for anything else."""
    numbers, is_other = numbers_in(column)
    if is_other.any():
        raise InvalidCovariateError(
            f"The column {column.name!r} contains {shown(column[is_other].iloc[0])} in cell "
            f"{column.index[is_other][0]!r}, which is not a number "
            f"({counted(is_other.sum(), 'such cell')}). "
            "Convert the column, or register another one."
        )
    return numbers


def validate_covariate(column: pd.Series) -> None:
    """Raise if a continuous covariate is text, missing, infinite or huge."""
    numbers = numbers_of(column)
    _check_not_huge(column, np.abs(numbers))
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise InvalidCovariateError(
            f"{bad.sum()} of {counted(len(column), 'cell')} {plural(bad.sum(), 'has', 'have')} no "
            f"finite value in the column {column.name!r} (`continuous_covariate_keys`), for "
            f"example {listing(column.index[bad])}. Fill it, or remove these cells."
        )


def validate_size_factor(column: pd.Series) -> None:
    """Raise if a size factor is text, missing, infinite, zero, negative or extreme."""
    sizes = numbers_of(column)
    _check_not_huge(column, sizes)
    _check_not_huge(column, 1 / np.where(sizes > 0, sizes, np.nan))
    bad = ~((sizes > 0) & np.isfinite(sizes))
    if bad.any():
        raise InvalidCountsError(
            f"{counted(bad.sum(), 'cell has', 'cells have')} a size factor in the column "
            f"{column.name!r} that is zero, negative, infinite or NaN, for example "
            f"{listing(column.index[bad])}. Remove them, or register another column."
        )


def _check_not_huge(column: pd.Series, sizes: np.ndarray) -> None:
    huge = np.isfinite(sizes) & (sizes > LARGEST_INPUT)
    if huge.any():
        raise InvalidCovariateError(
            f"The column {column.name!r} contains {column[huge].iloc[0]} in cell "
            f"{column.index[huge][0]!r}, which differs from one by a factor of more than "
            f"{LARGEST_INPUT:g} ({counted(huge.sum(), 'such cell')}). Use other units, of order "
            "one."
        )
