"""What latent dimensions do to genes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import check_choice, check_integer, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._arms import expected_expression
from scvi_sams.model._base import BasePerturbationModel
from scvi_sams.module._slots import positions_in, sum_over_slots

_SUBSET_SEED = 4021


class ProgramsMixin(BasePerturbationModel):
    """Adds :meth:`get_latent_programs` to models in which perturbations are latent shifts."""

    def get_latent_programs(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        *,
        method: Literal["lograte", "mean"] = "lograte",
        target_sum: float = 1e4,
        n_cells: int | None = 2000,
        batch_size: int | None = None,
        key_added: str | None = RESULT_KEYS.PROGRAMS,
    ) -> pd.DataFrame:
        """Return the gene program of every latent dimension.

        The derivative of expected expression, in the state that each cell is in (basal state plus
        effects at their posterior means, with the cell's own covariates), averaged over cells. A
        derivative needs no step size and does not depend on where the sign of a dimension points.
        It ranks genes as a step of one unit does (on the screen of Papalexi et al. 2021 the two
        correlate at .997 or more), but effects may be of several units, over which the decoder
        bends: three units of that screen's interferon dimension changed PSMB9 by 1.7 times what its
        program says. For what a perturbation does to genes ask :meth:`predict_ate`.

        Parameters
        ----------
        adata
            Registered data, or other data with the same genes; ``None`` for the training data.
        indices
            Cells to average over; ``None`` for all.
        method
            ``"lograte"``: of log2(1 + target_sum * rate). ``"mean"``: of target_sum * rate. A
            normal likelihood has the derivative of its mean for either.
        target_sum
            Total to which expression is normalised.
        n_cells
            At most so many of the cells are used, drawn at random, the same in every call; ``None``
            for all of them.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``.
        key_added
            Key of ``adata.varm`` that the table is written to; ``None`` writes nothing.

        Returns
        -------
        Genes x latent dimensions: change of expression (log2 units) per unit of the latent
        dimension, which is the standard deviation of basal states. Zero for dimensions that are
        switched off.

        Raises
        ------
        SAMSError
            If there are no cells to average over, or an argument is of the wrong type or out of
            range.

        Examples
        --------
        >>> programs = model.get_latent_programs()
        >>> programs.shape, programs.index[0], programs.columns[0]
        ((100, 6), 'gene_0001', 'latent_0')
        >>> adata.varm["sams_programs"].equals(programs)
        True
        """
        check_choice("method", method, ("lograte", "mean"))
        check_number(above=0, target_sum=target_sum)
        if n_cells is not None:
            check_integer(n_cells=n_cells)
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        positions = self._indices(adata, indices)
        if not len(positions):
            raise SAMSError("There are no cells to average over: `indices` is empty.")
        if n_cells is not None and n_cells < len(positions):
            rng = np.random.default_rng(_SUBSET_SEED)
            positions = rng.choice(positions, n_cells, replace=False)
        with torch.no_grad(), warnings.catch_warnings():
            # Of torch's own doing, where forward mode is used for the first time.
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
            slopes = self._summed_slopes(adata, positions, method, target_sum, batch_size)
        programs = pd.DataFrame(
            (slopes / len(positions)).T.float().cpu().numpy(),
            index=adata.var_names,
            columns=[f"latent_{dimension}" for dimension in range(len(slopes))],
        )
        if key_added is not None:
            adata.varm[key_added] = programs.copy()
            self.keep_provenance(adata, key_added)
        return programs

    def _summed_slopes(
        self,
        adata: AnnData,
        positions: np.ndarray,
        method: Literal["lograte", "mean"],
        target_sum: float,
        batch_size: int | None,
    ) -> torch.Tensor:
        """Sum over cells of the derivatives, ``(n_latent, n_genes)``, one direction at a time.

        In forward mode: there are fewer latent dimensions than genes, and no more than cells x
        genes is held in memory.
        """
        module = self.module
        rows = self._perturbations_of(adata, positions)
        shifts = self.module.shift_moments(rows)[0][None]
        # In double precision, so that the order of cells plays no part.
        total = torch.zeros(
            module.n_latent, adata.n_vars, dtype=torch.float64, device=module.device
        )
        for _, cells in self._cells(adata, positions, batch_size):
            shift = sum_over_slots(shifts, positions_in(rows, cells.codes), cells.doses)
            z_basal = module.encode(cells.x, shift, cells.covariates).loc

            def expression(
                z: torch.Tensor,
                shift: torch.Tensor = shift,
                covariates: torch.Tensor | None = cells.covariates,
            ) -> torch.Tensor:
                logits = module.decode(z, shift, covariates)
                return expected_expression(module.likelihood, logits, method, target_sum)

            for dimension in range(module.n_latent):
                direction = torch.zeros_like(z_basal)
                direction[..., dimension] = 1
                slope = torch.func.jvp(expression, (z_basal,), (direction,))[1]
                total[dimension] += slope.sum(dim=(0, 1))
        return total
