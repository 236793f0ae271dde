"""Which cells train and which are predicted: seeded, pure functions of the labels."""

from scvi_sams.splits._cells import canonical_labels, hold_out_combinations, split_cells
from scvi_sams.splits._makers import norman_data_efficiency, norman_ood, random_cells
from scvi_sams.splits._perturbench import combination_hold_out, single_hold_out
from scvi_sams.splits._split import Split, check_split, make_split
from scvi_sams.splits._transfer import covariate_transfer

__all__ = [
    "Split",
    "canonical_labels",
    "check_split",
    "combination_hold_out",
    "covariate_transfer",
    "hold_out_combinations",
    "make_split",
    "norman_data_efficiency",
    "norman_ood",
    "random_cells",
    "single_hold_out",
    "split_cells",
]
