"""Model methods that read cells: latent states, expression, and goodness of fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_positions, check_choice, check_integer, check_key, check_number
from scvi_sams._constants import REGISTRY_KEYS, RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.model._cells import (
    CellReader,
    batch_code,
    importance_weighted_bounds,
    negative_log_terms,
    positions_of_genes,
    posterior_moments,
    predictive_samples,
)
from scvi_sams.model._not_supported import NOT_SUPPORTED, without
from scvi_sams.model._perturbation_tests import perturbation_tests
from scvi_sams.model._screen_model import ScreenModel
from scvi_sams.module._latent_shift import LatentShiftModule

_LATENT_KEYS = {"basal": RESULT_KEYS.LATENT, "perturbed": RESULT_KEYS.LATENT_PERTURBED}


@without(NOT_SUPPORTED)
class CellModel(ScreenModel):
    """A model that reads cells: their latent states, expression and likelihood."""

    def _read(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None,
        batch_size: int | None,
    ) -> CellReader:
        """Check the data passed to a method, and prepare to read the requested cells."""
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        if indices is None:
            return CellReader(self, adata, np.arange(adata.n_obs), batch_size)
        return CellReader(self, adata, as_positions("indices", indices, adata.n_obs), batch_size)

    def get_var_names(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Names of the genes as registered, whatever happened to the AnnData."""
        return np.asarray(self._state(REGISTRY_KEYS.X)["column_names"])

    def _check_has_data(self, argument: str) -> None:
        if self.adata is None:
            raise SAMSError(
                f"The model was loaded without data, which `{argument}` needs here: load it with "
                "`adata`, or pass data."
            )

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        representation: Literal["basal", "perturbed"] = "basal",
        give_mean: bool = True,
        mean_shifts: bool = False,
        n_samples: int = 1,
        batch_size: int | None = None,
        return_dist: bool = False,
        key_added: str | None = "default",
    ) -> np.ndarray:
        """Return the latent state of cells.

        Parameters
        ----------
        adata
            Registered data, or other data with the same genes; ``None`` for the training data.
        indices
            Cells; ``None`` for all. Rows of the result follow them.
        representation
            ``"basal"``: the state of the cell without its perturbations (``z_basal``).
            ``"perturbed"``: the state it is in (``z``: basal plus the effects it received).
        give_mean
            The posterior mean, with the perturbations' shifts at their posterior mean; otherwise
            posterior samples.
        mean_shifts
            Sample only basal states, and keep the perturbations' shifts at their posterior mean, so
            that samples do not include the uncertainty of effects. Only with ``give_mean=False``.
        n_samples
            Number of posterior samples; more than one adds a first axis. Only with
            ``give_mean=False``.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``.
        return_dist
            Return the mean and the variance of every cell's posterior, with the perturbations'
            shifts at their posterior mean; only for basal states, and nothing is written.
        key_added
            Key of ``adata.obsm`` to which the result is written: by default ``"X_sams"`` (basal) or
            ``"X_sams_perturbed"``; ``None`` writes nothing. Several samples are never written.

        Returns
        -------
        Array of shape ``(n_cells, n_latent)``, or ``(n_samples, n_cells, n_latent)``, in units of
        the prior SD; ``(2, n_cells, n_latent)`` with ``return_dist``. In obsm, rows of other cells
        keep earlier results of this model, or are NaN.

        Raises
        ------
        SAMSError
            If the perturbed state is requested for a model without one (``ConditionalVAE``), or its
            variance, which also depends on that of the shifts.

        Examples
        --------
        >>> model.get_latent_representation().shape
        (860, 6)
        >>> adata.obsm["X_sams"].shape
        (860, 6)

        Control cells have no effects, so both states are the same:

        >>> perturbed = model.get_latent_representation(representation="perturbed")
        >>> controls = adata.obs["perturbation"] == "control"
        >>> np.allclose(perturbed[controls], adata.obsm["X_sams"][controls])
        True
        """
        check_choice("representation", representation, ("basal", "perturbed"))
        check_integer(n_samples=n_samples)
        check_key(key_added=key_added)
        if representation == "perturbed" and not isinstance(self.module, LatentShiftModule):
            raise SAMSError(
                f"{type(self).__name__} has no perturbed state: perturbations act on its networks, "
                "not on the latent state. Use representation='basal'."
            )
        if return_dist and representation == "perturbed":
            raise SAMSError(
                "`return_dist` is for basal states. For the variance of perturbed states, sample "
                "them: give_mean=False, n_samples=..."
            )
        cells = self._read(adata, indices, batch_size)
        if return_dist:
            return posterior_moments(cells)
        n_draws = 1 if give_mean else n_samples
        states = np.empty((n_draws, len(cells), self.module.n_latent), dtype=np.float32)
        if give_mean or mean_shifts:
            shifts = self.module.shift_moments(cells.effects)[0][None]
        else:
            shifts = cells.drawn(n_draws).shifts
        for place, _, shift, qz, _ in cells.encoded(shifts, sampled=not give_mean):
            z_basal = qz.loc if give_mean else cells.basal_states(qz, place, n_draws)
            z = z_basal if representation == "basal" else z_basal + shift
            states[:, place] = z.cpu().numpy()
        result = states if n_draws > 1 else states[0]
        if key_added is not None and n_draws == 1:
            key = _LATENT_KEYS[representation] if key_added == "default" else key_added
            cells.write(result, "obsm", key)
        return result

    @torch.inference_mode()
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        transform_batch: str | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float = 1.0,
        n_samples: int = 1,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        key_added: str | None = None,
    ) -> pd.DataFrame | np.ndarray:
        """Return expected expression of cells under their posterior, normalised for size.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        transform_batch
            Decode every cell as if it were in this batch; ``None`` keeps its own.
        gene_list
            Genes; ``None`` for all.
        library_size
            Total to which the result is scaled: 1 gives proportions (or counts per unit of the
            size factor). A normal likelihood is not scaled.
        n_samples
            Number of posterior samples.
        return_mean
            Average over samples; otherwise samples are the first axis.
        return_numpy
            Return an array rather than a DataFrame (always for several samples).
        key_added
            Layer of ``adata`` to which the mean is written, for all genes. By default none: a dense
            cells x genes matrix may be larger than the data.

        Returns
        -------
        Cells x genes, or samples x cells x genes.

        Raises
        ------
        MissingKeyError
            If a gene or the batch is unknown.

        Examples
        --------
        >>> shares = model.get_normalized_expression(indices=[0, 1, 2])
        >>> shares.shape
        (3, 100)
        >>> np.allclose(shares.sum(axis=1), 1)
        True
        """
        check_integer(n_samples=n_samples)
        check_number(above=0, library_size=library_size)
        check_key(key_added=key_added)
        cells = self._read(adata, indices, batch_size)
        genes = positions_of_genes(gene_list, self.get_var_names())
        n_kept = 1 if return_mean else n_samples
        values = np.empty((n_kept, len(cells), len(genes)), dtype=np.float32)
        shifts = cells.drawn(n_samples).shifts
        batch = None if transform_batch is None else batch_code(transform_batch, self.adata_manager)
        scale = library_size if self.module.likelihood.is_count_likelihood else 1.0
        for place, read, shift, qz, direct in cells.encoded(shifts, sampled=True):
            covariates = self.module.covariates.in_batch(read.covariates, batch)
            z_basal = cells.basal_states(qz, place, n_samples)
            logits = self.module.decode(z_basal, shift, covariates, direct)
            rate = scale * self.module.likelihood.rate(logits)[..., genes]
            values[:, place] = (rate.mean(0, keepdim=True) if return_mean else rate).cpu().numpy()
        if key_added is not None and return_mean and gene_list is None:
            cells.write(values[0], "layers", key_added)
        if n_kept > 1:
            return values
        if return_numpy:
            return values[0]
        names = cells.adata.obs_names[cells.positions], cells.adata.var_names[genes]
        return pd.DataFrame(values[0], *names)

    @torch.inference_mode()
    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Sample new expression of cells from the posterior predictive distribution.

        Parameters
        ----------
        adata, indices, gene_list, batch_size
            As in :meth:`get_normalized_expression`.
        n_samples
            Samples per cell.

        Returns
        -------
        ``(n_cells, n_genes)``, or ``(n_cells, n_genes, n_samples)`` for several samples; counts
        with each cell's own size, or values of a normal likelihood.

        Raises
        ------
        MissingKeyError
            If a gene is unknown.

        Examples
        --------
        >>> model.posterior_predictive_sample(indices=[0, 1, 2], n_samples=5).shape
        (3, 100, 5)
        """
        check_integer(n_samples=n_samples)
        cells = self._read(adata, indices, batch_size)
        genes = positions_of_genes(gene_list, self.get_var_names())
        drawn = predictive_samples(cells, n_samples, genes)
        return drawn[..., 0] if n_samples == 1 else drawn

    @torch.inference_mode()
    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        n_samples: int = 5,
        return_mean: bool = True,
        key_added: str | None = RESULT_KEYS.ELBO,
    ) -> float | np.ndarray:
        """Return the evidence lower bound of cells (paper, appendix A.1); higher is better.

        Each cell pays a part 1 / N_t of the divergences of masks and effects, where N_t is the
        number of training cells, whichever cells are scored.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        n_samples
            Number of posterior samples.
        return_mean
            Return the mean over cells; otherwise a value per cell, shape ``(n_cells,)``.
        key_added
            Column of ``adata.obs`` to which values per cell are written; ``None`` writes nothing.

        Examples
        --------
        >>> held_out = model.validation_indices
        >>> elbo = model.get_elbo(indices=held_out)
        >>> model.get_elbo(indices=held_out, return_mean=False).shape == held_out.shape
        True
        """
        cells = self._read_scored(adata, indices, batch_size, n_samples, key_added)
        scores = -negative_log_terms(cells, n_samples).sum(axis=0)
        return cells.report(scores, return_mean, key_added)

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        n_samples: int = 5,
        return_mean: bool = True,
        key_added: str | None = RESULT_KEYS.RECONSTRUCTION_ERROR,
    ) -> float | np.ndarray:
        """Return the expected negative log-likelihood of cells under their own posterior.

        Lower is better. Parameters as in :meth:`get_elbo`.

        Examples
        --------
        >>> held_out = model.validation_indices
        >>> model.get_reconstruction_error(indices=held_out) < -model.get_elbo(indices=held_out)
        True
        """
        cells = self._read_scored(adata, indices, batch_size, n_samples, key_added)
        return cells.report(negative_log_terms(cells, n_samples)[0], return_mean, key_added)

    @torch.inference_mode()
    def get_iwelbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        n_samples: int = 100,
        return_mean: bool = True,
        key_added: str | None = RESULT_KEYS.IWELBO,
    ) -> float | np.ndarray:
        """Return the predictive importance-weighted bound of cells, the main metric of the paper.

        Masks and effects are sampled ``n_samples`` times once for all cells, then for each cell::

            logsumexp_s [log p(x | z_s) + log p(z_s) - log q(z_s | x, .)] - log(n_samples)

        Global variables are not scored: the bound is on the likelihood of held-out cells given the
        learned posterior. Higher is better; it increases with ``n_samples``, so use equal numbers.

        Parameters
        ----------
        adata, indices, batch_size, return_mean, key_added
            As in :meth:`get_elbo`. Score cells that were not used in training
            (``model.validation_indices``, ``model.test_indices``).
        n_samples
            Importance samples (paper: 100).

        Examples
        --------
        More samples make the bound tighter:

        >>> held_out = model.validation_indices
        >>> loose, tight = (model.get_iwelbo(indices=held_out, n_samples=n) for n in (1, 50))
        >>> loose < tight
        True
        """
        batch_size = 128 if batch_size is None else batch_size
        cells = self._read_scored(adata, indices, batch_size, n_samples, key_added)
        bounds = importance_weighted_bounds(cells, n_samples)
        return cells.report(bounds, return_mean, key_added)

    def test_perturbations(
        self, *, n_components: int = 20, key_added: str | None = RESULT_KEYS.TESTS
    ) -> pd.DataFrame:
        """Test for each perturbation whether its cells differ from cells without it.

        Masks and effects are fitted to the cells of a perturbation, and are never exactly zero.
        This test does not depend on them: it uses log-normalised expression on the axes in which
        all cells vary most, computed without labels. If a perturbation has no effect, its cells and
        control cells are exchangeable, and p-values are uniform whatever the model has learned; all
        cells are used, including training cells. Cells are compared within batches, categorical
        covariates and contexts, and linear effects of continuous covariates are removed; cells with
        several perturbations are compared with cells that have the others.

        Parameters
        ----------
        n_components
            Number of axes. More detect weaker programs, but reduce the power for strong ones.
        key_added
            Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
            nothing.

        Returns
        -------
        One row per perturbation: ``n_cells`` with it that were tested, ``n_compared`` cells
        without it, ``statistic`` (of Hotelling's test, as F), ``p_value``, and ``q_value``, the
        smallest false discovery rate over the screen at which it is called. NaN if no cells can be
        compared, for example in a batch without control cells. ``attrs["controls"]`` contains the
        q-values of the labels of control cells against each other, if there are several.

        Warnings
        --------
        A small p-value shows that cells differ, not why: controls from another batch, donor or
        guide library differ too. An effect on a single gene with little variation is not detected
        here; see :meth:`get_direct_effects`.

        Notes
        -----
        Hotelling (1931); within strata a partial F-test of the labels on normal scores of the
        features. q-values by Benjamini and Hochberg (1995).

        Examples
        --------
        >>> tests = model.test_perturbations()
        >>> tests.columns.tolist()
        ['n_cells', 'n_compared', 'statistic', 'p_value', 'q_value']
        """
        return perturbation_tests(self, n_components, key_added)

    def _read_scored(
        self, adata: Any, indices: Any, batch_size: Any, n_samples: int, key_added: str | None
    ) -> CellReader:
        check_integer(n_samples=n_samples)
        check_key(key_added=key_added)
        cells = self._read(adata, indices, batch_size)
        if not len(cells):
            raise InvalidArgumentError(
                "There are no cells to score: `indices` or `adata` is empty."
            )
        return cells
