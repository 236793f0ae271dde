"""CPU time of predicted effects of pairs against the decoder's bare matrix products.

100 perturbations, all of their pairs or the first so many, 100 draws of masks, effects and one
basal state each; intervals included. The products are those of the decoder for these draws, in the
same process.

    python benchmarks/predict_ate.py [--pairs 4950] [--genes 2000]
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import scvi
import torch

import scvi_sams
from step_time import cpu_seconds, simulated_counts

N_DRAWS = 100
LATENT, HIDDEN = 50, 400
ROUNDS = 15
PAIRS_OF_DRAWN_COUNTS = 50
"""Drawing counts takes longer; fewer pairs tell it as well."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4950)
    parser.add_argument("--genes", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    adata = simulated_counts(2048, arguments.genes, 100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata, n_latent=LATENT, n_hidden=HIDDEN)
    model.train(1, enable_progress_bar=False)
    pairs = ["+".join(pair) for pair in combinations(model.perturbations, 2)][: arguments.pairs]
    z = torch.randn(N_DRAWS, LATENT)
    hidden, genes = torch.randn(LATENT, HIDDEN), torch.randn(HIDDEN, arguments.genes)

    def predict(asked: list[str], method: str) -> None:
        model.predict_ate(
            asked, method=method, n_samples=N_DRAWS, n_posterior_samples=N_DRAWS, key_added=None
        )

    def products(asked: list[str]) -> None:
        for _ in asked:
            (z @ hidden) @ genes

    rows = {}
    for method in ("mean", "lograte", "lognorm"):
        asked = pairs[:PAIRS_OF_DRAWN_COUNTS] if method == "lognorm" else pairs
        size = max(1, len(asked) // ROUNDS)
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        # In turns, because the speed of the machine drifts.
        times = np.array(
            [
                (
                    cpu_seconds(partial(predict, part, method)) / len(part),
                    cpu_seconds(partial(products, part)) / len(part),
                )
                for part in parts
            ]
        )
        ours, bare = 1e3 * np.median(times, axis=0)
        rows[method] = {
            "pairs": len(asked),
            "CPU ms per pair": ours,
            "bare products, ms": bare,
            "ratio": np.median(times[:, 0] / times[:, 1]),
        }
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    main()
