"""How well the model explains cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from anndata import AnnData

from scvi_sams._checks import check_integer
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.model._base import BasePerturbationModel, rows_of_all_cells
from scvi_sams.module._slots import positions_in, sum_over_slots

_MAX_ELEMENTS = 2**23
"""Numbers in the largest array (particles x cells x genes) of a step: 32 MB in float32."""


class LikelihoodMixin(BasePerturbationModel):
    """Adds ELBO, reconstruction error and the importance-weighted bound, in nats per cell."""

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
        adata
            Registered data, or other data with the same genes; ``None`` for the training data.
        indices
            Cells; ``None`` for all.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``.
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
        scores, adata, positions = self._negative_log_terms(adata, indices, batch_size, n_samples)
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
        scores, adata, positions = self._negative_log_terms(adata, indices, batch_size, n_samples)
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

        Raises
        ------
        InvalidArgumentError
            If an argument is of the wrong type or out of range.

        Examples
        --------
        More samples make the bound tighter:

        >>> held_out = model.validation_indices
        >>> loose, tight = (model.get_iwelbo(indices=held_out, n_samples=n) for n in (1, 50))
        >>> loose < tight
        True
        """
        check_integer(n_samples=n_samples)
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._scored_cells(adata, indices)
        rows = self._perturbations_of(adata, positions)
        batch_size = 128 if batch_size is None else batch_size
        check_integer(batch_size=batch_size)
        n_chunk = max(1, min(n_samples, _MAX_ELEMENTS // (batch_size * adata.n_vars)))
        chunks = [min(n_chunk, n_samples - start) for start in range(0, n_samples, n_chunk)]
        shifts = [self.module.global_posterior(rows, size).shifts for size in chunks]
        bound = np.empty(len(positions), dtype=np.float64)
        for place, cells in self._cells(adata, positions, batch_size):
            slots = positions_in(rows, cells.codes)
            weights = torch.cat(
                [
                    self.module.log_importance_weights(
                        cells, sum_over_slots(table, slots, cells.doses), size
                    )
                    for table, size in zip(shifts, chunks, strict=True)
                ]
            )
            bound[place] = (torch.logsumexp(weights, 0) - math.log(n_samples)).cpu().numpy()
        return self._report(bound, adata, positions, return_mean, key_added)

    def _negative_log_terms(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        n_samples: int,
    ) -> tuple[np.ndarray, AnnData, np.ndarray]:
        """Reconstruction error and divergences per cell, ``(2, n_cells)``."""
        check_integer(n_samples=n_samples)
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._scored_cells(adata, indices)
        terms = np.empty((2, len(positions)), dtype=np.float64)
        for place, tensors in self._batches(adata, positions, batch_size):
            _, _, output = self.module(tensors, inference_kwargs={"n_particles": n_samples})
            terms[0, place] = output.reconstruction_loss["reconstruction_loss"].cpu().numpy()
            terms[1, place] = sum(output.kl_local.values()).cpu().numpy()
        return terms, adata, positions

    def _scored_cells(self, adata: AnnData, indices: Sequence[int] | None) -> np.ndarray:
        positions = self._indices(adata, indices)
        if not len(positions):
            raise InvalidArgumentError(
                "There are no cells to score: `indices` or `adata` is empty."
            )
        return positions

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
