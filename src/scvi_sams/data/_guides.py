"""The AnnData field with the guides of each cell."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import rich.table
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.data.fields import BaseAnnDataField

from scvi_sams._checks import check_key
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted, plural
from scvi_sams.data._covariates import check_keys_exist, only_column
from scvi_sams.data._field import PerturbationField
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.labels._guides import (
    NO_GUIDE,
    GuideList,
    carriers_of_guides,
    find_guides,
    guide_codes,
    learn_guides,
)
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import listing

logger = logging.getLogger("scvi.sams")


@dataclass(frozen=True, eq=False)
class Guides:
    """Guides of registered cells.

    Attributes
    ----------
    names
        One per guide of a perturbation; guides of controls are excluded.
    perturbation
        Integers of shape ``(n_guides,)``: code of the perturbation of each guide, ascending.
    codes
        Integers of shape ``(n_cells, n_slots)``: positions in ``names``, ascending, or -1 where a
        slot is empty. Control cells, and cells with unknown guides, have only empty slots.
    """

    names: tuple[str, ...]
    perturbation: np.ndarray
    codes: np.ndarray


class GuideField(BaseAnnDataField):
    """Names of guides in obs as padded codes.

    Writes ``obsm["_scvi_guides"]``, float32 of shape ``(n_cells, n_slots)``: see :class:`Guides`.
    Guides, and the perturbation of each, are learned from the training data and stored in the
    registry. Other data are matched by name, and do not require the column.

    Parameters
    ----------
    guide_key
        Column of obs.
    perturbations
        The field with the perturbations of the cells.
    """

    registry_key = REGISTRY_KEYS.GUIDES
    attr_name = "obsm"
    attr_key = f"_scvi_{REGISTRY_KEYS.GUIDES}"
    is_empty = False

    NAMES_KEY = "names"
    PERTURBATION_KEY = "perturbation"
    OWNERS_KEY = "perturbation_names"
    SEPARATOR_KEY = "separator"
    CELLS_PER_GUIDE_KEY = "cells_per_guide"
    N_WITHOUT_KEY = "n_perturbed_cells_without_guide"
    UNKNOWN_KEY = "unknown_guides"

    def __init__(self, guide_key: str, perturbations: PerturbationField) -> None:
        super().__init__()
        check_key(guide_key=guide_key)
        if not perturbations.additive:
            raise InvalidArgumentError(
                "`guide_key` is for models in which the effects of perturbations add up (SAMSVAE, "
                "CPAVAE): in this one a combination is a separate perturbation, and a guide "
                "belongs to a perturbation. Omit it."
            )
        self.guide_key = guide_key
        self.perturbations = perturbations

    def validate_field(self, adata: AnnData) -> None:
        """Check that the column exists."""
        super().validate_field(adata)
        check_keys_exist(adata, obs=[self.guide_key])

    def register_field(self, adata: AnnData) -> dict:
        """Encode the training data, and store the guides and their perturbations."""
        self.validate_field(adata)
        labels = self.perturbations.read(adata)
        groups, group_of_cell = carriers_of_guides(only_column(adata, self.guide_key), labels)
        learned, guides = learn_guides(groups, labels)
        code_of = {name: code for code, name in enumerate(labels.vocabulary)}
        perturbation = np.array([code_of[owner] for owner in learned.owners], dtype=np.int64)
        codes = guide_codes(guides, group_of_cell, learned.names)
        return self._write(adata, labels, codes, learned, perturbation, unknown=[])

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: object) -> dict:
        """Encode other data by the names of the training data."""
        labels, codes, unknown = self.find(adata_target, state_registry)
        perturbation = np.asarray(state_registry[self.PERTURBATION_KEY])
        known = self._known(state_registry)
        return self._write(adata_target, labels, codes, known, perturbation, unknown)

    def find(
        self, adata: AnnData, state_registry: Mapping[str, Any]
    ) -> tuple[Labels, np.ndarray, list[str]]:
        """Perturbations, codes of guides and unknown guides of other data; nothing is written."""
        labels = self.perturbations.read(adata)
        if self.guide_key not in adata.obs:
            return labels, np.full((len(labels), 1), NO_GUIDE), []
        known = self._known(state_registry)
        groups, group_of_cell = carriers_of_guides(only_column(adata, self.guide_key), labels)
        guides, unknown = find_guides(groups, known, labels)
        return labels, guide_codes(guides, group_of_cell, known.names), unknown

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the number of guides."""
        return {"n_guides": len(state_registry[self.NAMES_KEY])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """Return a table of guides, their perturbations and cell counts."""
        table = rich.table.Table(title=f"{self.registry_key} State Registry")
        for title in ("Guide", "Perturbation", "Cells", "scvi-tools Encoding"):
            table.add_column(title)
        columns = (self.NAMES_KEY, self.OWNERS_KEY, self.CELLS_PER_GUIDE_KEY)
        rows = zip(*(state_registry[key] for key in columns), strict=True)
        for code, (name, owner, n_cells) in enumerate(rows):
            table.add_row(name, owner, str(n_cells), str(code))
        return table

    def _known(self, state_registry: Mapping[str, Any]) -> GuideList:
        names, owners = (
            tuple(map(str, state_registry[key])) for key in (self.NAMES_KEY, self.OWNERS_KEY)
        )
        return GuideList(names, owners, state_registry[self.SEPARATOR_KEY])

    def _write(
        self,
        adata: AnnData,
        labels: Labels,
        codes: np.ndarray,
        known: GuideList,
        perturbation: np.ndarray,
        unknown: list[str],
    ) -> dict:
        adata.obsm[self.attr_key] = codes.astype(np.float32)
        has_guide = (codes != NO_GUIDE).any(axis=1)
        return {
            self.NAMES_KEY: np.array(known.names, dtype=str),
            self.PERTURBATION_KEY: perturbation,
            self.OWNERS_KEY: np.array(known.owners, dtype=str),
            self.SEPARATOR_KEY: known.separator,
            self.CELLS_PER_GUIDE_KEY: np.bincount(
                codes[codes != NO_GUIDE], minlength=len(known.names)
            ),
            self.N_WITHOUT_KEY: int((~has_guide & ~labels.is_control).sum()),
            self.UNKNOWN_KEY: np.array(unknown, dtype=str),
        }


def guide_field(manager: AnnDataManager) -> GuideField | None:
    """Return the field of a manager with guides, if they were registered."""
    return next((field for field in manager.fields if isinstance(field, GuideField)), None)


def registered_guides(manager: AnnDataManager) -> Guides | None:
    """Return the guides of every registered cell; ``None`` if no ``guide_key`` was given."""
    field = guide_field(manager)
    if field is None:
        return None
    codes = np.asarray(manager.get_from_registry(field.registry_key)).astype(np.int64)
    state = manager.get_state_registry(field.registry_key)
    perturbation = np.array(state[field.PERTURBATION_KEY], dtype=np.int64)
    return Guides(tuple(map(str, state[field.NAMES_KEY])), perturbation, codes)


def tell_of_guides(manager: AnnDataManager) -> None:
    """Log which perturbed cells were registered without a guide, and which guides are unknown."""
    field = guide_field(manager)
    if field is None:
        return
    state = manager.get_state_registry(field.registry_key)
    unknown, n_without = list(state[field.UNKNOWN_KEY]), state[field.N_WITHOUT_KEY]
    if unknown:
        logger.warning(
            f"{counted(len(unknown), 'guide')} in adata.obs[{field.guide_key!r}] did not occur in "
            f"the training data, and {plural(len(unknown), 'counts', 'count')} as no guide: "
            f"{listing(unknown)}."
        )
    if field.guide_key not in manager.adata.obs:
        logger.info(
            f"adata.obs has no column {field.guide_key!r}: cells are treated as without guides."
        )
    elif n_without:
        cells = counted(n_without, "perturbed cell has", "perturbed cells have")
        logger.info(f"{cells} no known guide in adata.obs[{field.guide_key!r}].")
