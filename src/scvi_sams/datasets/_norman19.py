"""A small published CRISPR activation screen with pairs of perturbations (Norman et al. 2019)."""

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from scvi_sams._plurals import counted
from scvi_sams.datasets._fetch import PUBLISHED_FILES, fetch
from scvi_sams.exceptions import DataIntegrityError

_FILE = "perturbench_devel.h5ad"
_NORMALISED_TOTAL = 1e4  # the published values are log1p(_NORMALISED_TOTAL * count / total)
_LARGEST_SMALLEST_COUNT = 20
_TOLERANCE = 1e-6


def norman19_subset() -> AnnData:
    """Raw counts of 3,375 cells x 500 genes of the CRISPRa screen of Norman et al. (2019).

    K562 cells, 18 single perturbations, 15 pairs (1,480 cells) and 100 control cells, 80 to 100
    per condition. For five of the pairs, both singles are included: KLF1+MAP2K6, KLF1+TGFBR2,
    MAP2K3+MAP2K6, MAP2K3+SLC38A2 and MAPK1+TGFBR2.

    Returns
    -------
    AnnData
        ``X``: csr float32, raw UMI counts. ``obs["perturbation"]``: categorical, ``"control"`` or
        names joined by ``"+"`` in sorted order; ``obs["perturbation_raw"]``: the published label
        (KIAA1804 is an alias of MAP3K21); ``obs["total_counts"]``: UMIs of the whole
        transcriptome, by which the published values were divided;
        ``obs["n_genes_by_counts"]``: detected genes of the whole transcriptome;
        ``obs["cell_type"]``, ``obs["perturbation_type"]``. ``var_names``: gene symbols.
        ``uns["source"]``: citation, licence and address.

    Raises
    ------
    DataIntegrityError
        If the file cannot be obtained (see :func:`fetch`) or its values are not normalised counts.

    Warnings
    --------
    Suitable for trying the interface, combinations and held-out pairs, but not for measuring
    accuracy. The 500 genes were selected for another purpose and have about 1 % of the counts, so
    the signal is weak: most of it is in HBZ, HBG2, TMSB4X and AVP. The genes are a panel: register
    ``total_counts`` as size factor.

    Notes
    -----
    The file is the development set of PerturBench (Wu et al. 2024, arXiv 2408.10609; BSD-3), whose
    ``X`` is ``log1p(10000 * count / total)``. The counts of a cell are ``expm1(X)`` divided by its
    smallest value, times the smallest count of the cell: the smallest integer for which all its
    counts, and its total, are integers.

    References
    ----------
    Norman, Horlbeck, Replogle et al. Exploring genetic interaction manifolds constructed from rich
    single-cell phenotypes. Science 365, 786-793 (2019). doi:10.1126/science.aax4438

    Examples
    --------
    Downloads a file once:

    >>> adata = scvi_sams.datasets.norman19_subset()  # doctest: +SKIP
    >>> scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts")  # doctest: +SKIP
    """
    published = anndata.read_h5ad(fetch(_FILE))
    published = published[(published.obs["dataset"] == "norman19").to_numpy()]
    counts, total_counts = _recover_counts(csr_matrix(published.X))
    obs = pd.DataFrame(
        {
            "perturbation": _sorted_labels(published.obs["perturbation"]),
            "perturbation_raw": published.obs["perturbation_raw"].astype(str).astype("category"),
            "total_counts": total_counts,
            "n_genes_by_counts": published.obs["ngenes"].to_numpy(),
            "cell_type": published.obs["cell_type"].astype(str).astype("category"),
            "perturbation_type": published.obs["perturbation_type"].astype(str).astype("category"),
        },
        index=published.obs_names,
    )
    adata = AnnData(X=counts, obs=obs, var=pd.DataFrame(index=published.var_names.astype(str)))
    adata.uns["source"] = {
        "citation": "Norman et al. 2019, Science 365, 786-793, doi:10.1126/science.aax4438",
        "distributed_by": "PerturBench, Wu et al. 2024, arXiv:2408.10609",
        "licence": "BSD-3-Clause",
        "url": PUBLISHED_FILES[_FILE].url,
    }
    return adata


def _sorted_labels(labels: pd.Series) -> pd.Series:
    names = {label: "+".join(sorted(label.split("+"))) for label in labels.astype(str).unique()}
    return labels.astype(str).map(names).astype("category")


def _recover_counts(normalised: csr_matrix) -> tuple[csr_matrix, np.ndarray]:
    """Invert ``log1p(1e4 * count / total)``: counts (csr float32) and total counts of cells."""
    shares = normalised.copy()
    shares.eliminate_zeros()
    shares.data = np.expm1(shares.data.astype(np.float64))
    stored = np.diff(shares.indptr)
    if (stored == 0).any() or not (shares.data > 0).all():
        raise DataIntegrityError(
            "Counts can be recovered only from cells with at least one positive value and no "
            f"negative ones; {counted(int((stored == 0).sum()), 'cell has', 'cells have')} no "
            "value at all."
        )
    starts = shares.indptr[:-1]
    smallest = np.minimum.reduceat(shares.data, starts)
    multiples = shares.data / np.repeat(smallest, stored)  # of the cell's smallest count
    smallest_count = np.zeros(len(smallest))
    for candidate in range(1, _LARGEST_SMALLEST_COUNT + 1):
        distance = np.abs(candidate * multiples - np.round(candidate * multiples))
        total = candidate * _NORMALISED_TOTAL / smallest
        fits = np.maximum.reduceat(distance, starts) < _TOLERANCE
        fits &= np.abs(total - np.round(total)) < _TOLERANCE
        smallest_count[fits & (smallest_count == 0)] = candidate
    if (smallest_count == 0).any():
        raise DataIntegrityError(
            f"{counted(int((smallest_count == 0).sum()), 'cell has', 'cells have')} values that "
            f"are not counts normalised by log1p({_NORMALISED_TOTAL:g} * count / total): no "
            f"smallest count of 1 to {_LARGEST_SMALLEST_COUNT} makes all of them integers to "
            f"{_TOLERANCE:g}."
        )
    shares.data = np.round(multiples * np.repeat(smallest_count, stored)).astype(np.float32)
    return shares, np.round(smallest_count * _NORMALISED_TOTAL / smallest)
