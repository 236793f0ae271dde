"""From labels and matrices in an AnnData to what the modules compute with."""

from scvi_sams.data._field import (
    PerturbationField,
    registered_perturbations,
    unpack_perturbations,
)
from scvi_sams.data._parsing import (
    NO_PERTURBATION,
    PerturbationCodes,
    canonical_label,
    control_names,
    encode_dosage_matrix,
    encode_labels,
)
from scvi_sams.data._splitting import stratified_split
from scvi_sams.data._validation import refuse_invalid_expression, unchanged_on_error

__all__ = [
    "NO_PERTURBATION",
    "PerturbationCodes",
    "PerturbationField",
    "canonical_label",
    "control_names",
    "encode_dosage_matrix",
    "encode_labels",
    "refuse_invalid_expression",
    "registered_perturbations",
    "stratified_split",
    "unchanged_on_error",
    "unpack_perturbations",
]
