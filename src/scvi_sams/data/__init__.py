"""From labels and matrices in an AnnData to what the modules compute with."""

from scvi_sams.data._block_loader import BlockLoader, registered_expression
from scvi_sams.data._block_order import BlockOrder
from scvi_sams.data._block_reader import BlockReader, is_on_disk
from scvi_sams.data._codes import (
    NO_PERTURBATION,
    PerturbationCodes,
    refuse_unknown,
    similar_names,
)
from scvi_sams.data._combinations import (
    combinations_as_perturbations,
    distinct_combinations,
    inseparable_perturbations,
    parts_of_combination,
)
from scvi_sams.data._covariates import (
    refuse_invalid_size_factor,
    refuse_other_genes,
    refuse_other_than_anndata,
)
from scvi_sams.data._dosage_matrix import encode_dosage_matrix
from scvi_sams.data._field import (
    PerturbationField,
    registered_labels,
    registered_perturbations,
    unpack_perturbations,
)
from scvi_sams.data._manager import ScreenManager
from scvi_sams.data._open_screen import open_screen
from scvi_sams.data._parsing import canonical_label, control_names, encode_labels
from scvi_sams.data._resident import ResidentCells, ResidentDataModule, ResidentLoader
from scvi_sams.data._splitting import complete_split, split_cells, stratified_split
from scvi_sams.data._streaming import StreamingDataModule
from scvi_sams.data._validation import refuse_invalid_expression, unchanged_on_error

__all__ = [
    "NO_PERTURBATION",
    "BlockLoader",
    "BlockOrder",
    "BlockReader",
    "PerturbationCodes",
    "PerturbationField",
    "ResidentCells",
    "ResidentDataModule",
    "ResidentLoader",
    "ScreenManager",
    "StreamingDataModule",
    "canonical_label",
    "combinations_as_perturbations",
    "complete_split",
    "control_names",
    "distinct_combinations",
    "encode_dosage_matrix",
    "encode_labels",
    "inseparable_perturbations",
    "is_on_disk",
    "open_screen",
    "parts_of_combination",
    "refuse_invalid_expression",
    "refuse_invalid_size_factor",
    "refuse_other_genes",
    "refuse_other_than_anndata",
    "refuse_unknown",
    "registered_expression",
    "registered_labels",
    "registered_perturbations",
    "similar_names",
    "split_cells",
    "stratified_split",
    "unchanged_on_error",
    "unpack_perturbations",
]
