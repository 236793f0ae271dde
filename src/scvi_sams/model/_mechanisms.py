"""What the model learned about perturbations: masks and effects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from scvi_sams._constants import RESULT_KEYS
from scvi_sams.model._base import BasePerturbationModel


class Effects(NamedTuple):
    """Posterior moments of the effects, perturbations x latent dimensions."""

    mean: pd.DataFrame
    sd: pd.DataFrame


class EffectsMixin(BasePerturbationModel):
    """Adds the effects of perturbations to models in which they are latent shifts."""

    @torch.inference_mode()
    def get_perturbation_effects(self, *, key_added: str | None = RESULT_KEYS.EFFECTS) -> Effects:
        """Return by how much each perturbation moves each latent dimension, per unit dose.

        Parameters
        ----------
        key_added
            Key of ``adata.uns`` of the training data that ``{"mean": ..., "sd": ...}`` is written
            to; ``None`` writes nothing.

        Returns
        -------
        Posterior mean and standard deviation of the effect (where there are masks, of the masked
        effect ``m_tl * e_tl``), each perturbations x latent dimensions, in units of the standard
        deviation of basal states. For effects that depend on the mask these are averages over 500
        draws, the same in each call.

        Examples
        --------
        >>> effects = model.get_perturbation_effects()
        >>> effects.mean.shape, effects.sd.shape
        ((8, 6), (8, 6))
        >>> sorted(adata.uns["sams_effects"])
        ['mean', 'sd']
        """
        self._check_if_trained(warn=True)
        rows = torch.arange(len(self.perturbations), device=self.module.device)
        mean, sd = self.module.shift_moments(rows)
        effects = Effects(
            self._mechanism_table(mean.cpu().numpy()), self._mechanism_table(sd.cpu().numpy())
        )
        if key_added is not None and self.adata is not None:
            self.adata.uns[key_added] = {name: e.copy() for name, e in effects._asdict().items()}
            self.keep_provenance(self.adata, key_added)
        return effects

    def _mechanism_table(self, values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(
            values,
            index=pd.Index(self.perturbations, name="perturbation"),
            columns=[f"latent_{dimension}" for dimension in range(values.shape[1])],
        )


class MasksMixin(EffectsMixin):
    """Adds masks to models that have them."""

    @torch.inference_mode()
    def get_perturbation_masks(self, *, key_added: str | None = RESULT_KEYS.MASKS) -> pd.DataFrame:
        """Return which latent dimensions each perturbation moves.

        Parameters
        ----------
        key_added
            Key of ``adata.uns`` of the training data that the table is written to; ``None``
            writes nothing.

        Returns
        -------
        Perturbations x latent dimensions: posterior probability that the perturbation moves the
        dimension, q(m_tl = 1) (paper, section 3). Dimensions are ordered by the strength of their
        effects, which is a convention: match those of several runs with
        :func:`scvi_sams.evaluation.mask_stability`, and call entries active with
        :func:`scvi_sams.evaluation.active_at_fdr`.

        Examples
        --------
        >>> masks = model.get_perturbation_masks()
        >>> masks.index.tolist()[:3], masks.columns.tolist()[:3]
        (['P001', 'P002', 'P003'], ['latent_0', 'latent_1', 'latent_2'])
        >>> bool(masks.min().min() >= 0) and bool(masks.max().max() <= 1)
        True
        >>> "sams_masks" in adata.uns
        True
        """
        self._check_if_trained(warn=True)
        probability = self.module.masks.inclusion_probability.cpu().numpy()
        masks = self._mechanism_table(probability)
        if key_added is not None and self.adata is not None:
            self.adata.uns[key_added] = masks.copy()
            self.keep_provenance(self.adata, key_added)
        return masks
