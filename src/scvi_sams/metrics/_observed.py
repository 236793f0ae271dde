"""Average treatment effects (ATE) observed in cells, without any model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._checks import (
    as_names,
    as_positions,
    check_anndata,
    check_choice,
    check_key,
    check_number,
)
from scvi_sams._constants import REGISTERED_DOSES, REGISTERED_LEVELS
from scvi_sams._plurals import counted, plural
from scvi_sams._scale import levels_record, size_factor_record
from scvi_sams.counts._block_reader import BlockReader, is_on_disk
from scvi_sams.counts._validation import check_counts
from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidCovariateError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.labels._control import named_control
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import numbers_in
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels
from scvi_sams.labels._rows import groups_of_cells, label_rows
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.metrics._weights import (
    Weights,
    effective_cells,
    weights_of_cells,
    weights_record,
)

Average = Literal["lognorm", "mean"]
"""Quantities that :func:`observed_ate` averages over cells."""

_CELLS_AT_ONCE = 16_384
_ROUNDING = 1e-9
"""Relative tolerance for effective numbers of cells."""


def observed_ate(
    adata: ad.AnnData,
    *,
    perturbation_key: str = "perturbation",
    control: Control = "control",
    dosage_key: str | None = None,
    perturbations: Sequence[str] | None = None,
    method: Average = "lognorm",
    layer: str | None = None,
    size_factor_key: str | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    target_sum: float = 1e4,
    delimiter: str | None = "+",
    weights: Weights | None = None,
) -> ad.AnnData:
    """Observed average treatment effects: mean over perturbed cells minus mean over controls.

    The mean is of ``f(x)``, where ``x`` is a count of a cell and ``size`` is the cell's size:

    - ``"lognorm"``: ``f(x) = log2(1 + target_sum * x / size)``, the effect that the paper reports.
    - ``"mean"``: ``f(x) = target_sum * x / size``, expected counts of a cell of size
      ``target_sum``. The paper's ``f(x) = x`` compares raw counts, which confounds the effect with
      sequencing depth; here cells of different depth are comparable.

    Parameters
    ----------
    adata
        Counts, cells x genes, dense or sparse. Not changed. Counts on disk (from
        :func:`scvi_sams.data.open_screen`) are read in blocks.
    perturbation_key
        Column of ``adata.obs`` with the label of each cell.
    control
        Label or labels of the control cells, a pattern (``"NT*"``), a boolean per cell, or the name
        of a boolean column of ``adata.obs``.
    dosage_key
        Column of ``adata.obs`` with doses, as in ``setup_anndata``: cells whose doses are all 0 are
        control cells, and cells of a label are averaged for each dose. ``None``: the doses with
        which ``adata`` was registered (also those of a dosage matrix); without any, all are 1.
    perturbations
        Labels to report, in any spelling. ``None``: every label of the cells used, except
        controls, sorted.
    method
        Which ``f`` is averaged.
    layer
        Layer of ``adata`` with the counts; ``None`` for ``adata.X``.
    size_factor_key
        Column of ``adata.obs`` with the size of each cell; ``None``: the sum of its counts over
        the genes of ``adata``.
    indices
        Positions (or a boolean mask) of the cells to use, for example held-out cells; ``None``
        uses all. It must include control cells.
    target_sum
        Size to which cells are scaled.
    delimiter
        Separator between the perturbations of a combination; ``None`` if labels are never split.
    weights
        Weight of each cell of ``adata`` in the means, or the name of a column of ``adata.obs`` with
        weights: ``"sams_response"`` (see :meth:`~scvi_sams.SAMSVAE.get_response_probability`)
        gives effects on the cells that responded. NaN counts as 1: control cells, and cells whose
        response is unknown, have full weight. ``None``: 1 for all.

    Returns
    -------
    An ATE table, perturbations x genes: ``X`` is the effect in the units of ``uns["ate"]``,
    ``layers["standard_error"]`` its standard error for unequal variances (Welch),
    ``sqrt(var_t / n_t + var_c / n_c)``, NaN where either side has a single cell. ``obs`` contains
    the canonical label ``"perturbation"``, ``"dosage"``, and ``"n_cells"``, the number of cells
    averaged. Row names are labels, or ``"A@0.5"`` where a label has several doses. ``uns["ate"]``
    contains ``method``, ``target_sum``, ``size_factor_key`` (``"none"``: sum of the counts) and
    ``units``.

    With ``weights``, n is the effective number of cells ``sum(w)^2 / sum(w^2)`` (Kish), stored in
    ``obs["n_effective"]``, and ``uns["ate"]["weights"]`` is the name of the column, or ``"given"``.

    Raises
    ------
    MissingKeyError
        If a column or layer is not in ``adata``.
    MissingControlError
        If none of the cells used is a control cell.
    UnknownPerturbationError
        If none of the cells used has a label of ``perturbations``.
    SAMSError
        If ``perturbations`` names a label twice, or ``method`` is unknown.
    InvalidCountsError
        If counts are negative, fractional (already normalised) or not finite, or the size of a
        cell is not positive.
    InvalidCovariateError
        If sizes of cells are not numbers.
    InvalidDosageError
        If doses are missing or malformed.
    InvalidArgumentError
        If weights are not numbers or one is negative or infinite, there is not one for each cell,
        or all weights of a label (or of the controls) are 0.

    Notes
    -----
    Section 4 of Bereket & Karaletsos, NeurIPS 2023.

    Examples
    --------
    >>> observed = scvi_sams.evaluation.observed_ate(adata, perturbations=["P001", "P007+P001"])
    >>> observed.obs["n_cells"].tolist()
    [60, 30]
    >>> observed.uns["ate"]["method"]
    'lognorm'
    """
    check_number(target_sum=target_sum, above=0)
    spelling = spelling_of(adata, perturbation_key, control, delimiter)
    cells, labels = labelled_cells(adata, indices, perturbation_key, spelling, dosage_key)
    rows, group_of_cell = _groups(labels, perturbations)
    n_groups = 1 + len(rows)
    n_cells = np.bincount(group_of_cell + 1, minlength=n_groups + 1)[1:]
    column = obs_column(adata, weights) if isinstance(weights, str) else None
    weight_of_cell = weights_of_cells(weights, column, adata.obs_names)
    if indices is not None:
        weight_of_cell = weight_of_cell[as_positions("indices", indices, adata.n_obs)]
    total, n_effective = effective_cells(weight_of_cell, group_of_cell, list(rows.index))
    sums, sums_of_squares = np.zeros((2, n_groups, adata.n_vars))
    for start in range(0, cells.n_obs, _CELLS_AT_ONCE):
        block = slice(start, start + _CELLS_AT_ONCE)
        values = normalised_expression(cells[block], method, layer, size_factor_key, target_sum)
        # Values stay sparse: sums over cells are products with a groups x cells indicator matrix.
        group = group_of_cell[block]
        used = np.flatnonzero(group >= 0)
        indicator = sparse.csr_array(
            (weight_of_cell[block][used], (group[used], used)), shape=(n_groups, len(group))
        )
        sums += (indicator @ values).toarray()
        sums_of_squares += (indicator @ values.power(2)).toarray()
    mean = sums / total[:, None]
    # Rounding can make the difference of nearly equal numbers negative.
    biased = np.maximum(sums_of_squares / total[:, None] - mean**2, 0)
    has_several = n_effective > 1 + _ROUNDING
    squared_error = biased / np.where(has_several, n_effective - 1, np.nan)[:, None]
    weighted = {} if weights is None else {"n_effective": n_effective[1:]}
    size = "total counts" if size_factor_key is None else size_factor_key
    normalised = f"{target_sum:g} * counts / {size}"
    averaged = f"log2(1 + {normalised})" if method == "lognorm" else normalised
    return ate_table(
        mean[1:] - mean[0],
        rows.assign(n_cells=n_cells[1:], **weighted),
        adata.var_names,
        description={
            "method": method,
            "target_sum": float(target_sum),
            **size_factor_record(size_factor_key),
            **registered_levels(cells, labels),
            "units": f"difference of mean {averaged}",
            **weights_record(weights),
        },
        layers={"standard_error": np.sqrt(squared_error[1:] + squared_error[0])},
    )


def spelling_of(
    adata: ad.AnnData, perturbation_key: str, control: Control, delimiter: str | None
) -> Spelling:
    """Spelling of labels from the arguments of a public function."""
    check_anndata(adata=adata)
    if (adata.obs.columns == perturbation_key).sum() == 1:
        control = named_control(control, adata.obs[perturbation_key], adata.obs)
    return Spelling.of(control, delimiter)


def labels_of(
    adata: ad.AnnData, perturbation_key: str, control: Control, delimiter: str | None
) -> Labels:
    """Parse a column of labels, without doses, from the arguments of a public function."""
    spelling = spelling_of(adata, perturbation_key, control, delimiter)
    return encode_labels(obs_column(adata, perturbation_key), spelling=spelling)


def registered_levels(cells: ad.AnnData, labels: Labels) -> dict[str, np.ndarray]:
    """Batches and covariates of control cells, as stored in a table."""
    keys = [str(key) for key in cells.uns.get(REGISTERED_LEVELS, [])]
    return levels_record(cells.obs[labels.is_control], keys)


def labelled_cells(
    adata: ad.AnnData,
    indices: Sequence[int] | np.ndarray | None,
    perturbation_key: str,
    spelling: Spelling,
    dosage_key: str | None = None,
) -> tuple[ad.AnnData, Labels]:
    """Return the cells to use and their labels; an error if none is a control cell.

    Doses come from a column, or from the registration of the cells.
    """
    check_anndata(adata=adata)
    if indices is not None:
        adata = adata[as_positions("indices", indices, adata.n_obs)]
    cells = adata.to_memory() if adata.isbacked else adata
    labels = read_cells(cells, perturbation_key, spelling, dosage_key)
    if not labels.is_control.any():
        raise MissingControlError(
            f"No cell used is labelled {' or '.join(map(repr, spelling.control))}. Pass the label "
            "of the control cells as `control`, or `indices` that include control cells."
        )
    return cells, labels


def read_cells(
    cells: ad.AnnData,
    perturbation_key: str,
    spelling: Spelling,
    dosage_key: str | None = None,
    of: str = "",
) -> Labels:
    """Parse labels and doses; ``of`` names the data in messages."""
    check_key(dosage_key=dosage_key)
    registered = cells.uns.get(REGISTERED_DOSES, {})
    if dosage_key is None and registered.get("dosage_obsm_key") in cells.obsm:
        matrix = cells.obsm[registered["dosage_obsm_key"]]
        return encode_dosage_matrix(matrix, list(registered["names"]), spelling=spelling)
    written = obs_column(cells, perturbation_key, of)
    if dosage_key is None and registered.get("perturbation_key") == perturbation_key:
        dosage_key = registered["dosage_key"]
    dosages = None if dosage_key is None else obs_column(cells, dosage_key, of)
    return encode_labels(written, dosages, spelling=spelling)


def normalised_expression(
    cells: ad.AnnData,
    method: Average,
    layer: str | None,
    size_factor_key: str | None,
    target_sum: float,
) -> sparse.csr_array:
    """Return f(x) of every cell; see :func:`observed_ate`."""
    check_choice("method", method, get_args(Average))
    values = sparse.csr_array(matrix_of_counts(cells, layer), dtype=np.float64)
    location = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if not np.isfinite(values.data).all() or (values.data < 0).any():
        raise InvalidCountsError(
            "The counts contain negative or non-finite values (smallest: "
            f"{values.data.min():g}). Pass the layer that holds the raw counts as `layer`."
        )
    check_counts(values.data, location, normalised="; effects are normalised here")
    if size_factor_key is None:
        size = values.sum(axis=1)
        advice = "Remove cells without counts (scanpy.pp.filter_cells)."
    else:
        column = obs_column(cells, size_factor_key)
        size, is_text = numbers_in(column)
        if is_text.any():
            raise InvalidCovariateError(
                f"obs[{size_factor_key!r}] contains {column[is_text].iloc[0]!r}, which is not a "
                "size of a cell. Convert the column, or pass another one."
            )
        advice = f"Check obs[{size_factor_key!r}]."
    bad = ~(size > 0) | ~np.isfinite(size)
    if bad.any():
        raise InvalidCountsError(
            f"{counted(bad.sum(), 'cell has', 'cells have')} a size that is not a positive number, "
            f"for example {cells.obs_names[bad][0]!r}. {advice}"
        )
    values = sparse.csr_array(sparse.diags_array(target_sum / size) @ values)
    if method == "lognorm":
        values.data = np.log2(1 + values.data)
    return values


def check_unique(labels: Sequence[str]) -> None:
    """Raise if a label, in its canonical spelling, occurs more than once."""
    repeated = sorted(label for label, count in Counter(labels).items() if count > 1)
    if repeated:
        raise SAMSError(
            f"{', '.join(map(repr, repeated))} occurs more than once ('B+A' equals 'A+B'). Name "
            "each perturbation once."
        )


def check_predicted(genes: pd.Index, predicted: pd.Index) -> None:
    """Raise unless every observed gene is predicted."""
    absent = genes.difference(predicted)
    if len(absent):
        raise MissingKeyError(
            f"{counted(len(absent), 'gene has', 'genes have')} no prediction, for example "
            f"{absent[0]!r}. Predict all genes of the observed data, or subset the observed data "
            "to the predicted genes."
        )


def ate_table(
    effect: np.ndarray,
    rows: pd.DataFrame,
    genes: pd.Index,
    *,
    description: dict[str, Any],
    layers: dict[str, np.ndarray],
) -> ad.AnnData:
    """Build an ATE table: perturbations x genes, described in ``uns["ate"]``."""
    return ad.AnnData(
        effect,
        obs=rows,
        var=pd.DataFrame(index=genes.copy()),
        layers=layers,
        uns={"ate": description},
    )


def obs_column(adata: ad.AnnData, key: str, of: str = "") -> pd.Series:
    """Column of ``obs``; an error if it is missing or its name is not unique."""
    if key not in adata.obs:
        columns = ", ".join(map(repr, adata.obs.columns))
        raise MissingKeyError(f"obs{of} has no column {key!r}; its columns are {columns}.")
    if (adata.obs.columns == key).sum() > 1:
        raise SAMSError(f"obs{of} has more than one column {key!r}. Rename or drop one of them.")
    return adata.obs[key]


def levels_of(adata: ad.AnnData, key: str | None, of: str = "") -> np.ndarray | None:
    """Level of a covariate of every cell, as text; ``None`` without one, an error for NaN."""
    if key is None:
        return None
    levels = obs_column(adata, key, of)
    n_missing = int(levels.isna().sum())
    if n_missing:
        raise InvalidCovariateError(
            f"{counted(n_missing, 'cell')}{of} {plural(n_missing, 'has', 'have')} no {key!r} "
            "(NaN). Drop them, or name their group."
        )
    return levels.astype(str).to_numpy(dtype=object)


def _groups(labels: Labels, perturbations: Sequence[str] | None) -> tuple[pd.DataFrame, np.ndarray]:
    """Return rows to report, and for each cell 0 (control), 1 + its row, or -1 (neither)."""
    names, dosages, group_of_cell = groups_of_cells(labels)
    groups_of: defaultdict[str, list[int]] = defaultdict(list)
    for group, name in enumerate(names):
        groups_of[name].append(group)
    asked = labels.perturbed_names if perturbations is None else _known(labels, perturbations)
    groups = [group for name in asked for group in groups_of[name]]
    place_of_group = np.full(len(names), -1)
    place_of_group[groups] = 1 + np.arange(len(groups))
    place_of_group[names.index(labels.control)] = 0
    rows = label_rows([names[group] for group in groups], [dosages[group] for group in groups])
    return rows, place_of_group[group_of_cell]


def _known(labels: Labels, perturbations: Sequence[str]) -> list[str]:
    """Canonical spelling of labels; an error if one has no cells, or is named twice."""
    asked = [labels.spelling.canonical(name) for name in as_names("perturbations", perturbations)]
    unknown = sorted(set(asked).difference(labels.perturbed_names))
    if unknown:
        raise UnknownPerturbationError(
            f"No cell used has the label {', '.join(map(repr, unknown))}. Pass labels of "
            "perturbed cells, or check `indices` and `delimiter`."
        )
    check_unique(asked)
    return asked


def matrix_of_counts(cells: ad.AnnData, layer: str | None) -> Any:
    """Return ``X`` or a layer, in memory or read from disk; an error if it is missing."""
    if layer is not None and layer not in cells.layers:
        raise MissingKeyError(
            f"There is no layer {layer!r}; the layers are {', '.join(map(repr, cells.layers))}."
        )
    if layer is None and cells.X is None:
        raise MissingKeyError("X is empty. Pass the layer that holds the counts as `layer`.")
    matrix = cells.X if layer is None else cells.layers[layer]
    return BlockReader(matrix).read(0, cells.n_obs) if is_on_disk(matrix) else matrix
