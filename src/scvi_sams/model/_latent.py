"""Latent states of cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from anndata import AnnData

from scvi_sams._checks import check_choice, check_integer
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._base import BasePerturbationModel, rows_of_all_cells
from scvi_sams.module._latent_shift_module import LatentShiftModule
from scvi_sams.module._normals import draw_particles
from scvi_sams.module._slots import positions_in, sum_over_slots


class LatentMixin(BasePerturbationModel):
    """Adds :meth:`get_latent_representation`."""

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
        for place, cells in self._cells(adata, positions, batch_size):
            shift = sum_over_slots(shifts, positions_in(rows, cells.codes), cells.doses)
            qz = self.module.encode(cells.x, shift, cells.covariates)
            z_basal = qz.loc if give_mean else draw_particles(qz, n_draws)
            z = z_basal if representation == "basal" else z_basal + shift
            states[:, place] = z.cpu().numpy()
        result = states if n_draws > 1 else states[0]
        if key_added is not None and n_draws == 1:
            default = (
                RESULT_KEYS.LATENT if representation == "basal" else RESULT_KEYS.LATENT_PERTURBED
            )
            key = default if key_added == "default" else key_added
            adata.obsm[key] = rows_of_all_cells(result, positions, adata.n_obs)
            self.keep_provenance(adata, key)
        return result
