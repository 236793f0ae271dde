"""Features of perturbations: what is known of them beside the screen, as tables by name."""

from scvi_sams.features._table import FeatureTable, as_feature_table

__all__ = ["FeatureTable", "as_feature_table"]
