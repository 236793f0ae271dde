"""The AnnData field with the perturbations of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField

from scvi_sams._checks import as_names, check_key
from scvi_sams._constants import REGISTERED_DOSES, REGISTRY_KEYS
from scvi_sams.data._covariates import check_keys_exist
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidDosageError,
    InvalidPerturbationLabelError,
    MissingKeyError,
)
from scvi_sams.labels._labels import (
    NO_PERTURBATION,
    Labels,
    check_has_control,
    combinations_as_perturbations,
    distinct_rows,
)
from scvi_sams.labels._names import check_has, listing
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels
from scvi_sams.labels._spelling import Spelling


class PerturbationField(BaseAnnDataField):
    """Labels in obs, or a dosage matrix in obsm, as padded codes and doses.

    Writes ``obsm["_scvi_perturbations"]``, float32 of shape ``(n_cells, 2 * n_slots)``: codes, then
    doses (see :class:`~scvi_sams.labels._labels.Labels`). It is one matrix, so that every loader
    includes it in mini-batches. The vocabulary is stored in the registry; other data is encoded by
    name.

    Parameters are those of ``setup_anndata``, and ``additive``: whether a combination is the sum of
    its perturbations, or a separate perturbation.
    """

    registry_key = REGISTRY_KEYS.PERTURBATIONS
    attr_name = "obsm"
    attr_key = f"_scvi_{REGISTRY_KEYS.PERTURBATIONS}"
    is_empty = False

    VOCABULARY_KEY = "vocabulary"
    N_CONTROL_KEY = "n_control_cells"
    N_COMBINATIONS_KEY = "n_combinations"
    CELLS_PER_PERTURBATION_KEY = "cells_per_perturbation"

    def __init__(
        self,
        *,
        perturbation_key: str | None,
        control: str | int | Sequence[str | int],
        delimiter: str | None,
        dosage_key: str | None = None,
        dosage_obsm_key: str | None = None,
        perturbation_names: Sequence[str] | str | None = None,
        additive: bool = True,
    ) -> None:
        super().__init__()
        check_key(
            perturbation_key=perturbation_key,
            dosage_key=dosage_key,
            dosage_obsm_key=dosage_obsm_key,
        )
        if perturbation_names is not None and not isinstance(perturbation_names, str):
            as_names("perturbation_names", perturbation_names)
            # A copy: the caller may change a list later.
            perturbation_names = tuple(perturbation_names)
        if perturbation_names is not None and dosage_obsm_key is None:
            raise InvalidArgumentError(
                "`perturbation_names` are the names of the columns of a dosage matrix. Pass its "
                "key as `dosage_obsm_key`, or omit them."
            )
        self.perturbation_key = perturbation_key
        self.spelling = Spelling.of(control, delimiter)
        self.dosage_key = dosage_key
        self.dosage_obsm_key = dosage_obsm_key
        self.additive = additive
        self.perturbation_names = perturbation_names

    def validate_field(self, adata: AnnData) -> None:
        """Check that the slots to read are named, and exist."""
        super().validate_field(adata)
        if self.perturbation_key is None and self.dosage_obsm_key is None:
            raise MissingKeyError(
                "The perturbations of the cells are not given. Pass `perturbation_key` (a column "
                "of obs with labels) or `dosage_obsm_key` (a matrix of doses in obsm)."
            )
        if self.dosage_key is not None and self.dosage_obsm_key is not None:
            raise InvalidDosageError(
                f"Doses are given twice, by `dosage_key` ({self.dosage_key!r}) and by "
                f"`dosage_obsm_key` ({self.dosage_obsm_key!r}). Pass one of them."
            )
        columns = [self.perturbation_key, self.dosage_key]
        check_keys_exist(adata, obs=columns, obsm=[self.dosage_obsm_key])

    def register_field(self, adata: AnnData) -> dict:
        """Encode the training data and store its vocabulary."""
        labels = self.read(adata)
        if self.dosage_obsm_key is not None:
            self._check_same_names(adata)
        check_has_control(labels, self.dosage_obsm_key)
        if labels.is_control.all():
            raise InvalidPerturbationLabelError(
                "Every cell is a control cell: there is no perturbation to learn about. Check "
                f"`perturbation_key` and `control` ({', '.join(self.spelling.control)}), and that "
                "not all doses are 0."
            )
        return self._write(adata, labels)

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: object) -> dict:
        """Encode other data by the names of the training data."""
        return self._write(adata_target, self.encode(adata_target, state_registry))

    def encode(self, adata: AnnData, state_registry: Mapping[str, Any]) -> Labels:
        """Encode data by the names of the training data; nothing is written."""
        key, control = self.perturbation_key, self.spelling.control_label
        if self.dosage_obsm_key is None:
            advice = (
                " The labels of the cells are required: add the perturbation of each there. If all "
                f"are control cells: adata.obs[{key!r}] = {control!r}."
            )
            check_has("adata.obs has no", [key], adata.obs.columns, advice)
        return self.read(adata, vocabulary=list(state_registry[self.VOCABULARY_KEY]))

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the number of perturbations."""
        return {"n_perturbations": len(state_registry[self.VOCABULARY_KEY])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """Return a table of perturbations and their cell counts."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        table.add_column("Perturbation")
        table.add_column("Cells", justify="right")
        table.add_column("scvi-tools Encoding", justify="right")
        control = " or ".join(self.spelling.control)
        table.add_row(control, str(state_registry[self.N_CONTROL_KEY]), "none")
        counts = state_registry[self.CELLS_PER_PERTURBATION_KEY]
        for code, name in enumerate(state_registry[self.VOCABULARY_KEY]):
            table.add_row(name, str(counts[code]), str(code))
        return table

    def read(self, adata: AnnData, vocabulary: Sequence[str] | None = None) -> Labels:
        """Read perturbations of cells, by known names or the cells' own; nothing is written."""
        self.validate_field(adata)
        names_of_singles = vocabulary if self.additive else None
        if self.dosage_obsm_key is not None:
            labels = encode_dosage_matrix(
                adata.obsm[self.dosage_obsm_key],
                self._column_names(adata),
                spelling=self.spelling,
                vocabulary=names_of_singles,
            )
        else:
            labels = encode_labels(
                adata.obs[self.perturbation_key],
                None if self.dosage_key is None else adata.obs[self.dosage_key],
                spelling=self.spelling,
                vocabulary=names_of_singles,
            )
        if self.additive:
            return labels
        return combinations_as_perturbations(labels, vocabulary=vocabulary)

    def _column_names(self, adata: AnnData) -> list[Any]:
        matrix = adata.obsm[self.dosage_obsm_key]
        if isinstance(matrix, pd.DataFrame):
            names = list(matrix.columns)
        elif isinstance(self.perturbation_names, str):
            check_keys_exist(adata, uns=[self.perturbation_names])
            names = list(adata.uns[self.perturbation_names])
        elif self.perturbation_names is None:
            raise InvalidDosageError(
                f"adata.obsm[{self.dosage_obsm_key!r}] is a matrix without column names. Pass "
                "`perturbation_names` (a list, or a key of adata.uns), or store a DataFrame."
            )
        else:
            names = list(self.perturbation_names)
        delimiter = self.spelling.delimiter
        unusable = [
            name
            for name in names
            if pd.isna(name)
            or not str(name).strip()
            or (delimiter and delimiter in str(name) and not self.spelling.is_control(str(name)))
        ]
        if unusable:
            raise InvalidPerturbationLabelError(
                f"Columns of adata.obsm[{self.dosage_obsm_key!r}] are named {listing(unusable)}: "
                "names must not be missing or empty, or contain the delimiter "
                f"({delimiter!r}), which joins combinations. Rename them, or pass another "
                "`delimiter`."
            )
        return names

    def _check_same_names(self, adata: AnnData) -> None:
        """Check that a table in the training data has the names that were passed."""
        table, names = adata.obsm[self.dosage_obsm_key], self.perturbation_names
        if not isinstance(table, pd.DataFrame) or names is None or isinstance(names, str):
            return
        if list(map(str, table.columns)) != list(map(str, names)):
            raise InvalidDosageError(
                f"`perturbation_names` ({listing(names)}) are not the columns of the table "
                f"adata.obsm[{self.dosage_obsm_key!r}] ({listing(table.columns)}). Omit them: the "
                "names of the table are used."
            )

    def _write(self, adata: AnnData, labels: Labels) -> dict:
        packed = np.concatenate([labels.codes.astype(np.float32), labels.doses], axis=1)
        adata.obsm[self.attr_key] = packed
        self._tell_doses(adata)
        is_given = labels.codes != NO_PERTURBATION
        combinations, _ = distinct_rows(np.sort(labels.codes[is_given.sum(axis=1) > 1], axis=1))
        return {
            self.VOCABULARY_KEY: np.array(labels.vocabulary, dtype=str),
            self.N_CONTROL_KEY: int(labels.is_control.sum()),
            self.N_COMBINATIONS_KEY: len(combinations),
            self.CELLS_PER_PERTURBATION_KEY: np.bincount(
                labels.codes[is_given], minlength=len(labels.vocabulary)
            ),
        }

    def _tell_doses(self, adata: AnnData) -> None:
        """Store where doses are, so that observed effects use the same doses as models."""
        adata.uns.pop(REGISTERED_DOSES, None)
        if self.dosage_key is not None:
            keys = {"perturbation_key": self.perturbation_key, "dosage_key": self.dosage_key}
            adata.uns[REGISTERED_DOSES] = keys
        elif self.dosage_obsm_key is not None:
            names = np.array(self._column_names(adata), dtype=str)
            matrix = {"dosage_obsm_key": self.dosage_obsm_key, "names": names}
            adata.uns[REGISTERED_DOSES] = matrix


def unpack_perturbations(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split what :class:`PerturbationField` wrote into integer codes and doses."""
    codes, doses = np.split(np.asarray(packed), 2, axis=1)
    return codes.astype(np.int64), doses


def perturbation_field(manager: AnnDataManager) -> PerturbationField:
    """Return the field of a manager with perturbations."""
    (field,) = (field for field in manager.fields if isinstance(field, PerturbationField))
    return field


def registered_labels(manager: AnnDataManager) -> Labels:
    """Return the perturbations of every registered cell, by the names of the training data."""
    field = perturbation_field(manager)
    codes, doses = unpack_perturbations(manager.get_from_registry(field.registry_key))
    vocabulary = manager.get_state_registry(field.registry_key)[field.VOCABULARY_KEY]
    return Labels(codes, doses.copy(), tuple(map(str, vocabulary)), field.spelling)
