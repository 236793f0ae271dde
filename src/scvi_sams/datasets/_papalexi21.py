"""A published CRISPR knock-out screen with a known answer (Papalexi et al. 2021)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import rdata
from anndata import AnnData
from scipy.sparse import coo_matrix

from scvi_sams.datasets._fetch import PUBLISHED_FILES, fetch

_COUNTS_FILE = "lowmoi_example_data.rda"
_COVARIATES_FILE = "covariate_data_frame_lowmoi.rda"


def papalexi21() -> AnnData:
    """Raw counts of 19,619 cells x 299 genes of the ECCITE-seq screen of Papalexi et al. (2021).

    Stimulated THP-1 cells, CRISPR knock-outs of 25 genes (47 / 640 / 1,197 cells: fewest, median,
    most), 2,292 control cells with non-targeting guides, three replicates, no combinations.

    The perturbation of a cell is the target of its top guide, if that guide has more than half of
    the cell's guide UMIs; the other 1,110 of the 20,729 published cells are omitted.

    Returns
    -------
    AnnData
        ``X``: csr float32, raw UMI counts. ``obs["perturbation"]``: categorical, the gene knocked
        out or ``"control"``; ``obs["guide"]``: the top guide; ``obs["guide_counts"]``: guide
        UMIs of the cell, all guides together; ``obs["replicate"]``; ``obs["total_counts"]``: UMIs
        of the whole transcriptome; ``obs["p_mito"]``: mitochondrial proportion of them.
        ``var_names``: gene symbols. ``uns["source"]``: citation, licence and addresses.

    Raises
    ------
    DataIntegrityError
        If one of the two files cannot be obtained (see :func:`fetch`).

    Warnings
    --------
    The 299 genes are a panel with 1.6 % of the counts: register ``total_counts`` as size factor,
    because the sum over the panel is not a library size. MYC and SPI1 have few cells.

    Notes
    -----
    A correct model shows (Welch tests on log-normalised counts, 5 % false discovery rate):
    IFNGR1, IFNGR2, JAK2 and STAT1 share one programme (86 to 103 of the 299 genes change; STAT1
    and PSMB9 decrease); SMAD4 (83 genes), CUL3, BRD4 and IRF1 (40 to 44) have other effects; ATF2,
    CAV1, CD86, ETV7, IRF7, MARCH8, PDCD1LG2 and STAT5A have no effect.

    The files are example data of the R package sceptre (Barry et al. 2024; MIT); no R is needed.

    References
    ----------
    Papalexi, Mimitou, Butler et al. Characterizing the molecular regulation of inhibitory immune
    checkpoints with multimodal single-cell screens. Nature Genetics 53, 322-331 (2021).
    doi:10.1038/s41588-021-00778-2

    Examples
    --------
    Downloads two files once:

    >>> adata = scvi_sams.datasets.papalexi21()  # doctest: +SKIP
    >>> scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts")  # doctest: +SKIP
    """
    published = _read_r_data(_COUNTS_FILE)
    covariates: pd.DataFrame = _read_r_data(_COVARIATES_FILE)
    guides: AnnData = published["grna_matrix"]
    top_guide = np.asarray(guides.X.argmax(axis=1)).ravel()
    top_counts = guides.X.max(axis=1).toarray().ravel()
    guide_counts = np.asarray(guides.X.sum(axis=1)).ravel()
    assigned = 2 * top_counts > guide_counts

    guide = guides.var_names[top_guide]
    target = published["grna_target_data_frame"].set_index("grna_id")["grna_target"]
    perturbation = target.astype(str).replace("non-targeting", "control").loc[guide]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(perturbation),
            "guide": pd.Categorical(guide),
            "guide_counts": guide_counts.astype(np.int64),
            "replicate": pd.Categorical(covariates["bio_rep"]),
            "total_counts": covariates["response_n_umis"].to_numpy(dtype=np.float64),
            "p_mito": covariates["p_mito"].to_numpy(),
        },
        index="cell_" + covariates.index.astype(str),
    )
    genes: AnnData = published["response_matrix"]
    adata = AnnData(X=genes.X, obs=obs, var=genes.var)[assigned].copy()
    adata.uns["source"] = {
        "citation": (
            "Papalexi et al. 2021, Nature Genetics 53, 322-331, doi:10.1038/s41588-021-00778-2"
        ),
        "distributed_by": "sceptre, Barry et al. 2024, Genome Biology 25, 124",
        "licence": "MIT",
        "url": [PUBLISHED_FILES[name].url for name in (_COUNTS_FILE, _COVARIATES_FILE)],
    }
    return adata


def _read_r_data(name: str) -> Any:
    """Read the only object in an .rda file of that name."""
    constructors = {**rdata.conversion.DEFAULT_CLASS_MAP, "dgTMatrix": _matrix_with_row_names}
    (content,) = rdata.read_rda(fetch(name), constructor_dict=constructors).values()
    return content


def _matrix_with_row_names(_: Any, slots: Mapping[str, Any]) -> AnnData:
    """Turn an R triplet matrix, features x cells, into cells x named features."""
    features_by_cells = coo_matrix(
        (slots["x"], (slots["i"], slots["j"])), shape=tuple(slots["Dim"]), dtype=np.float32
    )
    return AnnData(
        X=features_by_cells.T.tocsr(),
        var=pd.DataFrame(index=pd.Index(slots["Dimnames"][0]).astype(str)),
    )
