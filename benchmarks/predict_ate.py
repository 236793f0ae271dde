"""CPU time of predicted effects of pairs against the decoder's bare matrix products.

All pairs of 100 perturbations (or the first so many) in one call: 100 draws of masks, effects and
one basal state each, and for log-normalised counts ten basal states each; with the intervals that
are the default, and for the mean without them too. The products are those of the decoder for these
draws, in the same process, before and after.

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
from _common import print_conditions, print_ratio, with_spread
from step_time import cpu_seconds, simulated_counts

N_POSTERIOR = 100
LATENT, HIDDEN = 50, 400
ROUNDS = 3
N_DRAWS = {"mean": 100, "lograte": 100, "lognorm": 1000}
SETTINGS = [("mean", None), ("mean", 0.95), ("lograte", 0.95), ("lognorm", 0.95)]
"""Method and interval."""
PAIRS_OF_MANY_DRAWS = 200
"""Ten times the draws take ten times as long; fewer pairs tell it as well."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4950)
    parser.add_argument("--genes", type=int, default=2000)
    arguments = parser.parse_args()
    print_conditions()
    scvi.settings.seed = 0
    adata = simulated_counts(2048, arguments.genes, 100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata, n_latent=LATENT, n_hidden=HIDDEN)
    model.train(1, enable_progress_bar=False)
    pairs = ["+".join(pair) for pair in combinations(model.perturbations, 2)][: arguments.pairs]
    z = torch.randn(N_POSTERIOR, LATENT)
    hidden, genes = torch.randn(LATENT, HIDDEN), torch.randn(HIDDEN, arguments.genes)

    def predict(asked: list[str], method: str, interval: float | None) -> None:
        model.predict_ate(
            asked,
            method=method,
            n_samples=N_DRAWS[method],
            n_posterior_samples=N_POSTERIOR,
            interval=interval,
            key_added=None,
        )

    def products(n: int) -> None:
        for _ in range(n):
            (z @ hidden) @ genes

    rows, ratios = [], {}
    for method, interval in SETTINGS:
        n_draws = N_DRAWS[method]
        asked = pairs if n_draws == N_POSTERIOR else pairs[:PAIRS_OF_MANY_DRAWS]
        n_products = len(asked) * n_draws // N_POSTERIOR
        times = []
        for _ in range(ROUNDS):
            # Around the prediction, because the speed of the machine drifts.
            before = cpu_seconds(partial(products, n_products // 2))
            ours = cpu_seconds(partial(predict, asked, method, interval))
            times.append((ours, before + cpu_seconds(partial(products, n_products // 2))))
        ours, bare = 1e3 * np.array(times).T
        kind = f"{method}, intervals: {'no' if interval is None else 'yes'}"
        ratios[kind] = ours / bare
        rows.append(
            {
                "method": method,
                "intervals": "no" if interval is None else "yes",
                "pairs": len(asked),
                "draws": n_draws,
                "CPU ms per pair": with_spread(ours / len(asked)),
                "bare products, ms": with_spread(bare / len(asked)),
                "ms per pair and draw": with_spread(ours / len(asked) / n_draws, 4),
            }
        )
    print(pd.DataFrame(rows).to_string(index=False))
    for kind, values in ratios.items():
        print_ratio(f"predicted effects to bare products, {kind}", values)


if __name__ == "__main__":
    main()
