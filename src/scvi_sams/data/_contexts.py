"""The AnnData field with the context of each cell: cell type, donor or line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField

from scvi_sams._checks import check_key
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted, plural
from scvi_sams.data._covariates import check_keys_exist, only_column, validate_categories
from scvi_sams.data._field import PerturbationField
from scvi_sams.exceptions import InvalidArgumentError, InvalidCovariateError
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._names import listing, similar_names, texts_of

logger = logging.getLogger("scvi.sams")

MOST_PAIRS = 100_000
"""Largest number of pairs with their own effects, all of which are updated in every step."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """Context of each registered cell.

    Attributes
    ----------
    levels
        Names of the contexts of the training data, sorted as text.
    codes
        Integers of shape ``(n_cells,)``: positions in ``levels``, or ``len(levels)`` for cells
        without a known context, which occur only in other data.
    """

    levels: tuple[str, ...]
    codes: np.ndarray


class ContextField(BaseAnnDataField):
    """Contexts from obs as codes, and the perturbations measured in each.

    Writes ``obsm["_scvi_contexts"]``, float32 of shape ``(n_cells, 1)``: see :class:`Contexts`.
    Contexts, and their pairs with perturbations, are learned from the training data and stored in
    the registry. Other data are matched by name, and do not require the column.

    With C contexts, perturbation t in context c is the pair ``t * C + c``.

    Parameters
    ----------
    context_key
        Column of obs.
    perturbations
        The field with the perturbations of the cells.
    """

    registry_key = REGISTRY_KEYS.CONTEXTS
    attr_name = "obsm"
    attr_key = f"_scvi_{REGISTRY_KEYS.CONTEXTS}"
    is_empty = False

    LEVELS_KEY = "levels"
    PERTURBATIONS_KEY = "perturbation_names"
    PAIRS_KEY = "pairs"
    """Pairs with training cells, alone or in a combination; ascending. At most
    :data:`MOST_PAIRS`."""
    CELLS_KEY = "cells_per_pair"
    CONTROLS_KEY = "controls_per_context"
    N_WITHOUT_KEY = "n_cells_without_context"
    UNKNOWN_KEY = "unknown_levels"

    def __init__(self, context_key: str, perturbations: PerturbationField) -> None:
        super().__init__()
        check_key(context_key=context_key)
        if not perturbations.additive:
            raise InvalidArgumentError(
                "`context_key` is for models in which the effects of perturbations add up: in this "
                "one a combination is a separate perturbation. Omit it."
            )
        self.context_key = context_key
        self.perturbations = perturbations

    def validate_field(self, adata: AnnData) -> None:
        """Check that the column exists."""
        super().validate_field(adata)
        check_keys_exist(adata, obs=[self.context_key])

    def register_field(self, adata: AnnData) -> dict:
        """Encode the training data, and store the contexts and their pairs."""
        self.validate_field(adata)
        contexts = learn_contexts(only_column(adata, self.context_key))
        labels = self.perturbations.read(adata)
        pairs, counts = np.unique(_pairs_of_cells(labels, contexts), return_counts=True)
        if len(pairs) > MOST_PAIRS:
            logger.warning(
                f"{len(pairs)} pairs of a perturbation and a context have cells. The {MOST_PAIRS} "
                "with most cells have effects of their own; the others are predicted as if they "
                "had no cells."
            )
            pairs = np.sort(pairs[counts.argsort(stable=True)[-MOST_PAIRS:]])
        return self._write(adata, labels, contexts, pairs, n_without=0, unknown=[])

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: object) -> dict:
        """Encode other data by the names of the training data."""
        contexts, n_without, unknown = self.find(adata_target, state_registry)
        names = list(state_registry[self.PERTURBATIONS_KEY])
        labels = self.perturbations.read(adata_target, vocabulary=names)
        pairs = np.asarray(state_registry[self.PAIRS_KEY])
        return self._write(adata_target, labels, contexts, pairs, n_without, unknown)

    def find(
        self, adata: AnnData, state_registry: Mapping[str, Any]
    ) -> tuple[Contexts, int, list[str]]:
        """Contexts of other data, the number of cells without one, and unknown levels.

        Nothing is written.
        """
        levels = tuple(map(str, state_registry[self.LEVELS_KEY]))
        if self.context_key not in adata.obs:
            return Contexts(levels, np.full(adata.n_obs, len(levels))), adata.n_obs, []
        text_of_cell, texts = texts_of(only_column(adata, self.context_key), InvalidCovariateError)
        code_of = {level: code for code, level in enumerate(levels)}
        codes = np.array([code_of.get(text, len(levels)) for text in texts], dtype=np.int64)
        n_without = int(np.array([not text for text in texts], dtype=bool)[text_of_cell].sum())
        unknown = sorted(text for text in texts if text and text not in code_of)
        return Contexts(levels, codes[text_of_cell]), n_without, unknown

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the number of contexts."""
        return {"n_contexts": len(state_registry[self.LEVELS_KEY])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """Return a table of contexts with their control cells and measured perturbations."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for title in ("Context", "Control cells", "Perturbations", "scvi-tools Encoding"):
            table.add_column(title)
        levels = state_registry[self.LEVELS_KEY]
        measured = np.bincount(state_registry[self.PAIRS_KEY] % len(levels), minlength=len(levels))
        rows = zip(levels, state_registry[self.CONTROLS_KEY], measured, strict=True)
        for code, (level, n_controls, n_perturbations) in enumerate(rows):
            table.add_row(level, str(n_controls), str(n_perturbations), str(code))
        return table

    def _write(
        self,
        adata: AnnData,
        labels: Labels,
        contexts: Contexts,
        pairs: np.ndarray,
        n_without: int,
        unknown: list[str],
    ) -> dict:
        adata.obsm[self.attr_key] = contexts.codes.astype(np.float32)[:, None]
        n_contexts = len(contexts.levels)
        of_cells = _pairs_of_cells(labels, contexts)
        of_cells = of_cells[np.isin(of_cells, pairs)]
        of_controls = contexts.codes[labels.is_control]
        return {
            self.LEVELS_KEY: np.array(contexts.levels, dtype=str),
            self.PERTURBATIONS_KEY: np.array(labels.vocabulary, dtype=str),
            self.PAIRS_KEY: pairs,
            self.CELLS_KEY: np.bincount(np.searchsorted(pairs, of_cells), minlength=len(pairs)),
            self.CONTROLS_KEY: np.bincount(of_controls, minlength=n_contexts)[:n_contexts],
            self.N_WITHOUT_KEY: n_without,
            self.UNKNOWN_KEY: np.array(unknown, dtype=str),
        }


def learn_contexts(column: pd.Series) -> Contexts:
    """Contexts of training cells; an error if a column cannot be one of contexts."""
    text_of_cell, texts = texts_of(column, InvalidCovariateError)
    is_empty = np.array([not text for text in texts])[text_of_cell]
    validate_categories(column.mask(is_empty) if is_empty.any() else column, None, "context_key")
    advice = "Pass another column as `context_key`, or omit it."
    if len(texts) == 1:
        raise InvalidCovariateError(
            f"All cells have the same context, {texts[0]!r}, in the column {column.name!r}: "
            f"effects cannot differ between contexts. {advice}"
        )
    if len(texts) > len(column) / 2:
        raise InvalidCovariateError(
            f"The column {column.name!r} (`context_key`) has {len(texts)} levels in {len(column)} "
            f"cells, such as {listing(texts)}: it seems to name single cells, or to be a "
            f"measurement. A context (cell type, donor, line) should have many cells. {advice}"
        )
    order = np.argsort(texts)
    return Contexts(tuple(texts[i] for i in order), np.argsort(order)[text_of_cell])


def _pairs_of_cells(labels: Labels, contexts: Contexts) -> np.ndarray:
    """Pairs of each perturbation of each cell with the cell's known context."""
    n_contexts = len(contexts.levels)
    codes = contexts.codes[:, None]
    is_known = (labels.codes != NO_PERTURBATION) & (codes < n_contexts)
    return (labels.codes * n_contexts + codes)[is_known]


def context_field(manager: AnnDataManager) -> ContextField | None:
    """Return the field of a manager with contexts, if they were registered."""
    return next((field for field in manager.fields if isinstance(field, ContextField)), None)


def registered_contexts(manager: AnnDataManager) -> Contexts | None:
    """Return the context of every registered cell; ``None`` if no ``context_key`` was given."""
    field = context_field(manager)
    if field is None:
        return None
    codes = np.asarray(manager.get_from_registry(field.registry_key)).astype(np.int64).ravel()
    levels = manager.get_state_registry(field.registry_key)[field.LEVELS_KEY]
    return Contexts(tuple(map(str, levels)), codes)


def tell_of_contexts(manager: AnnDataManager, *, learned: bool = True) -> None:
    """Log limits of the contexts of training data (``learned``), or of other data."""
    field = context_field(manager)
    if field is None:
        return
    state = manager.get_state_registry(field.registry_key)
    where = f"adata.obs[{field.context_key!r}]"
    if not learned:
        _tell_of_other_data(state, where, has_column=field.context_key in manager.adata.obs)
        return
    for warning in _warnings(state, where):
        logger.warning(warning)
    n_pairs = len(state[field.LEVELS_KEY]) * len(state[field.PERTURBATIONS_KEY])
    n_missing = n_pairs - len(state[field.PAIRS_KEY])
    if n_missing:
        logger.info(
            f"{n_missing:,} of {n_pairs:,} pairs of a perturbation and a context ({where}) "
            f"{plural(n_missing, 'was', 'were')} not measured: the effect there is predicted from "
            "the other contexts."
        )


def _tell_of_other_data(state: Mapping[str, Any], where: str, *, has_column: bool) -> None:
    shared = "effects that all contexts share are used there"
    unknown, n_without = list(state[ContextField.UNKNOWN_KEY]), state[ContextField.N_WITHOUT_KEY]
    if unknown:
        logger.warning(
            f"{counted(len(unknown), 'context')} in {where} did not occur in "
            f"the training data, so {shared}: {listing(unknown)}."
        )
    if not has_column:
        logger.info(f"There is no {where}, so {shared}.")
    elif n_without:
        cells = counted(n_without, "cell has", "cells have")
        logger.info(f"{cells} no context in {where}, so {shared}.")


def _warnings(state: Mapping[str, Any], where: str) -> Iterator[str]:
    levels, pairs = state[ContextField.LEVELS_KEY], state[ContextField.PAIRS_KEY]
    without = levels[state[ContextField.CONTROLS_KEY] == 0]
    if len(without):
        yield (
            f"{len(without)} of {counted(len(levels), 'context')} in {where} "
            f"{plural(len(without), 'has', 'have')} no control cells: "
            f"{listing(without)}. Effects of perturbations there cannot be separated from those of "
            "the context. Remove these cells, or register contexts that have control cells."
        )
    if np.bincount(pairs // len(levels)).max() == 1:
        yield (
            f"Every perturbation was measured in only one context of {where}: shared and "
            "context-specific effects cannot be separated. Omit `context_key`, or register the "
            "column in `categorical_covariate_keys`."
        )
    similar = similar_names(levels.tolist())
    if similar:
        yield (
            f"Contexts in {where} differ only by case or encoding and count as different: "
            f"{'; '.join(' and '.join(map(repr, names)) for names in similar[:5])}. If they are "
            "the same, give them one name."
        )
