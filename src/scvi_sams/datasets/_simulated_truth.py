"""What is true of a simulated screen: rates, likelihoods and effects to compare models with."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.special import softmax
from scipy.stats import nbinom

from scvi_sams.exceptions import MissingKeyError, UnknownPerturbationError

CONTROL = "control"
_LEAKY_SLOPE = 0.2
_ENTRIES_PER_CHUNK = 2_000_000  # cells x genes that are dense at a time: 16 MB per array


def simulated_rates(adata: AnnData, latent: np.ndarray) -> np.ndarray:
    """Decode places in the true latent space: the expected share of each gene in the counts.

    Parameters
    ----------
    adata
        A screen of :func:`simulate_screen`. Genes may have been left out since: the shares are
        those among the genes that are left.
    latent
        Places x latents, for example ``adata.obsm["true_latent"]``.

    Returns
    -------
    numpy.ndarray
        Places x genes, float64; rows sum to one.

    Raises
    ------
    MissingKeyError
        If ``adata`` is not a simulated screen, or has genes that were not simulated.

    Examples
    --------
    >>> shares = scvi_sams.datasets.simulated_rates(adata, adata.obsm["true_latent"][:5])
    >>> shares.shape, np.allclose(shares.sum(axis=1), 1)
    ((5, 100), True)
    """
    return proportions(_decoder(adata), latent)


def simulated_log_likelihood(adata: AnnData) -> np.ndarray:
    """Log probability of each cell's counts given its true latent: log p(x_i | z_i).

    The library size is the observed one, the sum of the cell's counts over the genes of
    ``adata``, as the models take it; not ``obs["library_size"]``.

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
        If ``adata`` is not a simulated screen, or has genes that were not simulated.

    Examples
    --------
    >>> log_likelihood = scvi_sams.datasets.simulated_log_likelihood(adata)
    >>> log_likelihood.shape
    (860,)
    """
    decoder = _decoder(adata)
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    latent = adata.obsm["true_latent"]
    counts = csr_matrix(adata.X)
    result = np.empty(adata.n_obs)
    for cells in cells_at_a_time(adata.n_obs, adata.n_vars):
        x = counts[cells].toarray().astype(np.float64)
        mean = x.sum(axis=1, keepdims=True) * proportions(decoder, latent[cells])
        result[cells] = nbinom.logpmf(x, theta, theta / (theta + mean)).sum(axis=1)
    return result


def simulated_ate(
    adata: AnnData,
    perturbations: Sequence[str],
    *,
    n_samples: int = 2500,
    library_size: float = 1e4,
    seed: int = 0,
) -> AnnData:
    """Average treatment effects under the true model, at dose 1: what a model's should be.

    The mean over cells of ``log2(1 + 1e4 * x / sum(x))`` with the perturbations minus the same
    without ("lognorm", the effect that the paper reports). Cells are drawn from the prior of
    z_basal; both sides, and all perturbations, share their z_basal and the gamma variables of the
    gamma-Poisson counts. A row does not depend on which others are asked for.

    Parameters
    ----------
    adata
        A screen of :func:`simulate_screen`.
    perturbations
        Labels such as ``"P001"`` or ``"P001+P002"``, seen in the screen or not; ``"control"`` has
        effect zero.
    n_samples
        Cells to draw with and without the perturbations.
    library_size
        Expected counts of every drawn cell.
    seed
        Seed of the draw.

    Returns
    -------
    AnnData
        Perturbations x genes. ``X``: effect, log2 units; ``layers["standard_error"]``: its
        Monte-Carlo standard error; ``uns["ate"]``: what the numbers are.

    Raises
    ------
    UnknownPerturbationError
        If a label names a perturbation that was not simulated.
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
    shifts = np.stack([_true_shift(adata, label) for label in perturbations])
    theta = adata.var["true_inverse_dispersion"].to_numpy()
    total = np.zeros((len(perturbations), adata.n_vars))
    total_squares = np.zeros_like(total)
    for chunk, cells in enumerate(cells_at_a_time(n_samples, adata.n_vars)):
        rng = np.random.default_rng([seed, chunk])
        basal = rng.normal(size=(cells.stop - cells.start, shifts.shape[1]))
        library = library_size * rng.gamma(theta, 1 / theta, size=(len(basal), len(theta)))
        noise_seed = [seed, chunk, 1]  # the same each time: no effect depends on the others
        control = _draw_expression(noise_seed, library * proportions(decoder, basal))
        for row, shift in enumerate(shifts):
            treated = _draw_expression(noise_seed, library * proportions(decoder, basal + shift))
            total[row] += (treated - control).sum(axis=0)
            total_squares[row] += np.square(treated - control).sum(axis=0)
    mean = total / n_samples
    variance = np.maximum(total_squares / n_samples - mean**2, 0)
    return AnnData(
        X=mean,
        obs=pd.DataFrame(index=list(perturbations)),
        var=pd.DataFrame(index=adata.var_names),
        layers={"standard_error": np.sqrt(variance / n_samples)},
        uns={
            "ate": {
                "method": "lognorm",
                "target_sum": 1e4,
                "units": "log2(1 + counts per target_sum)",
            }
        },
    )


def _draw_expression(seed: Sequence[int], rates: np.ndarray) -> np.ndarray:
    counts = np.random.default_rng(seed).poisson(rates)
    return np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))


def _decoder(adata: AnnData) -> dict[str, np.ndarray]:
    """Look up the true decoder, for the genes that ``adata`` has."""
    if "simulation" not in adata.uns:
        raise MissingKeyError("adata.uns has no 'simulation': give a screen of simulate_screen().")
    simulation = adata.uns["simulation"]
    genes = pd.Index(simulation["gene_names"]).get_indexer(adata.var_names)
    if (genes < 0).any():
        unknown = adata.var_names[genes < 0]
        raise MissingKeyError(f"These genes were not simulated: {unknown[:5].tolist()}.")
    decoder = simulation["decoder"]
    return {
        "hidden_weight": decoder["hidden_weight"],
        "gene_weight": decoder["gene_weight"][genes],
        "gene_bias": decoder["gene_bias"][genes],
    }


def _true_shift(adata: AnnData, label: str) -> np.ndarray:
    """Sum of mask * effect over the perturbations of a label, one value per latent."""
    simulation = adata.uns["simulation"]
    known = list(simulation["perturbations"])
    members = [] if label == CONTROL else label.split("+")
    if unknown := sorted(set(members) - set(known)):
        raise UnknownPerturbationError(
            f"{label!r} names {unknown}, which were not simulated; known are {known[:5]} ..."
        )
    acting = simulation["true_masks"] * simulation["true_effects"]
    return acting[[known.index(member) for member in members]].sum(axis=0)


def cells_at_a_time(n_cells: int, n_genes: int) -> Iterator[slice]:
    """Slices of cells that are few enough to be dense."""
    step = max(1, _ENTRIES_PER_CHUNK // n_genes)
    return (slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step))


def proportions(decoder: Mapping[str, np.ndarray], latent: np.ndarray) -> np.ndarray:
    """Expected share of each gene in the counts, places x genes."""
    hidden = latent.astype(np.float64) @ decoder["hidden_weight"].T
    hidden = np.where(hidden > 0, hidden, _LEAKY_SLOPE * hidden)
    return softmax(hidden @ decoder["gene_weight"].T + decoder["gene_bias"], axis=1)
