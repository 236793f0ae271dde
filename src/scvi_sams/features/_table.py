"""Features of perturbations as one value, and conversion of user input to it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import DTypeLike
from scipy import sparse

from scvi_sams._checks import as_names, check_integer
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, UnknownPerturbationError
from scvi_sams.labels._names import listing, texts_of

Values: TypeAlias = np.ndarray | sparse.csr_matrix

_WANTED = (
    "a DataFrame (perturbations x features, names of perturbations as its index), an AnnData, a "
    "FeatureTable, a dict of names to vectors or to sets of terms, or the key of one of them in "
    "adata.uns"
)


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of perturbations, such as memberships in pathways, an embedding or a fingerprint.

    Names are text, parsed as labels of cells are: without surrounding blanks, and ``"1"`` for
    ``1.0``. Values are copied and read-only.

    Parameters
    ----------
    names
        Perturbations, each once.
    columns
        Names of the features.
    values
        Finite numbers, perturbations x features; an array or a sparse matrix. Stored as float64: an
        array, or a ``csr_matrix`` without explicit zeros.
    argument
        Name of the table in error messages.

    Raises
    ------
    InvalidArgumentError
        If a name is missing or occurs twice, there are no rows or no columns, the numbers of names
        and values differ, or a value is not finite.

    Examples
    --------
    >>> table = scvi_sams.features.FeatureTable(("A", "B"), ("x", "y"), np.array([[1, 2], [3, 4]]))
    >>> table.rows(["B", "A"]).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    values: Values
    argument: InitVar[str] = "values"

    def __post_init__(self, argument: str) -> None:
        names = _as_unique_text(self.names, argument)
        columns = tuple(map(str, self.columns))
        values = _as_floats(self.values)
        _check_shape(values, names, columns, argument)
        _check_finite(values, names, columns, argument)
        _make_read_only(values)
        for field, value in (("names", names), ("columns", columns), ("values", values)):
            object.__setattr__(self, field, value)

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        kind = "sparse" if sparse.issparse(self.values) else "dense"
        size = f"{counted(len(self), 'perturbation')} x {counted(self.n_features, 'feature')}"
        return f"FeatureTable({size}, {kind})"

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return len(self.columns)

    @cached_property
    def digest(self) -> str:
        """Hash (sha256) of names, columns and values, in their order.

        Dense and sparse tables of the same values have the same hash.
        """
        content = hashlib.sha256(json.dumps([self.names, self.columns]).encode())
        matrix = sparse.csr_matrix(self.values)
        for part, dtype in ((matrix.indptr, "<i8"), (matrix.indices, "<i8"), (matrix.data, "<f8")):
            content.update(np.ascontiguousarray(part, dtype=dtype).tobytes())
        return content.hexdigest()

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def rows(self, names: Iterable[str]) -> Values:
        """Features of some perturbations, shape ``(len(names), n_features)``, in that order.

        Raises
        ------
        UnknownPerturbationError
            If a perturbation has no features.
        """
        wanted = as_names("names", names)
        missing = self.missing(wanted)
        if missing:
            similar = difflib.get_close_matches(missing[0], self.names, n=3)
            raise UnknownPerturbationError(
                f"No features of {listing(missing)}. There are those of "
                f"{counted(len(self), 'perturbation')}"
                + (
                    f"; did you mean {listing(similar)}?"
                    if similar
                    else f": {listing(self.names)}."
                )
                + " Add rows, or see features.match_genes for names that are spelled differently."
                + self.transposed_hint(wanted)
            )
        return self.values[[self._position[name] for name in wanted]]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Perturbations that have no features, each once, in the given order."""
        return [name for name in dict.fromkeys(as_names("names", names)) if name not in self]

    def shuffled(self, seed: int) -> FeatureTable:
        """Give each perturbation the features of a random one, without replacement.

        This is the negative control for predictions from features: only the assignment of features
        to perturbations changes. Some may keep their own.
        """
        check_integer(at_least=0, seed=seed)
        order = np.random.default_rng(seed).permutation(len(self))
        return FeatureTable(self.names, self.columns, self.values[order])

    def to_frame(self, dtype: DTypeLike = np.float64) -> pd.DataFrame:
        """Return the features as a DataFrame, of sparse columns if the values are sparse."""
        index, columns = pd.Index(self.names), pd.Index(self.columns)
        if sparse.issparse(self.values):
            accessor: Any = pd.DataFrame.sparse
            return accessor.from_spmatrix(self.values.astype(dtype), index, columns)
        return pd.DataFrame(self.values.astype(dtype), index, columns)

    def transposed_hint(self, names_wanted: Iterable[str]) -> str:
        """Hint for the end of a message if perturbations are columns instead of rows.

        Empty if one of the requested names is a row, or none is a column.
        """
        wanted = set(as_names("names_wanted", names_wanted))
        columns = wanted.intersection(self.columns)
        if not columns or not wanted.isdisjoint(self.names):
            return ""
        return (
            f" {len(columns)} of {counted(len(wanted), 'perturbation')} "
            f"{plural(len(columns), 'is a column', 'are columns')} of the features and none is a "
            f"row, such as {min(columns)!r}: transpose the table (table.T)."
        )


def as_feature_table(
    features: Any, *, uns: Mapping[str, Any] | None = None, argument: str = "perturbation_features"
) -> FeatureTable:
    """Convert features of perturbations to a table.

    Parameters
    ----------
    features
        Perturbations x features, as one of:

        - a DataFrame of numbers or booleans with perturbations as its index; sparse columns stay
          sparse;
        - a dict from names to vectors of the same length;
        - a dict from names to sets or lists of terms, such as the pathways of a gene: each term
          becomes a column of 0 and 1, in alphabetical order, of a sparse table;
        - an AnnData: ``X``, named by ``obs_names`` and ``var_names``;
        - a :class:`FeatureTable`, returned unchanged;
        - the key of one of these in ``uns``.
    uns
        Where a key is looked up: ``adata.uns``.
    argument
        Name of ``features`` in error messages.

    Returns
    -------
    A table of its own: later changes of ``features`` do not affect it.

    Raises
    ------
    InvalidArgumentError
        If ``features`` is none of these, names occur twice (as text), there are no columns, a
        column is not numeric, a value is missing or infinite, or vectors differ in length.
    MissingKeyError
        If ``uns`` has no such key.

    Examples
    --------
    >>> from scvi_sams import features
    >>> pathways = {"KLF1": {"erythroid"}, "MAP2K6": {"MAPK", "stress"}}
    >>> features.as_feature_table(pathways).to_frame().sparse.to_dense()
            MAPK  erythroid  stress
    KLF1     0.0        1.0     0.0
    MAP2K6   1.0        0.0     1.0
    """
    if isinstance(features, str):
        features, argument = _looked_up(features, uns, argument)
    if isinstance(features, FeatureTable):
        return features
    if isinstance(features, pd.DataFrame):
        return _of_frame(features, argument)
    if isinstance(features, AnnData):
        return _of_anndata(features, argument)
    if isinstance(features, Mapping):
        return _of_mapping(features, argument)
    how = ""
    if isinstance(features, np.ndarray | list) or sparse.issparse(features):
        how = " Its rows need names: pd.DataFrame(values, index=names)."
    raise InvalidArgumentError(
        f"`{argument}` must be {_WANTED}, not {type(features).__name__}.{how}"
    )


def _looked_up(key: str, uns: Mapping[str, Any] | None, argument: str) -> tuple[Any, str]:
    """Value of a key of ``uns``, and its name in messages."""
    if uns is None or key not in uns:
        there = [] if uns is None else list(map(str, uns))
        similar = difflib.get_close_matches(key, there, n=3) or there
        raise MissingKeyError(
            f"`{argument}` is {key!r}, which is not a key of adata.uns. There are "
            f"{listing(similar) or 'none'}. Store the table there, adata.uns[{key!r}] = table, or "
            "pass the table itself."
        )
    if isinstance(uns[key], str):
        raise InvalidArgumentError(f"adata.uns[{key!r}] must be {_WANTED}, not text.")
    return uns[key], f"adata.uns[{key!r}]"


def _of_frame(frame: pd.DataFrame, argument: str) -> FeatureTable:
    is_number = [
        pd.api.types.is_any_real_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype)
        for dtype in frame.dtypes
    ]
    others = [name for name, right in zip(frame.columns, is_number, strict=True) if not right]
    if others:
        raise InvalidArgumentError(
            f"`{argument}` must be numbers; these columns are not: {listing(others)}. Encode "
            f"categories as 0 and 1 (pd.get_dummies(table, columns={list(map(str, others[:3]))!r}))"
            ", convert numbers stored as text by .astype(float), use names of perturbations as the "
            "index (table.set_index), and drop all other columns."
        )
    is_sparse = [isinstance(dtype, pd.SparseDtype) for dtype in frame.dtypes]
    if is_sparse and all(is_sparse) and not any(dtype.fill_value for dtype in frame.dtypes):
        values = frame.astype(pd.SparseDtype(np.float64, 0)).sparse.to_coo()  # type: ignore[attr-defined]
    else:
        values = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return FeatureTable(tuple(frame.index), tuple(frame.columns), values, argument)


def _of_anndata(adata: AnnData, argument: str) -> FeatureTable:
    if adata.isbacked:
        adata = adata.to_memory()
    if adata.X is None:
        raise InvalidArgumentError(f"`{argument}` has no features: X of the AnnData is empty.")
    return FeatureTable(tuple(adata.obs_names), tuple(adata.var_names), adata.X, argument)


def _of_mapping(features: Mapping[Any, Any], argument: str) -> FeatureTable:
    if not features:
        raise InvalidArgumentError(f"`{argument}` is an empty dict. It must be {_WANTED}.")
    are_terms = {name: _is_terms(value) for name, value in features.items()}
    wrong = [name for name, value in features.items() if not _is_vector_or_terms(value)]
    if wrong:
        value = features[wrong[0]]
        raise InvalidArgumentError(
            f"`{argument}` has {type(value).__name__} for {listing(wrong)}. Each perturbation "
            "needs a vector of numbers, or a set or list of terms; pass one term as a list of one."
        )
    if any(are_terms.values()):
        vectors = [name for name, is_terms in are_terms.items() if not is_terms]
        # An empty set or vector has no terms.
        if any(len(features[name]) for name in vectors):
            terms = [name for name, is_terms in are_terms.items() if is_terms]
            raise InvalidArgumentError(
                f"`{argument}` mixes terms (of {listing(terms, 2)}) and vectors of numbers (of "
                f"{listing(vectors, 2)}). Use the same kind for every perturbation."
            )
        return _of_terms(features, argument)
    return _of_vectors(features, argument)


def _is_vector_or_terms(value: Any) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str | bytes | Mapping)
        and getattr(value, "ndim", 1) == 1
    )


def _is_terms(value: Any) -> bool:
    if isinstance(value, set | frozenset):
        return True
    return _is_vector_or_terms(value) and any(isinstance(one, str) for one in value)


def _of_terms(features: Mapping[Any, Collection[Any]], argument: str) -> FeatureTable:
    without = [name for name, terms in features.items() if any(pd.isna(list(terms)))]
    if without:
        raise InvalidArgumentError(
            f"`{argument}` has missing values among the terms of {listing(without)}: remove them."
        )
    terms_of = [set(map(str, terms)) for terms in features.values()]
    terms = sorted(set().union(*terms_of))
    position = {term: column for column, term in enumerate(terms)}
    rows = np.repeat(np.arange(len(terms_of)), [len(own) for own in terms_of])
    columns = [position[term] for own in terms_of for term in own]
    values = sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(terms_of), len(terms))
    )
    return FeatureTable(tuple(features), tuple(terms), values, argument)


def _of_vectors(features: Mapping[Any, Any], argument: str) -> FeatureTable:
    vectors = list(features.values())
    indices = [vector.index for vector in vectors if isinstance(vector, pd.Series)]
    if any(not index.equals(indices[0]) for index in indices):
        raise InvalidArgumentError(
            f"`{argument}` has Series with different indices. Align them by name: "
            "pd.DataFrame(features).T."
        )
    lengths: dict[int, Any] = {}
    for name, vector in features.items():
        lengths.setdefault(len(vector), name)
    if len(lengths) > 1:
        told = " and ".join(f"{length} ({name!r})" for length, name in list(lengths.items())[:3])
        raise InvalidArgumentError(f"`{argument}` has vectors of different lengths: {told}.")
    try:
        values = np.array(vectors, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 2:
        raise InvalidArgumentError(
            f"`{argument}` must have a vector of numbers for each perturbation; the value for "
            f"{next(iter(features))!r} or another one is not a vector of numbers."
        )
    columns = (
        tuple(indices[0]) if indices else tuple(f"feature_{i}" for i in range(values.shape[1]))
    )
    return FeatureTable(tuple(features), columns, values, argument)


def _as_unique_text(names: Sequence[Any], argument: str) -> tuple[str, ...]:
    text_of_name, texts = texts_of(pd.Series(list(names), dtype=object), InvalidArgumentError)
    if "" in texts:
        row = int(np.flatnonzero(text_of_name == texts.index(""))[0])
        raise InvalidArgumentError(
            f"`{argument}` has no name in row {row}. Name its perturbation, or drop the row."
        )
    if len(texts) < len(text_of_name):
        counts = np.bincount(text_of_name)
        twice = [text for text, count in zip(texts, counts, strict=True) if count > 1]
        raise InvalidArgumentError(
            f"`{argument}` has several rows of {listing(twice)}. Each perturbation needs one: drop "
            "the others, table[~table.index.duplicated()], or average them, "
            "table.groupby(level=0).mean()."
        )
    return tuple(texts)


def _as_floats(values: Any) -> Values:
    """Return a copy."""
    if not sparse.issparse(values):
        return np.array(values, dtype=np.float64)
    matrix = sparse.csr_matrix(values, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _check_shape(
    values: Values, names: Sequence[str], columns: Sequence[str], argument: str
) -> None:
    if not names or not columns:
        what = "columns" if names else "rows"
        raise InvalidArgumentError(
            f"`{argument}` has no {what}. It needs a row per perturbation and a column per feature "
            "(features.svd returns no columns if features do not predict measured effects)."
        )
    if values.shape != (len(names), len(columns)):
        raise InvalidArgumentError(
            f"`{argument}` has values of shape {values.shape} for "
            f"{counted(len(names), 'name')} of perturbations and {len(columns)} of columns."
        )


def _check_finite(
    values: Values, names: Sequence[str], columns: Sequence[str], argument: str
) -> None:
    if isinstance(values, np.ndarray):
        rows, places = np.nonzero(~np.isfinite(values))
    else:
        stored = values.tocoo()
        is_wrong = ~np.isfinite(stored.data)
        rows, places = stored.row[is_wrong], stored.col[is_wrong]
    if len(rows):
        value = values[rows[0], places[0]]
        more = f" (and {len(rows) - 1} more values are not finite)" if len(rows) > 1 else ""
        raise InvalidArgumentError(
            f"`{argument}` is {value} for {names[rows[0]]!r} in column {columns[places[0]]!r}"
            f"{more}. Drop such rows (table.dropna()), which leaves their perturbations without "
            "features, or replace missing values (table.fillna(0)) if their value is known."
        )


def _make_read_only(values: Values) -> None:
    if isinstance(values, np.ndarray):
        values.flags.writeable = False
    else:
        for part in (values.data, values.indices, values.indptr):
            part.flags.writeable = False
