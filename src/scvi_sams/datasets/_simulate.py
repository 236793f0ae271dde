"""Screens simulated from the generative model of SAMS-VAE, with their truth."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, vstack

from scvi_sams._checks import check_number
from scvi_sams._plurals import counted
from scvi_sams.datasets._simulated_cells import (
    check_options,
    doses_that_act,
    draw_cell_type_bias,
    draw_targets,
    numbered,
)
from scvi_sams.datasets._simulated_features import TrueFeatures
from scvi_sams.datasets._simulated_truth import CONTROL, cells_at_a_time, simulated_rates
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
    knockdown: tuple[float, float] | None = None,
    n_null_perturbations: int = 0,
    guides_per_perturbation: int | None = None,
    guide_efficacy: tuple[float, float] | None = None,
    n_cell_types: int = 1,
    cell_type_log_sd: float = 0.5,
    cell_type_specific_share: float = 0.0,
    escape_rate: float | tuple[float, float] = 0.0,
    n_features: int = 0,
    n_noise_features: int = 0,
    feature_share: float = 0.5,
    seed: int = 0,
) -> AnnData:
    """Simulate a perturbation screen from the generative model of SAMS-VAE.

    Per cell i, perturbation t, latent l and gene g::

        z_basal_i ~ Normal(0, I)       m_tl ~ Bernoulli(p)       e_tl ~ Normal(0, effect_scale^2)
        z_i       = z_basal_i + sum_t dosage_it * m_t * e_t
        x_ig      ~ NegativeBinomial(mean = library_i * softmax(decoder(z_i))_g, theta_g)

    with decoder(z) = gene_bias + W2 leaky_relu(W1 z), slope 0.2. W1 (n_hidden x n_latent) has
    entries Normal(0, 1 / n_latent), so that hidden units have variance 1 over control cells; W2
    (n_genes x n_hidden) has entries Normal(0, decoder_scale^2 / n_hidden). Cells are in the order
    controls, single perturbations, combinations; no cell is without counts.

    Options add properties of real screens: perturbations that repress the gene they are named after
    (CRISPRi), null targets, several guides per target, cell types with effects of their own,
    escaped cells, and features of perturbations, such as pathways or embeddings, on which masks and
    effects depend. Then::

        z_i       = z_basal_i + sum_t d_it * m_t * e_t
        d_it      = dosage_it * efficacy_of_guide * [t acts in this cell type] * [i has not escaped]
        log rate  = decoder(z_i)_g + cell_type_bias_cg + sum_t d_it * log(1 - removed_t) * [g is t]
        m_tl      = [sqrt(s) * f_t . a_l + sqrt(1 - s) * Normal(0, 1) > threshold of p]
        e_tl      = effect_scale * (sqrt(s) * f_t . b_l + sqrt(1 - s) * Normal(0, 1))

    with features f_t ~ Normal(0, I), s = ``feature_share``, and a_l, b_l of random direction and
    length 1: features explain a proportion s of the variance of effects and of the liability that
    determines masks (the threshold model of genetics), for any p.

    Options use separate random generators: masks, effects, decoder and basal states are the same as
    without them. Features change masks and effects, except with a ``feature_share`` of 0.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes of the decoder.
    n_controls, cells_per_perturbation, cells_per_combination
        Number of control cells, and of cells per single perturbation and combination.
    n_perturbations, n_combinations, combination_size
        Number of single perturbations, and of distinct combinations sampled uniformly from all sets
        of ``combination_size`` of them.
    mask_probability
        p above. A mask with no active latent is sampled again, so that every perturbation has an
        effect: the expected density is ``p / (1 - (1 - p) ** n_latent)``.
    effect_scale
        SD of the effects.
    library_size, library_log_sd
        Log-normal expected counts of a cell: median, and SD of the log.
    inverse_dispersion, inverse_dispersion_log_sd
        The same for theta of a gene; the variance of x is mean + mean^2 / theta.
    gene_bias_sd
        SD of gene_bias, the log expression of the genes at z = 0.
    decoder_scale
        Strength with which the latent space changes log expression.
    dosages
        Doses to sample from, uniformly, for each perturbation of a cell; ``None``: all 1.
    knockdown
        Smallest and largest proportion of the expression of its own gene that a perturbation
        removes, such as ``(0.7, 0.95)``; sampled uniformly, relative to all other genes.
        Perturbations are then named after their genes, which are sampled at random. ``None``: no
        own-gene effects.
    n_null_perturbations
        Number of perturbations without any effect: their masks are empty, their own genes do not
        change.
    guides_per_perturbation
        Number of guides of each perturbation, one of which is assigned to a cell at random;
        ``None``: no guides.
    guide_efficacy
        Smallest and largest proportion of the effect (of the latent shift and of the change of log
        expression of the own gene) that a guide has, sampled uniformly; ``None``: all of it.
    n_cell_types
        Number of cell types, assigned at random with equal frequency.
        Types that cells are of at random, equally frequent.
    cell_type_log_sd
        SD of the effect of a type on the log expression of each gene.
    cell_type_specific_share
        Proportion of the perturbations with an effect whose effect exists in one cell type only,
        including on the own gene.
    escape_rate
        Probability that a perturbed cell has none of the effects of its label. Two numbers: the
        smallest and largest probability of perturbations, or of their guides if there are any,
        sampled uniformly; a cell with several perturbations has the mean of theirs.
    n_features, n_noise_features
        Number of informative features, on which masks and effects depend, and of noise features.
    feature_share
        s above, from 0 to 1.
    seed
        Seed of the random generators; the global random state is unchanged.

    Returns
    -------
    AnnData
        ``X``: csr float32, integer counts. ``obs``: ``"perturbation"`` (``"control"``,
        ``"P001"``, ``"P001+P002"``), ``"n_perturbations"``, ``"library_size"`` and, if requested,
        ``"dosage"`` (``"0"`` for control, otherwise such as ``"0.5+1.0"``) and ``"guide"``
        (``"control"``, ``"P001g2+P002g1"``), both aligned with the label, and ``"cell_type"``
        (``"type_1"``). Truth: ``obsm["true_basal"]``, ``obsm["true_latent"]`` (cells x latent,
        float32), ``var["true_inverse_dispersion"]``, and ``uns["simulation"]``: ``"settings"``,
        ``"perturbations"`` (names), ``"gene_names"``, ``"true_masks"`` (bool) and
        ``"true_effects"`` (both perturbations x latent; the shift is their product), and
        ``"decoder"`` with ``"hidden_weight"`` (W1), ``"gene_weight"`` (W2) and ``"gene_bias"``.

        Truth of options: ``obs["true_escaped"]``; ``obsm["true_dosage"]`` (d above, csr, cells x
        perturbations); in ``uns["simulation"]``: ``"true_escape_rate"`` if it varies (of
        perturbations, or perturbations x guides), ``"true_own_gene_effects"`` (one per
        perturbation, change of the natural log at dose 1), ``"guides"`` and
        ``"true_guide_efficacy"`` (both perturbations x guides), ``"cell_types"`` and
        ``"true_response"`` (bool, perturbations x cell types: where each has an effect), and in
        ``"decoder"`` ``"cell_type_bias"`` (cell types x genes).

        With features, ``uns["perturbation_features"]``: DataFrame, perturbations x features
        (``"feature_01"``, then ``"noise_01"``); and in ``uns["simulation"]``
        ``"true_mask_weights"`` (sqrt(s) * a) and ``"true_effect_weights"`` (effect_scale *
        sqrt(s) * b), both features x latents, 0 for noise.

    Raises
    ------
    InvalidArgumentError
        If an option is out of its range, or requires another one: there are fewer genes than
        perturbations with a ``knockdown``, efficacies without guides, specific effects without
        cell types, or only noise features.
    SAMSError
        If ``mask_probability`` is not in (0, 1], ``combination_size`` is below 2, or there are
        fewer sets of perturbations than ``n_combinations``.
    InvalidDosageError
        If a dose is not a positive number.
    InvalidCountsError
        If the library size is so small that some cell has no counts.

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

    A CRISPRi panel: 14 targets among its 70 genes, few counts and cells, and effects on other genes
    that are small relative to those on the own gene.

    >>> panel = scvi_sams.datasets.simulate_screen(
    ...     n_genes=70,
    ...     n_perturbations=14,
    ...     cells_per_perturbation=20,
    ...     n_combinations=0,
    ...     n_latent=5,
    ...     effect_scale=0.5,
    ...     library_size=500,
    ...     knockdown=(0.7, 0.95),
    ... )
    >>> targets = panel.uns["simulation"]["perturbations"]
    >>> len(targets), set(targets) <= set(panel.var_names)
    (14, True)
    >>> left = np.exp(panel.uns["simulation"]["true_own_gene_effects"])
    >>> bool((0.05 <= left).all() and (left <= 0.3).all())
    True

    20 features that explain half of the effects of perturbations, and 10 noise features:

    >>> known = scvi_sams.datasets.simulate_screen(n_genes=50, n_features=20, n_noise_features=10)
    >>> known.uns["perturbation_features"].shape
    (30, 30)
    """
    # Must be the first line: these are the arguments and nothing else.
    settings = {name: value for name, value in locals().items() if value is not None}
    if dosages is not None:
        doses = settings["dosages"] = np.asarray(dosages, dtype=np.float64)
        if doses.size == 0 or not (np.isfinite(doses) & (doses > 0)).all():
            raise InvalidDosageError(f"dosages must be positive numbers, got {list(dosages)}.")
    check_options(settings)
    settings |= {
        name: np.asarray(settings[name], dtype=np.float64)
        for name in ("knockdown", "guide_efficacy", "escape_rate")
        if np.ndim(settings.get(name, 0.0)) > 0
    }
    rng = np.random.default_rng(seed)
    # Separate generators, so that options do not change anything else.
    of_nulls, of_types, of_targets, *of_cells, of_features = rng.spawn(7)

    features = TrueFeatures.draw(of_features, settings) if n_features else None
    masks = _draw_masks(rng, (n_perturbations, n_latent), mask_probability, features)
    masks[of_nulls.choice(n_perturbations, size=n_null_perturbations, replace=False)] = False
    effects = rng.normal(scale=effect_scale, size=masks.shape)
    if features is not None:
        effects = features.effects(effects, effect_scale)
    decoder = _draw_decoder(rng, settings) | draw_cell_type_bias(of_types, settings)
    theta = inverse_dispersion * np.exp(rng.normal(scale=inverse_dispersion_log_sd, size=n_genes))
    var = pd.DataFrame({"true_inverse_dispersion": theta}, index=numbered("gene_", n_genes, 4))
    names, of_own_genes = draw_targets(of_targets, settings, var.index, masks)
    combinations = _draw_combinations(rng, n_perturbations, n_combinations, combination_size)
    obs, doses_of_cells = _assign_perturbations(rng, settings, names, combinations)
    acting, of_design = doses_that_act(of_cells, settings, names, masks, obs, doses_of_cells)
    simulation = {
        "settings": settings,
        "perturbations": np.array(names, dtype=object),
        "gene_names": var.index.to_numpy(dtype=object),
        "true_masks": masks,
        "true_effects": effects,
        "decoder": decoder,
        **of_own_genes,
        **of_design,
        **({} if features is None else features.truth(effect_scale)),
    }

    basal = rng.normal(size=(len(obs), n_latent)).astype(np.float32)
    latent = (basal + acting @ (masks * effects)).astype(np.float32)
    obs["library_size"] = library_size * np.exp(rng.normal(scale=library_log_sd, size=len(obs)))
    adata = AnnData(
        obs=obs,
        var=var,
        obsm={"true_basal": basal, "true_latent": latent},
        uns={"simulation": simulation},
    )
    if features is not None:
        adata.uns["perturbation_features"] = features.table(names, n_noise_features)
    if of_own_genes or of_design or np.any(np.asarray(escape_rate) > 0):
        adata.obsm["true_dosage"] = acting
    adata.X = _draw_counts(rng, adata)
    return adata


def simulate_benchmark_screen(seed: int = 0, **overrides: Any) -> AnnData:
    """Simulate the screen of the benchmarks: 20,000 cells x 2,000 genes, about 57 % non-zero.

    1,000 controls, 100 single perturbations with 130 cells each and 50 pairs with 120 each, 30
    latents; ``overrides`` are further arguments of :func:`simulate_screen`, which describes the
    result.

    Examples
    --------
    >>> adata = scvi_sams.datasets.simulate_benchmark_screen(n_genes=50)
    >>> adata.shape
    (20000, 50)
    """
    return simulate_screen(seed=seed, **{**_BENCHMARK, **overrides})


def _draw_masks(
    rng: np.random.Generator,
    shape: tuple[int, int],
    probability: float,
    features: TrueFeatures | None,
) -> np.ndarray:
    check_number(above=0, at_most=1, mask_probability=probability)
    masks = np.zeros(shape, dtype=bool)
    while len(empty := np.flatnonzero(~masks.any(axis=1))):
        uniform = rng.random((len(empty), shape[1]))
        if features is None:
            masks[empty] = uniform < probability
        else:
            masks[empty] = features.masks(empty, uniform, probability)
    return masks


def _draw_decoder(rng: np.random.Generator, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    n_genes, n_hidden, n_latent = (settings[f"n_{of}"] for of in ("genes", "hidden", "latent"))
    scale = settings["decoder_scale"] * n_hidden**-0.5
    return {
        "hidden_weight": rng.normal(scale=n_latent**-0.5, size=(n_hidden, n_latent)),
        "gene_weight": rng.normal(scale=scale, size=(n_genes, n_hidden)),
        "gene_bias": rng.normal(scale=settings["gene_bias_sd"], size=n_genes),
    }


def _draw_combinations(
    rng: np.random.Generator, n_perturbations: int, n_combinations: int, size: int
) -> list[tuple[int, ...]]:
    if size < 2:
        raise SAMSError(f"combination_size must be at least 2, got {size}.")
    if n_combinations > comb(n_perturbations, size):
        raise SAMSError(
            f"Only {counted(comb(n_perturbations, size), 'set')} of {size} can be made from "
            f"{counted(n_perturbations, 'perturbation')}, fewer than n_combinations = "
            f"{n_combinations}."
        )
    # Samples until there are enough distinct sets: listing all of them could take too long.
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
        index=numbered("cell_", len(labels), 5),
    )
    if "dosages" in settings:
        written = [str(value) for value in values.tolist()]
        obs["dosage"] = pd.Categorical(
            ["+".join(written[i:j]) or "0" for i, j in pairwise(indptr.tolist())]
        )
    return obs, doses


def _draw_counts(rng: np.random.Generator, adata: AnnData) -> csr_matrix:
    """Gamma-Poisson counts; a cell without counts is sampled again."""
    library = adata.obs["library_size"].to_numpy()
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    blocks = []
    for cells in cells_at_a_time(adata.n_obs, adata.n_vars):
        mean = library[cells, None] * simulated_rates(adata[cells])
        counts = np.zeros_like(mean)
        for _ in range(_MOST_DRAWS):
            empty = ~counts.any(axis=1)
            gamma = rng.gamma(theta, 1 / theta, size=(empty.sum(), len(theta)))
            counts[empty] = rng.poisson(mean[empty] * gamma)
            if counts.any(axis=1).all():
                break
        else:
            raise InvalidCountsError(
                f"Some cells had no counts in {_MOST_DRAWS} attempts: raise library_size, which is "
                f"{np.median(library):g}."
            )
        blocks.append(csr_matrix(counts.astype(np.float32)))
    return vstack(blocks, format="csr")
