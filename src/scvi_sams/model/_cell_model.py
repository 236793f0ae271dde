"""What a model says of cells: latent states, expression, and how well it explains them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import settings
from torch.distributions import Normal

from scvi_sams._checks import as_positions, check_choice, check_integer, check_number
from scvi_sams._constants import REGISTRY_KEYS, RESULT_KEYS
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data._block_loader import BlockLoader
from scvi_sams.data._field import registered_perturbations
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.model._cells import (
    batch_code,
    importance_weighted_bounds,
    negative_log_terms,
    positions_of_genes,
    rows_of_all_cells,
)
from scvi_sams.model._screen_model import ScreenModel
from scvi_sams.module._minibatch import positions_in, sum_over_slots
from scvi_sams.module._networks import draw_particles
from scvi_sams.module._perturbation_module import CellBatch, LatentShiftModule

_LATENT_KEYS = {"basal": RESULT_KEYS.LATENT, "perturbed": RESULT_KEYS.LATENT_PERTURBED}


class CellModel(ScreenModel):
    """A model that reads cells: their latent states, expression and likelihood."""

    # Reading cells ------------------------------------------------------------------------------

    def _perturbations_of(self, adata: AnnData, indices: np.ndarray) -> torch.Tensor:
        """Perturbations that some cells carry, ascending, on the module's device."""
        manager = self.get_anndata_manager(adata, required=True)
        codes = registered_perturbations(manager)[0][indices]
        return torch.as_tensor(np.unique(codes[codes >= 0]), device=self.module.device)

    @staticmethod
    def _indices(adata: AnnData, indices: Sequence[int] | Sequence[bool] | None) -> np.ndarray:
        if indices is None:
            return np.arange(adata.n_obs)
        return as_positions("indices", indices, adata.n_obs)

    def _batches(
        self, adata: AnnData, indices: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield positions within ``indices``, and the tensors of cells on the module's device.

        Cells are read in ascending order, which needs the fewest accesses where they are on disk;
        the positions say where each result belongs.
        """
        if batch_size is None:
            batch_size = settings.batch_size
        check_integer(batch_size=batch_size)
        order = np.argsort(indices, kind="stable")
        manager = self.get_anndata_manager(adata, required=True)
        if is_on_disk(manager.get_from_registry(REGISTRY_KEYS.X)):
            loader = BlockLoader(manager, indices[order], batch_size)
        else:
            loader = self._make_data_loader(adata, indices=indices[order], batch_size=batch_size)
        start = 0
        for tensors in loader:
            n_cells = len(tensors[REGISTRY_KEYS.X])
            device = self.module.device
            yield (
                order[start : start + n_cells],
                {key: value.to(device) for key, value in tensors.items()},
            )
            start += n_cells

    def _cells(
        self, adata: AnnData, indices: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, CellBatch]]:
        """Yield positions within ``indices``, and the cells as the module reads them."""
        for place, tensors in self._batches(adata, indices, batch_size):
            yield place, self.module.read_batch(tensors)

    def _encoded(
        self,
        adata: AnnData,
        indices: np.ndarray,
        batch_size: int | None,
        rows: torch.Tensor,
        shifts: torch.Tensor,
    ) -> Iterator[tuple[np.ndarray, CellBatch, torch.Tensor, Normal]]:
        """Yield positions, cells, the shift of each, and the posterior of its basal state.

        ``shifts`` are those of the perturbations ``rows``, ``(P, R, S)``.
        """
        for place, cells in self._cells(adata, indices, batch_size):
            shift = sum_over_slots(shifts, positions_in(rows, cells.codes), cells.doses)
            yield place, cells, shift, self.module.encode(cells.x, shift, cells.covariates)

    # Latent states ------------------------------------------------------------------------------

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
            ``"basal"``: what the cell would be without its perturbations (``z_basal``).
            ``"perturbed"``: the state it is in (``z``: basal plus the effects it received).
        give_mean
            The posterior mean, with the perturbations' shifts at their posterior mean; otherwise
            draws from the posterior.
        mean_shifts
            Draw basal states only, and keep the perturbations' shifts at their posterior mean: what
            the model is unsure of in an effect is then in no draw. Only with ``give_mean=False``.
        n_samples
            Number of draws; more than one adds a first axis. Only with ``give_mean=False``.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``.
        key_added
            Key of ``adata.obsm`` that the result is written to: by default ``"X_sams"`` (basal) or
            ``"X_sams_perturbed"``; ``None`` writes nothing. Several draws are never written.

        Returns
        -------
        Array of shape ``(n_cells, n_latent)``, or ``(n_samples, n_cells, n_latent)``, in units of
        the prior's standard deviation. In obsm, cells that were not asked for are NaN.

        Raises
        ------
        SAMSError
            If the perturbed state is asked of a model that has none (``ConditionalVAE``), or an
            argument is of the wrong type or out of range.

        Examples
        --------
        >>> model.get_latent_representation().shape
        (860, 6)
        >>> adata.obsm["X_sams"].shape
        (860, 6)

        Control cells have no effects, so that both states are the same:

        >>> perturbed = model.get_latent_representation(representation="perturbed")
        >>> controls = adata.obs["perturbation"] == "control"
        >>> np.allclose(perturbed[controls], adata.obsm["X_sams"][controls])
        True
        """
        check_choice("representation", representation, ("basal", "perturbed"))
        check_integer(n_samples=n_samples)
        if representation == "perturbed" and not isinstance(self.module, LatentShiftModule):
            raise SAMSError(
                f"{type(self).__name__} has no perturbed state: perturbations act on its networks, "
                "not on the latent state. Use representation='basal'."
            )
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._indices(adata, indices)
        n_draws = 1 if give_mean else n_samples
        states = np.empty((n_draws, len(positions), self.module.n_latent), dtype=np.float32)
        rows = self._perturbations_of(adata, positions)
        if give_mean or mean_shifts:
            shifts = self.module.shift_moments(rows)[0][None]
        else:
            shifts = self.module.global_posterior(rows, n_draws).shifts
        for place, _, shift, qz in self._encoded(adata, positions, batch_size, rows, shifts):
            z_basal = qz.loc if give_mean else draw_particles(qz, n_draws)
            z = z_basal if representation == "basal" else z_basal + shift
            states[:, place] = z.cpu().numpy()
        result = states if n_draws > 1 else states[0]
        if key_added is not None and n_draws == 1:
            key = _LATENT_KEYS[representation] if key_added == "default" else key_added
            adata.obsm[key] = rows_of_all_cells(result, positions, adata.n_obs)
            self.keep_provenance(adata, key)
        return result

    # Expression ---------------------------------------------------------------------------------

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
        """Return expected expression of cells at their posterior, normalised for size.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        transform_batch
            Decode every cell as if it were of this batch; ``None`` keeps its own.
        gene_list
            Genes; ``None`` for all.
        library_size
            What the result is scaled to: 1 gives shares of the library (or counts per unit of the
            size factor). A normal likelihood is not scaled.
        n_samples
            Draws from the posterior.
        return_mean
            Average over draws; otherwise draws are the first axis.
        return_numpy
            Return an array rather than a DataFrame (always so for several draws).
        key_added
            Layer of ``adata`` that the mean is written to, for all genes. By default none: a dense
            cells x genes matrix may be larger than the data.

        Returns
        -------
        Cells x genes, or draws x cells x genes.

        Raises
        ------
        InvalidArgumentError
            If an argument is of the wrong type or out of range.
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
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._indices(adata, indices)
        genes = positions_of_genes(gene_list, self.get_var_names())
        n_kept = 1 if return_mean else n_samples
        values = np.empty((n_kept, len(positions), len(genes)), dtype=np.float32)
        rows = self._perturbations_of(adata, positions)
        shifts = self.module.global_posterior(rows, n_samples).shifts
        batch = None if transform_batch is None else batch_code(transform_batch, self.adata_manager)
        scale = library_size if self.module.likelihood.is_count_likelihood else 1.0
        for place, cells, shift, qz in self._encoded(adata, positions, batch_size, rows, shifts):
            covariates = self.module.covariates.in_batch(cells.covariates, batch)
            logits = self.module.decode(draw_particles(qz, n_samples), shift, covariates)
            rate = scale * self.module.likelihood.rate(logits)[..., genes]
            values[:, place] = (rate.mean(0, keepdim=True) if return_mean else rate).cpu().numpy()
        if key_added is not None and return_mean and gene_list is None:
            adata.layers[key_added] = rows_of_all_cells(values[0], positions, adata.n_obs)
            self.keep_provenance(adata, key_added)
        if n_kept > 1:
            return values
        if return_numpy:
            return values[0]
        return pd.DataFrame(
            values[0], index=adata.obs_names[positions], columns=adata.var_names[genes]
        )

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
        """Draw expression of cells anew from the posterior predictive distribution.

        Parameters
        ----------
        adata, indices, gene_list, batch_size
            As in :meth:`get_normalized_expression`.
        n_samples
            Draws per cell.

        Returns
        -------
        ``(n_cells, n_genes)``, or ``(n_cells, n_genes, n_samples)`` for several draws; counts at
        each cell's own size, or values of a normal likelihood.

        Raises
        ------
        InvalidArgumentError
            If an argument is of the wrong type or out of range.
        MissingKeyError
            If a gene is unknown.

        Examples
        --------
        >>> model.posterior_predictive_sample(indices=[0, 1, 2], n_samples=5).shape
        (3, 100, 5)
        """
        check_integer(n_samples=n_samples)
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._indices(adata, indices)
        genes = positions_of_genes(gene_list, self.get_var_names())
        drawn = np.empty((len(positions), len(genes), n_samples), dtype=np.float32)
        for place, tensors in self._batches(adata, positions, batch_size):
            sample = self.module.sample(tensors, n_samples)[..., genes]
            drawn[place] = sample.permute(1, 2, 0).cpu().numpy()
        return drawn[..., 0] if n_samples == 1 else drawn

    # Likelihood ---------------------------------------------------------------------------------

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

        Each cell pays its share 1 / N_t of the divergences of masks and effects, N_t being the
        number of training cells, whichever cells are scored.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        n_samples
            Draws from the posterior.
        return_mean
            Return the mean over cells; otherwise a value per cell, shape ``(n_cells,)``.
        key_added
            Column of ``adata.obs`` that values per cell are written to; ``None`` writes nothing.

        Raises
        ------
        InvalidArgumentError
            If an argument is of the wrong type or out of range.

        Examples
        --------
        >>> held_out = model.validation_indices
        >>> elbo = model.get_elbo(indices=held_out)
        >>> model.get_elbo(indices=held_out, return_mean=False).shape == held_out.shape
        True
        """
        check_integer(n_samples=n_samples)
        adata, positions = self._scored_cells(adata, indices)
        scores = negative_log_terms(self, adata, positions, batch_size, n_samples)
        return self._report(-scores.sum(axis=0), adata, positions, return_mean, key_added)

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
        check_integer(n_samples=n_samples)
        adata, positions = self._scored_cells(adata, indices)
        scores = negative_log_terms(self, adata, positions, batch_size, n_samples)
        return self._report(scores[0], adata, positions, return_mean, key_added)

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
        """Return the predictive importance-weighted bound of cells, the paper's headline figure.

        Masks and effects are drawn ``n_samples`` times once for all cells, then for each cell::

            logsumexp_s [log p(x | z_s) + log p(z_s) - log q(z_s | x, .)] - log(n_samples)

        The global variables are not scored: the bound is on the likelihood of held-out cells given
        what was learned. Higher is better; it rises with ``n_samples``, so compare at equal ones.

        Parameters
        ----------
        adata, indices, batch_size, return_mean, key_added
            As in :meth:`get_elbo`. Score cells that were not trained on
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
        check_integer(n_samples=n_samples)
        adata, positions = self._scored_cells(adata, indices)
        bounds = importance_weighted_bounds(self, adata, positions, batch_size, n_samples)
        return self._report(bounds, adata, positions, return_mean, key_added)

    def _scored_cells(
        self, adata: AnnData | None, indices: Sequence[int] | None
    ) -> tuple[AnnData, np.ndarray]:
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._indices(adata, indices)
        if not len(positions):
            raise InvalidArgumentError(
                "There are no cells to score: `indices` or `adata` is empty."
            )
        return adata, positions

    def _report(
        self,
        values: np.ndarray,
        adata: AnnData,
        positions: np.ndarray,
        return_mean: bool,
        key_added: str | None,
    ) -> float | np.ndarray:
        if key_added is not None:
            adata.obs[key_added] = rows_of_all_cells(values, positions, adata.n_obs)
            self.keep_provenance(adata, key_added)
        return float(values.mean()) if return_mean else values
