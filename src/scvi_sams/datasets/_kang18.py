"""Blood cells of several types with and without interferon beta (Kang et al. 2018)."""

import hashlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from scvi_sams.datasets._fetch import CONVERTED_FILES, find_converted, how_to_convert
from scvi_sams.exceptions import DataIntegrityError

_FILE = "kang18_subset.h5ad"
_COLUMNS = ["cluster_id", "sample_id", "group_id"]
_LABELS = {"ctrl": "control", "stim": "interferon beta"}
_SUMS = "06bf4e676178a5fe0875941146a9e3e76a6022b3fcb6d8e272c4a60ce8c75286"  # sha256


def kang18_subset() -> AnnData:
    """Raw counts of 1,556 blood cells x 1,267 genes, some with interferon beta (Kang et al. 2018).

    Five cell types of two donors, each with and without interferon beta for six hours: one
    perturbation in several contexts with different responses. For context-dependent effects, and
    for holding out the treated cells of a cell type.

    ============================ ======= ===============
    cell type                    control interferon beta
    ============================ ======= ===============
    B cells                      144     154
    CD14+ Monocytes              200     200
    CD4 T cells                  200     200
    CD8 T cells                  94      115
    FCGR3A+ Monocytes            112     137
    ============================ ======= ===============

    Returns
    -------
    AnnData
        ``X``: csr float32, raw UMI counts. ``obs["perturbation"]``: categorical, ``"control"`` or
        ``"interferon beta"``; ``obs["cell_type"]``; ``obs["donor"]``: ``"101"`` or ``"107"``;
        ``obs["cluster_id"]``, ``obs["sample_id"]``, ``obs["group_id"]``: as published.
        ``var_names``: gene symbols. ``uns["source"]``: citation, licence and address.

    Raises
    ------
    DataIntegrityError
        If the file is not in the cache folder (see Notes), or does not contain the published
        counts.

    Warnings
    --------
    At most 100 cells of each cell type and sample were kept, so numbers of cells do not reflect
    blood. The library size is only known over the 1,267 genes, many of which respond.

    Notes
    -----
    The counts are example data of the R package muscat (Crowell et al. 2020; GPL), a
    ``SingleCellExperiment``, which is not downloaded: convert it once, as described in the error
    that is raised if the file is missing, and put it into the cache folder of :func:`fetch`. The
    counts are compared with the published ones, whatever software wrote the file.

    A correct model shows (Welch tests on log-normalised counts, 5 % false discovery rate):
    ISG15, IFI6, ISG20 and IFIT1 rise in every cell type. Monocytes change most, 830 (CD14+) and
    546 (FCGR3A+) genes; B cells 272, CD4 and CD8 T cells 180 and 105. CXCL10 rises by 7 and 6
    (log2) in monocytes, by 4 in B cells and by 1 in T cells; CCL8 and IL1RN rise and IL8 falls in
    monocytes only.

    References
    ----------
    Kang, Subramaniam, Targ et al. Multiplexed droplet single-cell RNA-sequencing using natural
    genetic variation. Nature Biotechnology 36, 89-94 (2018). doi:10.1038/nbt.4042

    Examples
    --------
    >>> adata = scvi_sams.datasets.kang18_subset()  # doctest: +SKIP
    >>> scvi_sams.SAMSVAE.setup_anndata(adata, batch_key="donor")  # doctest: +SKIP
    """
    path = find_converted(_FILE)
    published = anndata.read_h5ad(path)
    missing = [column for column in _COLUMNS if column not in published.obs]
    if missing:
        raise DataIntegrityError(f"{path} has no obs[{missing[0]!r}]. {how_to_convert(_FILE)}")
    groups = published.obs[_COLUMNS].astype(str)
    counts = csr_matrix(published.X, dtype=np.float32)
    _check_counts(counts, groups, published.var_names, path)
    obs = pd.DataFrame(
        {
            "perturbation": groups["group_id"].map(_LABELS).astype("category"),
            "cell_type": groups["cluster_id"].astype("category"),
            "donor": groups["sample_id"].str.extract(r"(\d+)$", expand=False).astype("category"),
        }
        | {column: groups[column].astype("category") for column in _COLUMNS},
    ).set_axis([f"cell_{row}" for row in range(len(groups))])
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=published.var_names.astype(str)))
    adata.uns["source"] = {
        "citation": "Kang et al. 2018, Nature Biotechnology 36, 89-94, doi:10.1038/nbt.4042",
        "distributed_by": "muscat, Crowell et al. 2020, Nature Communications 11, 6077",
        "licence": "GPL-2.0-or-later",
        "url": CONVERTED_FILES[_FILE].url,
    }
    return adata


def _check_counts(counts: csr_matrix, groups: pd.DataFrame, genes: pd.Index, path: Path) -> None:
    """Raise unless the counts are the published ones, in whatever file.

    Compares a checksum of the sums over cells of a group, groups x genes, because bytes of a file
    depend on the software; the order of cells does not matter.
    """
    group_of_cell = groups.agg("|".join, axis=1)
    members = pd.get_dummies(group_of_cell, sparse=False, dtype=np.float64)
    sums = pd.DataFrame(members.to_numpy().T @ counts, members.columns, genes.astype(str))
    text = sums.sort_index().sort_index(axis=1).astype(np.int64).to_csv()
    if hashlib.sha256(text.encode()).hexdigest() != _SUMS:
        raise DataIntegrityError(
            f"{path} does not contain the published counts. {how_to_convert(_FILE)}"
        )
