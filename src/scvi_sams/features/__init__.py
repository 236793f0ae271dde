"""Features of perturbations: prior knowledge in addition to the screen, as tables by name."""

from scvi_sams.features._embedding import from_embedding
from scvi_sams.features._gmt import from_gmt
from scvi_sams.features._matching import match_genes
from scvi_sams.features._smiles import from_smiles
from scvi_sams.features._svd import svd
from scvi_sams.features._table import FeatureTable, as_feature_table

__all__ = [
    "FeatureTable",
    "as_feature_table",
    "from_embedding",
    "from_gmt",
    "from_smiles",
    "match_genes",
    "svd",
]
