"""From labels and matrices in an AnnData to what the modules compute with."""

from scvi_sams.data._codes import NO_PERTURBATION, PerturbationCodes
from scvi_sams.data._combinations import combinations_as_perturbations, distinct_combinations
from scvi_sams.data._covariates import refuse_invalid_size_factor, refuse_other_genes
from scvi_sams.data._dosage_matrix import encode_dosage_matrix
from scvi_sams.data._field import (
    PerturbationField,
    registered_perturbations,
    unpack_perturbations,
)
from scvi_sams.data._manager import ScreenManager
from scvi_sams.data._parsing import canonical_label, control_names, encode_labels
from scvi_sams.data._splitting import stratified_split
from scvi_sams.data._validation import refuse_invalid_expression, unchanged_on_error

__all__ = [
    "NO_PERTURBATION",
    "PerturbationCodes",
    "PerturbationField",
    "ScreenManager",
    "canonical_label",
    "combinations_as_perturbations",
    "control_names",
    "distinct_combinations",
    "encode_dosage_matrix",
    "encode_labels",
    "refuse_invalid_expression",
    "refuse_invalid_size_factor",
    "refuse_other_genes",
    "registered_perturbations",
    "stratified_split",
    "unchanged_on_error",
    "unpack_perturbations",
]
