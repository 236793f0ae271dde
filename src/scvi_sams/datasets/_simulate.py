"""Screens drawn from the generative model of SAMS-VAE, with the truth kept beside the counts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, vstack

from scvi_sams.datasets._simulated_truth import CONTROL, cells_at_a_time, proportions
from scvi_sams.exceptions import InvalidCountsError, InvalidDosageError, SAMSError

_BENCHMARK: dict[str, Any] = {
    "n_genes": 2000,
    "n_controls": 1000,
    "n_perturbations": 100,
    "cells_per_perturbation": 130,
    "n_combinations": 50,
    "cells_per_combination": 120,
    "n_latent": 30,
}
_MOST_DRAWS = 100


def simulate_screen(
    *,
    n_genes: int = 1000,
    n_controls: int = 500,
    n_perturbations: int = 30,
    cells_per_perturbation: int = 100,
    n_combinations: int = 15,
    cells_per_combination: int = 100,
    combination_size: int = 2,
    n_latent: int = 15,
    mask_probability: float = 0.1,
    effect_scale: float = 2.0,
    library_size: float = 5000.0,
    library_log_sd: float = 0.3,
    inverse_dispersion: float = 3.0,
    inverse_dispersion_log_sd: float = 0.5,
    n_hidden: int = 128,
    gene_bias_sd: float = 1.0,
    decoder_scale: float = 1.0,
    dosages: Sequence[float] | None = None,
    seed: int = 0,
) -> AnnData:
    """Draw a perturbation screen from the generative model of SAMS-VAE.

    Per cell i, perturbation t, latent l and gene g::

        z_basal_i ~ Normal(0, I)       m_tl ~ Bernoulli(p)       e_tl ~ Normal(0, effect_scale^2)
        z_i       = z_basal_i + sum_t dosage_it * m_t * e_t
        x_ig      ~ NegativeBinomial(mean = library_i * softmax(decoder(z_i))_g, theta_g)

    with decoder(z) = gene_bias + W2 leaky_relu(W1 z), slope 0.2. W1 (n_hidden x n_latent) has
    entries Normal(0, 1 / n_latent), so that hidden units have variance 1 over control cells; W2
    (n_genes x n_hidden) has entries Normal(0, decoder_scale^2 / n_hidden). Cells come in the
    order controls, single perturbations, combinations; none is empty.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes of the decoder.
    n_controls, cells_per_perturbation, cells_per_combination
        Cells that are controls, and per single perturbation and combination.
    n_perturbations, n_combinations, combination_size
        Number of single perturbations, and of distinct combinations drawn uniformly from all sets
        of ``combination_size`` of them.
    mask_probability
        p above. A mask with no active latent is drawn again, so that every perturbation has
        something to find: the expected density is ``p / (1 - (1 - p) ** n_latent)``.
    effect_scale
        Standard deviation of the effects.
    library_size, library_log_sd
        Log-normal expected counts of a cell: median, and standard deviation of the log.
    inverse_dispersion, inverse_dispersion_log_sd
        The same of a gene's theta; the variance of x is mean + mean^2 / theta.
    gene_bias_sd
        Standard deviation of gene_bias, the log expression of the genes at z = 0.
    decoder_scale
        How strongly the latent space moves log expression.
    dosages
        Doses to draw from, uniformly, for each perturbation that a cell carries; ``None``: all 1.
    seed
        Seed of the only random generator that is used; the global random state is not touched.

    Returns
    -------
    AnnData
        ``X``: csr float32, integer counts. ``obs``: ``"perturbation"`` (``"control"``,
        ``"P001"``, ``"P001+P002"``), ``"n_perturbations"``, ``"library_size"`` and, where
        ``dosages`` is given, ``"dosage"`` (``"0"`` for control, else such as ``"0.5+1.0"``,
        aligned with the label). Truth: ``obsm["true_basal"]``, ``obsm["true_latent"]`` (cells x
        latent, float32), ``var["true_inverse_dispersion"]``, and ``uns["simulation"]``:
        ``"settings"``, ``"perturbations"`` (names), ``"gene_names"``, ``"true_masks"`` (bool) and
        ``"true_effects"`` (both perturbations x latent; what acts is their product), and
        ``"decoder"`` with ``"hidden_weight"`` (W1), ``"gene_weight"`` (W2) and ``"gene_bias"``.

    Raises
    ------
    SAMSError
        If ``mask_probability`` is not in (0, 1], ``combination_size`` is below 2, or there are
        fewer sets of perturbations than ``n_combinations``.
    InvalidDosageError
        If a dose is not a positive number.
    InvalidCountsError
        If the library size is so small that some cell stays without counts.

    References
    ----------
    Bereket and Karaletsos. Modelling cellular perturbations with the sparse additive mechanism
    shift variational autoencoder. NeurIPS 2023, arXiv:2311.02794, section 3.

    Examples
    --------
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=200, n_perturbations=10)
    >>> adata.shape
    (3000, 200)
    >>> adata.uns["simulation"]["true_masks"].shape  # perturbations x latents
    (10, 15)
    """
    # First line on purpose: these are the arguments and nothing else.
    settings = {name: value for name, value in locals().items() if value is not None}
    if dosages is not None:
        doses = settings["dosages"] = np.asarray(dosages, dtype=np.float64)
        if doses.size == 0 or not (np.isfinite(doses) & (doses > 0)).all():
            raise InvalidDosageError(f"dosages must be positive numbers, got {list(dosages)}.")
    rng = np.random.default_rng(seed)
    masks = _draw_masks(rng, (n_perturbations, n_latent), mask_probability)
    effects = rng.normal(scale=effect_scale, size=masks.shape)
    decoder = {
        "hidden_weight": rng.normal(scale=n_latent**-0.5, size=(n_hidden, n_latent)),
        "gene_weight": rng.normal(scale=decoder_scale * n_hidden**-0.5, size=(n_genes, n_hidden)),
        "gene_bias": rng.normal(scale=gene_bias_sd, size=n_genes),
    }
    theta = inverse_dispersion * np.exp(rng.normal(scale=inverse_dispersion_log_sd, size=n_genes))
    combinations = _draw_combinations(rng, n_perturbations, n_combinations, combination_size)
    names = _numbered("P", n_perturbations, 3)

    obs, doses_of_cells = _assign_perturbations(rng, settings, names, combinations)
    basal = rng.normal(size=(len(obs), n_latent)).astype(np.float32)
    latent = (basal + doses_of_cells @ (masks * effects)).astype(np.float32)
    obs["library_size"] = library_size * np.exp(rng.normal(scale=library_log_sd, size=len(obs)))
    counts = _draw_counts(rng, decoder, latent, obs["library_size"].to_numpy(), theta)

    var = pd.DataFrame({"true_inverse_dispersion": theta}, index=_numbered("gene_", n_genes, 4))
    simulation = {
        "settings": settings,
        "perturbations": np.array(names, dtype=object),
        "gene_names": var.index.to_numpy(dtype=object),
        "true_masks": masks,
        "true_effects": effects,
        "decoder": decoder,
    }
    return AnnData(
        X=counts,
        obs=obs,
        var=var,
        obsm={"true_basal": basal, "true_latent": latent},
        uns={"simulation": simulation},
    )


def simulate_benchmark_screen(seed: int = 0, **overrides: Any) -> AnnData:
    """Draw the screen that the benchmarks use: 20,000 cells x 2,000 genes, about 57 % non-zero.

    1,000 controls, 100 single perturbations with 130 cells each and 50 pairs with 120 each, 30
    latents; ``overrides`` and all else are arguments of :func:`simulate_screen`, which says what
    is returned.

    Examples
    --------
    >>> adata = scvi_sams.datasets.simulate_benchmark_screen(n_genes=50)
    >>> adata.shape
    (20000, 50)
    """
    return simulate_screen(seed=seed, **{**_BENCHMARK, **overrides})


def _numbered(prefix: str, n: int, digits: int) -> list[str]:
    return [f"{prefix}{i:0{max(digits, len(str(n)))}d}" for i in range(1, n + 1)]


def _draw_masks(rng: np.random.Generator, shape: tuple[int, int], probability: float) -> np.ndarray:
    if not 0 < probability <= 1:
        raise SAMSError(f"mask_probability must be in (0, 1], got {probability}.")
    masks = rng.random(shape) < probability
    while (empty := ~masks.any(axis=1)).any():
        masks[empty] = rng.random((empty.sum(), shape[1])) < probability
    return masks


def _draw_combinations(
    rng: np.random.Generator, n_perturbations: int, n_combinations: int, size: int
) -> list[tuple[int, ...]]:
    if size < 2:
        raise SAMSError(f"combination_size must be at least 2, got {size}.")
    if n_combinations > comb(n_perturbations, size):
        raise SAMSError(
            f"There are only {comb(n_perturbations, size)} sets of {size} among {n_perturbations} "
            f"perturbations, fewer than n_combinations = {n_combinations}."
        )
    # Draws until there are enough distinct sets: listing all of them could take forever.
    combinations: set[tuple[int, ...]] = set()
    while len(combinations) < n_combinations:
        members = rng.choice(n_perturbations, size=size, replace=False)
        combinations.add(tuple(sorted(members.tolist())))
    return sorted(combinations)


def _assign_perturbations(
    rng: np.random.Generator,
    settings: Mapping[str, Any],
    names: list[str],
    combinations: list[tuple[int, ...]],
) -> tuple[pd.DataFrame, csr_matrix]:
    """Labels of all cells (obs) and their doses (csr, cells x perturbations)."""
    conditions: list[tuple[tuple[int, ...], int]] = [((), settings["n_controls"])]
    conditions += [((t,), settings["cells_per_perturbation"]) for t in range(len(names))]
    conditions += [(members, settings["cells_per_combination"]) for members in combinations]
    members_of = [members for members, n_cells in conditions for _ in range(n_cells)]
    n_carried = np.array([len(members) for members in members_of])
    columns = np.array([t for members in members_of for t in members], dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(n_carried)])
    values = rng.choice(settings.get("dosages", [1.0]), size=len(columns))
    doses = csr_matrix((values, columns, indptr), shape=(len(members_of), len(names)))

    labels = ["+".join(names[t] for t in members) or CONTROL for members in members_of]
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(labels), "n_perturbations": n_carried},
        index=_numbered("cell_", len(labels), 5),
    )
    if "dosages" in settings:
        written = [str(value) for value in values.tolist()]
        obs["dosage"] = pd.Categorical(
            ["+".join(written[i:j]) or "0" for i, j in pairwise(indptr.tolist())]
        )
    return obs, doses


def _draw_counts(
    rng: np.random.Generator,
    decoder: Mapping[str, np.ndarray],
    latent: np.ndarray,
    library: np.ndarray,
    theta: np.ndarray,
) -> csr_matrix:
    """Gamma-Poisson counts; a cell that comes out empty is drawn again."""
    blocks = []
    for cells in cells_at_a_time(len(latent), len(theta)):
        mean = library[cells, None] * proportions(decoder, latent[cells])
        counts = np.zeros_like(mean)
        for _ in range(_MOST_DRAWS):
            empty = ~counts.any(axis=1)
            gamma = rng.gamma(theta, 1 / theta, size=(empty.sum(), len(theta)))
            counts[empty] = rng.poisson(mean[empty] * gamma)
            if counts.any(axis=1).all():
                break
        else:
            raise InvalidCountsError(
                f"Some cells had no counts in {_MOST_DRAWS} draws: raise library_size, which is "
                f"{np.median(library):g}."
            )
        blocks.append(csr_matrix(counts.astype(np.float32)))
    return vstack(blocks, format="csr")
