"""Can cells say of a single mask entry whether it is there? What a test per entry was tried on.

An entry's direction is what leaving it out changes in decoded log-expression, averaged over control
cells. Along it, less what the other entries of the perturbation and its direct effects explain,
cells with the perturbation are compared with control cells: a partial F-test with one degree of
freedom, on principal components of all cells, found without labels. "all cells" are those that the
model was trained on, too; "validation cells" are not.

Entries of probability above .5 are tested; of a perturbation that does nothing the likeliest one.
An entry that is not there should have p < .05 in one case of twenty.

    python benchmarks/entry_tests.py [--screens svae papalexi21] [--seeds 0]
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

import scvi_sams
from _common import print_conditions
from error_rates import SCREENS, Screen, be_quiet, fit, parser_of
from scvi_sams import evaluation
from scvi_sams._group_tests import group_tests, normal_scores
from scvi_sams.data._field import registered_labels
from scvi_sams.model._expression_axes import strata_of_cells
from scvi_sams.train._statistics import chunks_of_cells

N_COMPONENTS, N_CONTROLS = 50, 300
LARGE = 1e-3
"""Effects from which on a latent dimension counts as moved."""


class Cells:
    """Principal components of the cells, and what of expression they see."""

    def __init__(self, model: scvi_sams.SAMSVAE) -> None:
        manager = model.adata_manager
        self.labels, self.strata = registered_labels(manager), strata_of_cells(manager)
        parts = list(chunks_of_cells(manager, np.arange(len(self.strata))))
        size = np.concatenate([size for _, size in parts])
        self.typical_size = float(np.median(size))
        counts = np.concatenate([x.toarray() for x, _ in parts])
        logged = np.log1p(counts / size[:, None] * self.typical_size)
        logged = self.centred(logged, self.strata)
        self.sd = np.maximum(logged.std(axis=0), LARGE)
        products = (logged / self.sd).T @ (logged / self.sd)
        self.axes = np.linalg.eigh(products)[1][:, ::-1][:, :N_COMPONENTS]
        self.features = self.seen(logged)
        group = np.unique(
            np.column_stack([self.labels.name_of_cell, self.strata]), axis=0, return_inverse=True
        )[1]
        within = self.centred(self.features, group.ravel())
        self.inverse = np.linalg.inv(within.T @ within / len(within))

    def seen(self, expression: np.ndarray) -> np.ndarray:
        return expression / self.sd @ self.axes

    @staticmethod
    def centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return values - pd.DataFrame(values).groupby(groups).transform("mean").to_numpy()

    def p_value(
        self, code: int, direction: np.ndarray, others: list, held_out: np.ndarray
    ) -> float:
        """Test one direction, given others, on the cells of a perturbation and control cells."""
        design = np.column_stack([direction, *others])
        filters = np.linalg.pinv(design.T @ self.inverse @ design) @ design.T @ self.inverse
        tested = (self.labels.codes == code).any(axis=1) | self.labels.is_control
        tested = np.flatnonzero(tested & held_out)
        score = normal_scores(self.features[tested] @ filters[:1].T)
        return group_tests(score, self.labels[tested], self.strata[tested]).p_value[code]


@torch.no_grad()
def directions(
    model: scvi_sams.SAMSVAE, cells: Cells, codes: np.ndarray
) -> dict[int, tuple[dict[int, np.ndarray], list[np.ndarray]]]:
    """For each perturbation what every entry changes, and what its direct effects change."""
    controls = np.flatnonzero(cells.labels.is_control)
    rng = np.random.default_rng(0)
    controls = np.sort(rng.choice(controls, min(N_CONTROLS, len(controls)), replace=False))
    reader, module = model._read(None, controls, N_CONTROLS), model.module
    nothing = torch.zeros(1, 0, module.n_shift)
    _, read, _, qz, _ = next(iter(reader.encoded(nothing)))
    effects = torch.as_tensor(model.get_perturbation_effects(key_added=None).mean.to_numpy())
    direct = torch.as_tensor(model.get_direct_effects(key_added=None).mean.to_numpy())

    def expression(shift: torch.Tensor, direct: torch.Tensor) -> np.ndarray:
        shifts = shift.float().expand(1, qz.loc.shape[1], -1)
        logits = module.decode(qz.loc, shifts, read.covariates, direct.float()[None, None])
        rates = module.likelihood.rate(logits)
        logged = torch.log1p(cells.typical_size * rates).double().mean(dim=(0, 1))
        return cells.seen(logged.numpy())

    found = {}
    for code in codes:
        effect, of_genes = effects[code], direct[code]
        whole, entries = expression(effect, of_genes), {}
        for latent in np.flatnonzero(effect.abs() > LARGE):
            without = effect.clone()
            without[latent] = 0
            entries[int(latent)] = whole - expression(without, of_genes)
        further = [whole - expression(effect, torch.zeros_like(of_genes))] if of_genes.any() else []
        found[int(code)] = entries, further
    return found


def tests(screen: Screen, model: scvi_sams.SAMSVAE) -> pd.DataFrame:
    """One row per tested entry: its probability, whether it is there, two p-values."""
    masks = model.get_perturbation_masks(key_added=None)
    probability = masks.to_numpy()
    tested = probability > 0.5
    is_null = masks.index.isin(screen.nulls)
    idle = np.flatnonzero(is_null & ~tested.any(axis=1))
    tested[idle, probability[idle].argmax(axis=1)] = True
    is_there = np.where(is_null[:, None], 0.0, np.nan) * np.ones(masks.shape)
    truth = screen.adata.uns.get("simulation", {}).get("true_masks")
    if truth is not None and np.any(truth):
        names = np.asarray(screen.adata.uns["simulation"]["perturbations"])
        true = pd.DataFrame(truth, index=names).loc[masks.index].to_numpy()
        estimated, partner = evaluation.match_latents(probability > 0.5, true)
        is_there = np.zeros(masks.shape)
        is_there[:, estimated] = true[:, partner] != 0
    cells = Cells(model)
    parts = directions(model, cells, np.flatnonzero(tested.any(axis=1)))
    held_out = np.zeros(len(cells.labels), dtype=bool)
    held_out[model.validation_indices] = True
    rows = []
    for code, latent in zip(*np.nonzero(tested), strict=True):
        entries, further = parts[code]
        if latent not in entries:  # switched off
            continue
        others = [entries[o] for o in np.flatnonzero(tested[code]) if o != latent and o in entries]
        p_values = (
            cells.p_value(code, entries[latent], others + further, chosen)
            for chosen in (np.ones_like(held_out), held_out)
        )
        rows.append([is_null[code], is_there[code, latent], *p_values])
    columns = ["of a null", "is there", "all cells", "validation cells"]
    return pd.DataFrame(rows, columns=columns).astype({"of a null": bool})


def main() -> None:
    """Print the share of p-values below two sizes."""
    screens = ["mcfaline23 permuted", "papalexi21", "svae", "300x80x60", "40x50x60"]
    arguments = parser_of(__doc__, screens, [0]).parse_args()
    be_quiet()
    print_conditions()
    for name in arguments.screens:
        found = []
        for seed in arguments.seeds:
            screen = SCREENS[name](seed)
            found.append(tests(screen, fit(screen, seed, arguments.epochs)))
        table = pd.concat(found)
        is_false = table["is there"] == 0
        for what, rows in (
            ("of perturbations that do nothing", table[table["of a null"]]),
            ("false, of perturbations that do something", table[is_false & ~table["of a null"]]),
            ("true", table[table["is there"] == 1]),
        ):
            for cells in ("all cells", "validation cells"):
                p = rows[cells].dropna()
                if len(p):
                    shares = ", ".join(f"{(p < size).mean():.3f} < {size}" for size in (0.05, 1e-3))
                    print(f"{name}: entries {what}, {cells}: {len(p)}, {shares}", flush=True)


if __name__ == "__main__":
    main()
