"""Truth of a simulated screen: rates, likelihoods and effects to compare models with."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.stats import nbinom

from scvi_sams._checks import check_choice
from scvi_sams._scale import size_factor_record
from scvi_sams.datasets._simulated_decoder import TrueDecoder
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, UnknownPerturbationError

CONTROL = "control"
Acting: TypeAlias = tuple[np.ndarray, np.ndarray | float]
"""Latent shift, and change of log expression that does not depend on latent states."""
_ENTRIES_PER_CHUNK = 2_000_000  # dense cells x genes at a time: 16 MB per array


def simulated_rates(adata: AnnData, latent: np.ndarray | None = None) -> np.ndarray:
    """Decode true latent states: the expected proportion of each gene in the counts.

    Parameters
    ----------
    adata
        A screen of :func:`simulate_screen`. Genes may have been removed: proportions are relative
        to the genes that are left.
    latent
        States x latents, of cells with unchanged own genes and without a cell type; ``None``: the
        cells of ``adata``, including the knock-down of their own genes and the expression of their
        cell types, if the screen has these.

    Returns
    -------
    numpy.ndarray
        States x genes, float64; rows sum to one.

    Raises
    ------
    MissingKeyError
        If ``adata`` is not a simulated screen, has genes that were not simulated, or the truth of
        its cells was removed.

    Examples
    --------
    >>> shares = scvi_sams.datasets.simulated_rates(adata, adata.obsm["true_latent"][:5])
    >>> shares.shape, np.allclose(shares.sum(axis=1), 1)
    ((5, 100), True)
    """
    decoder = _decoder(adata)
    if latent is not None:
        return decoder.proportions(latent)
    return decoder.proportions(adata.obsm["true_latent"], decoder.offset(*_offsets_of(adata)))


def simulated_log_likelihood(adata: AnnData) -> np.ndarray:
    """Log probability of each cell's counts given its true latent: log p(x_i | z_i).

    The library size is the observed one, the sum of the cell's counts over the genes of
    ``adata``, as in the models; not ``obs["library_size"]``.

    Parameters
    ----------
    adata
        A screen of :func:`simulate_screen`, or some of its cells and genes.

    Returns
    -------
    numpy.ndarray
        One value per cell, in nats: sum over genes of the negative binomial log probability.

    Raises
    ------
    MissingKeyError
        If ``adata`` is not a simulated screen, has genes that were not simulated, or the truth of
        its cells was removed.

    Examples
    --------
    >>> log_likelihood = scvi_sams.datasets.simulated_log_likelihood(adata)
    >>> log_likelihood.shape
    (860,)
    """
    decoder = _decoder(adata)
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    latent = adata.obsm["true_latent"]
    dosage, cell_type = _offsets_of(adata)
    counts = csr_matrix(adata.X)
    result = np.empty(adata.n_obs)
    for cells in cells_at_a_time(adata.n_obs, adata.n_vars):
        x = counts[cells].toarray().astype(np.float64)
        offset = decoder.offset(
            None if dosage is None else dosage[cells],
            None if cell_type is None else cell_type[cells],
        )
        mean = x.sum(axis=1, keepdims=True) * decoder.proportions(latent[cells], offset)
        result[cells] = nbinom.logpmf(x, theta, theta / (theta + mean)).sum(axis=1)
    return result


def simulated_ate(
    adata: AnnData,
    perturbations: Sequence[str],
    *,
    n_samples: int = 2500,
    library_size: float = 1e4,
    cell_type: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Average treatment effects under the true model, at dose 1: the target of any model.

    The mean over cells of ``log2(1 + 1e4 * x / sum(x))`` with the perturbations minus the same
    without ("lognorm", the effect that the paper reports). Cells are sampled from the prior of
    z_basal; both sides, and all perturbations, share their z_basal and the gamma variables of the
    gamma-Poisson counts. A row does not depend on which others are requested.

    It is the full effect of a perturbation, including that on its own gene: escaped cells are
    ignored, and the efficacy of guides counts as 1. The mean over the cells with a label is smaller
    if some cells escape or guides are weak.

    Parameters
    ----------
    adata
        A screen of :func:`simulate_screen`.
    perturbations
        Labels such as ``"P001"`` or ``"P001+P002"``, seen in the screen or not; ``"control"`` has
        effect zero.
    n_samples
        Number of cells to sample with and without the perturbations.
    library_size
        Expected counts of every sampled cell.
    cell_type
        Type of the sampled cells, if the screen has several; ``None``: all, equally frequent.
    seed
        Seed of the samples.

    Returns
    -------
    AnnData
        Perturbations x genes, with ``obs`` and ``uns`` as in
        :func:`scvi_sams.evaluation.observed_ate`. ``X``: effect in log2 units;
        ``layers["standard_error"]``: its Monte Carlo standard error; ``uns["ate"]``: description.

    Raises
    ------
    UnknownPerturbationError
        If a label names a perturbation that was not simulated.
    InvalidArgumentError
        If there is no such cell type.
    MissingKeyError
        If ``adata`` is not a simulated screen, or has genes that were not simulated.

    Examples
    --------
    >>> truth = scvi_sams.datasets.simulated_ate(adata, ["P001", "P001+P002"], n_samples=500)
    >>> truth.shape
    (2, 100)
    >>> predicted = model.predict_ate(["P001", "P001+P002"], n_samples=500)
    >>> scores = scvi_sams.evaluation.compare_ate(predicted, truth)
    >>> bool(scores.loc["all", "pearson"] > 0.5)
    True
    """
    decoder = _decoder(adata)
    types = _chosen_types(adata, cell_type)
    untreated, *treatments = (
        [_acting(adata, decoder, members, code) for code in types]
        for members in [[], *(_members(adata, label) for label in perturbations)]
    )
    n_latent = adata.uns["simulation"]["true_effects"].shape[1]
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    total = np.zeros((len(perturbations), adata.n_vars))
    total_squares = np.zeros_like(total)
    for chunk, cells in enumerate(cells_at_a_time(n_samples, adata.n_vars)):
        rng = np.random.default_rng([seed, chunk])
        basal = rng.normal(size=(cells.stop - cells.start, n_latent))
        library = library_size * rng.gamma(theta, 1 / theta, size=(len(basal), len(theta)))
        noise_seed = [seed, chunk, 1]  # the same for all effects, so they do not depend on others
        drawn = partial(_draw_expression, noise_seed, decoder, basal, library)
        control = drawn(untreated)
        for row, treatment in enumerate(treatments):
            difference = drawn(treatment) - control
            total[row] += difference.sum(axis=0)
            total_squares[row] += np.square(difference).sum(axis=0)
    names = ["+".join(sorted(label.split("+"))) for label in perturbations]
    mean = total / n_samples
    variance = np.maximum(total_squares / n_samples - mean**2, 0)
    return AnnData(
        X=mean,
        obs=pd.DataFrame(
            {
                "perturbation": pd.Categorical(names),
                "dosage": [float(name != CONTROL) for name in names],
            },
            index=list(perturbations),
        ),
        var=pd.DataFrame(index=adata.var_names),
        layers={"standard_error": np.sqrt(variance / n_samples)},
        uns={
            "ate": {
                "method": "lognorm",
                "target_sum": 1e4,
                **size_factor_record(None),
                "units": "mean log2 fold change of 1 + counts per 10,000",
            }
        },
    )


def _draw_expression(
    seed: Sequence[int],
    decoder: TrueDecoder,
    basal: np.ndarray,
    library: np.ndarray,
    acting: Sequence[Acting],
) -> np.ndarray:
    """Mean over cell types of the log expression of cells with shifts and offsets."""
    drawn = []
    for shift, offset in acting:
        rates = library * decoder.proportions(basal + shift, offset)
        counts = np.random.default_rng(seed).poisson(rates)
        drawn.append(np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True)))
    return np.mean(drawn, axis=0)


def _decoder(adata: AnnData) -> TrueDecoder:
    """Look up the true decoder, for the genes of ``adata``."""
    if "simulation" not in adata.uns:
        raise MissingKeyError("adata.uns has no 'simulation': pass a screen of simulate_screen().")
    simulation = adata.uns["simulation"]
    is_known = adata.var_names.isin(simulation["gene_names"])
    if not is_known.all():
        unknown = adata.var_names[~is_known]
        raise MissingKeyError(f"These genes were not simulated: {unknown[:5].tolist()}.")
    return TrueDecoder.of(simulation, adata.var_names)


def _offsets_of(adata: AnnData) -> tuple[csr_matrix | None, np.ndarray | None]:
    """Effective doses of each cell, and the code of its type, if the screen has these."""
    simulation = adata.uns["simulation"]
    dosage = cell_type = None
    if "true_own_gene_effects" in simulation:
        if "true_dosage" not in adata.obsm:
            raise MissingKeyError(
                "adata.obsm has no 'true_dosage', which is needed for effects on own genes: keep "
                "it with the cells."
            )
        dosage = adata.obsm["true_dosage"]
    if "cell_types" in simulation:
        names = adata.obs.get("cell_type", pd.Series("none", index=adata.obs_names)).astype(str)
        cell_type = pd.Index(simulation["cell_types"]).get_indexer(names)
        if (cell_type < 0).any():
            raise MissingKeyError(
                "adata.obs['cell_type'] does not name one of "
                f"{', '.join(map(repr, simulation['cell_types']))} for every cell: keep the column "
                "as simulated."
            )
    return dosage, cell_type


def _chosen_types(adata: AnnData, cell_type: str | None) -> list[int]:
    """Codes of the cell types to average over; a single 0 if the screen has none."""
    known = [str(name) for name in adata.uns["simulation"].get("cell_types", ())]
    if cell_type is None:
        return list(range(max(1, len(known))))
    if not known:
        raise InvalidArgumentError(f"`cell_type` is {cell_type!r}, but this screen has no types.")
    check_choice("cell_type", cell_type, known)
    return [known.index(cell_type)]


def _members(adata: AnnData, label: str) -> list[int]:
    """Positions of the perturbations of a label."""
    known = list(adata.uns["simulation"]["perturbations"])
    members = [] if label == CONTROL else label.split("+")
    if unknown := sorted(set(members) - set(known)):
        raise UnknownPerturbationError(
            f"{label!r} names {unknown}, which were not simulated; known are {known[:5]} ..."
        )
    return [known.index(member) for member in members]


def _acting(adata: AnnData, decoder: TrueDecoder, members: list[int], cell_type: int) -> Acting:
    """Latent shift and change of log expression in a cell of a type with perturbations."""
    simulation = adata.uns["simulation"]
    if "true_response" in simulation:
        members = [t for t in members if simulation["true_response"][t, cell_type]]
    acting = simulation["true_masks"] * simulation["true_effects"]
    dosage = np.zeros((1, len(acting)))
    np.add.at(dosage[0], members, 1)
    offset = decoder.offset(csr_matrix(dosage), np.array([cell_type]))
    return acting[members].sum(axis=0), offset


def cells_at_a_time(n_cells: int, n_genes: int) -> Iterator[slice]:
    """Slices of cells that are small enough to be dense."""
    step = max(1, _ENTRIES_PER_CHUNK // n_genes)
    return (slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step))
