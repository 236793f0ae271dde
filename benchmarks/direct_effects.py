"""Time and memory of direct effects at the end of training, for screens of many perturbations.

Random counts of four training cells and half a held-out cell per perturbation, made mini-batch by
mini-batch; nothing is trained. The time does not depend on the number of cells but for the sums.

    python benchmarks/direct_effects.py --perturbations 10000 --genes 8000
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from _common import print_conditions
from scvi_sams import SAMSVAE
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.train._direct_effects import fit_direct_effects
from scvi_sams.train._gene_sums import gene_sums


def peak() -> float:
    """Most memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cells(n_cells: int, n_perturbations: int, n_genes: int) -> Iterator[CellBatch]:
    """Random cells, of which a twentieth are controls."""
    rng = np.random.default_rng(0)
    for start in range(0, n_cells, 512):
        n = min(512, n_cells - start)
        drawn = rng.integers(n_perturbations, size=(n, 1))
        codes = torch.as_tensor(np.where(rng.random((n, 1)) < 0.05, -1, drawn))
        x = torch.as_tensor(rng.poisson(1.0, (n, n_genes)).astype(np.float32))
        yield CellBatch(x, codes, (codes >= 0).float(), None, x.sum(dim=1))


def main() -> None:
    """Print CPU seconds and peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--perturbations", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=2000)
    arguments = parser.parse_args()
    n_perturbations, n_genes = arguments.perturbations, arguments.genes
    print_conditions()
    logging.getLogger("scvi.sams").setLevel(logging.ERROR)
    names = ["control", *(f"P{number}" for number in range(n_perturbations))]
    counts = sparse.csr_matrix(np.ones((len(names), 1), np.float32))
    counts.resize(len(names), n_genes)
    adata = AnnData(counts, obs=pd.DataFrame({"perturbation": names}))
    SAMSVAE.setup_anndata(adata)
    module = SAMSVAE(adata).module
    module.cell_sizes.copy_(torch.tensor([[5e3, 1e4, 1.5e4], [0.3, 0.4, 0.3]]))
    before, started = peak(), time.process_time()
    training, held_out = (
        gene_sums(
            cells(n, n_perturbations, n_genes),
            module.direct,
            torch.ones(n_perturbations, dtype=torch.bool),
            is_count=True,
        )
        for n in (4 * n_perturbations, n_perturbations // 2)
    )
    summed, of_sums = time.process_time(), peak()
    fit_direct_effects(module, training, held_out)
    print(
        f"{n_perturbations} perturbations x {n_genes} genes, {module.direct.n_kept} kept of each: "
        f"sums {summed - started:.0f} CPU s, estimates {time.process_time() - summed:.0f} CPU s; "
        f"peaks {before:.2f} GB before, {of_sums:.2f} with sums, {peak():.2f} GB in all"
    )


if __name__ == "__main__":
    main()
