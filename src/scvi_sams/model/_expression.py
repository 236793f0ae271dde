"""Expression as the model sees it: denoised, or drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_names, check_integer, check_number
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.exceptions import MissingKeyError
from scvi_sams.model._base import BasePerturbationModel, rows_of_all_cells
from scvi_sams.module._normals import draw_particles
from scvi_sams.module._slots import positions_in, sum_over_slots


class ExpressionMixin(BasePerturbationModel):
    """Adds normalised expression and posterior predictive samples."""

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
        adata, indices
            Data and cells; ``None`` for all training data.
        transform_batch
            Decode every cell as if it were of this batch; ``None`` keeps its own.
        gene_list
            Genes; ``None`` for all.
        library_size
            What the result is scaled to: 1 gives shares of the library (or counts per unit of the
            size factor). A normal likelihood is not scaled.
        n_samples
            Draws from the posterior.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``.
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
        genes = self._gene_positions(gene_list)
        n_kept = 1 if return_mean else n_samples
        values = np.empty((n_kept, len(positions), len(genes)), dtype=np.float32)
        rows = self._perturbations_of(adata, positions)
        shifts = self.module.global_posterior(rows, n_samples).shifts
        batch = None if transform_batch is None else self._batch_code(transform_batch)
        scale = library_size if self.module.likelihood.is_count_likelihood else 1.0
        for place, tensors in self._batches(adata, positions, batch_size):
            cells = self.module.read_batch(tensors)
            shift = sum_over_slots(shifts, positions_in(rows, cells.codes), cells.doses)
            qz = self.module.encode(cells.x, shift, cells.covariates)
            covariates = cells.covariates
            if batch is not None:
                tensors[REGISTRY_KEYS.BATCH] = torch.full_like(tensors[REGISTRY_KEYS.BATCH], batch)
                covariates = self.module.read_batch(tensors).covariates
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
        genes = self._gene_positions(gene_list)
        drawn = np.empty((len(positions), len(genes), n_samples), dtype=np.float32)
        for place, tensors in self._batches(adata, positions, batch_size):
            sample = self.module.sample(tensors, n_samples)[..., genes]
            drawn[place] = sample.permute(1, 2, 0).cpu().numpy()
        return drawn[..., 0] if n_samples == 1 else drawn

    def _gene_positions(self, gene_list: Sequence[str] | None) -> np.ndarray:
        genes = pd.Index(self.get_var_names())
        if gene_list is None:
            return np.arange(len(genes))
        asked = as_names("gene_list", gene_list)
        found = genes.get_indexer(pd.Index(asked, dtype=object))
        if (found < 0).any():
            unknown = [gene for gene, place in zip(asked, found, strict=True) if place < 0]
            raise MissingKeyError(
                f"Genes {unknown[:5]} are not among those of the model, such as {list(genes[:3])}."
            )
        return found

    def _batch_code(self, batch: str) -> int:
        mapping = self.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH)["categorical_mapping"]
        matches = np.flatnonzero(np.asarray(mapping) == batch)
        if not len(matches):
            raise MissingKeyError(f"Batch {batch!r} is not one of {list(mapping)}.")
        return int(matches[0])
