"""Latent mechanisms: effects, masks, and gene programs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_names, check_choice, check_integer, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._contexts import chances_of_effects, codes_of, moments_of_perturbations
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._program_slopes import summed_slopes

_SUBSET_SEED = 4021

ProgramScale = Literal["lograte", "mean"]


class Effects(NamedTuple):
    """Posterior moments of the effects, perturbations x latent dimensions."""

    mean: pd.DataFrame
    sd: pd.DataFrame


class LatentShiftMixin(PerturbationModel):
    """Models in which a perturbation shifts the latent state: effects and gene programs."""

    @torch.inference_mode()
    def get_perturbation_effects(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        context: str | None = None,
        key_added: str | None = RESULT_KEYS.EFFECTS,
    ) -> Effects:
        """Return the effect of each perturbation on each latent dimension, per unit dose.

        Parameters
        ----------
        perturbations
            Names, including unmeasured perturbations with features, whose effects are the prior
            given these. ``None``: all measured perturbations.
        context
            If contexts are registered: the effects in one of them; ``None``: the average over those
            in which the perturbation was measured, weighted by training cells.
        key_added
            Key of ``adata.uns`` of the training data to which ``{"mean": ..., "sd": ...}`` is
            written; ``None`` writes nothing.

        Returns
        -------
        Posterior mean and SD of the effect (with masks, of the masked effect ``m_tl * e_tl``), each
        perturbations x latent dimensions, in units of the SD of basal states. If effects depend on
        the mask these are averages over 500 samples, the same in each call.

        Examples
        --------
        >>> effects = model.get_perturbation_effects()
        >>> effects.mean.shape, effects.sd.shape
        ((8, 6), (8, 6))
        >>> sorted(adata.uns["sams_effects"])
        ['mean', 'sd']
        """
        check_key(key_added=key_added)
        self._check_if_trained(warn=True)
        moments = moments_of_perturbations(self, codes_of(self, perturbations), context)
        effects = Effects(*(_mechanism_table(self, perturbations, part) for part in moments))
        if key_added is not None and self.adata is not None:
            self.adata.uns[key_added] = {name: e.copy() for name, e in effects._asdict().items()}
            self.keep_provenance(self.adata, key_added)
        return effects

    def get_latent_programs(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        *,
        method: ProgramScale = "lograte",
        target_sum: float = 1e4,
        n_cells: int | None = 2000,
        batch_size: int | None = None,
        key_added: str | None = RESULT_KEYS.PROGRAMS,
    ) -> pd.DataFrame:
        """Return the gene program of every latent dimension.

        The derivative of expected expression at the state of each cell (basal state plus effects
        at their posterior means, with the cell's own covariates), averaged over cells. A derivative
        needs no step size and does not depend on the sign of a dimension. It ranks genes as a step
        of one unit does (on the screen of Papalexi et al. 2021 the two correlate at 0.997 or more),
        but effects may be several units, over which the decoder is curved: three units of that
        screen's interferon dimension changed PSMB9 by 1.7 times the change given by its program.
        For effects of perturbations on genes use :meth:`predict_ate`.

        Parameters
        ----------
        adata, indices, batch_size
            Cells to average over, as in :meth:`get_latent_representation`.
        method
            ``"lograte"``: derivative of log2(1 + target_sum * rate). ``"mean"``: of
            target_sum * rate. For a normal likelihood both are the derivative of its mean.
        target_sum
            Total to which expression is normalised.
        n_cells
            Largest number of cells to use, sampled at random, the same in every call; ``None``
            for all of them.
        key_added
            Key of ``adata.varm`` to which the table is written; ``None`` writes nothing.

        Returns
        -------
        Genes x latent dimensions: change of expression (log2 units) per unit of the latent
        dimension, which is the SD of basal states. Zero for dimensions that are switched off.

        Raises
        ------
        SAMSError
            If there are no cells to average over.

        Examples
        --------
        >>> programs = model.get_latent_programs()
        >>> programs.shape, programs.index[0], programs.columns[0]
        ((100, 6), 'gene_0001', 'latent_0')
        >>> adata.varm["sams_programs"].equals(programs)
        True
        """
        check_choice("method", method, get_args(ProgramScale))
        check_number(above=0, target_sum=target_sum)
        check_key(key_added=key_added)
        if n_cells is not None:
            check_integer(n_cells=n_cells)
        cells = self._read(adata, indices, batch_size)
        if not len(cells):
            raise SAMSError("There are no cells to average over: `indices` is empty.")
        if n_cells is not None and n_cells < len(cells):
            rng = np.random.default_rng(_SUBSET_SEED)
            cells.positions = rng.choice(cells.positions, n_cells, replace=False)
        with torch.no_grad(), warnings.catch_warnings():
            # A warning of torch itself, when forward mode is used for the first time.
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
            slopes = summed_slopes(cells, method, target_sum)
        programs = pd.DataFrame(
            (slopes / len(cells)).T.float().cpu().numpy(),
            index=cells.adata.var_names,
            columns=[f"latent_{dimension}" for dimension in range(len(slopes))],
        )
        if key_added is not None:
            cells.adata.varm[key_added] = programs.copy()
            self.keep_provenance(cells.adata, key_added)
        return programs


class MaskMixin(PerturbationModel):
    """Models with a mask that selects the latent dimensions that a perturbation shifts."""

    @torch.inference_mode()
    def get_perturbation_masks(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        context: str | None = None,
        key_added: str | None = RESULT_KEYS.MASKS,
    ) -> pd.DataFrame:
        """Return the probability that each perturbation shifts each latent dimension.

        Parameters
        ----------
        perturbations
            As in :meth:`get_perturbation_effects`.
        context
            If contexts are registered: the probability that the perturbation shifts the dimension
            in one of them; ``None``: the largest over those in which it was measured.
        key_added
            Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
            nothing.

        Returns
        -------
        Perturbations x latent dimensions: posterior probability that the perturbation shifts the
        dimension, q(m_tl = 1) (paper, section 3). Dimensions are ordered by the strength of their
        effects, which is a convention: to match those of several runs use
        :func:`scvi_sams.evaluation.mask_stability`. To call entries use
        :func:`scvi_sams.tl.called_masks`, which also uses a test on the cells.

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
        check_key(key_added=key_added)
        self._check_if_trained(warn=True)
        chances = chances_of_effects(self, codes_of(self, perturbations), context)
        masks = _mechanism_table(self, perturbations, chances)
        if key_added is not None and self.adata is not None:
            self.adata.uns[key_added] = masks.copy()
            self.keep_provenance(self.adata, key_added)
        return masks


def _mechanism_table(
    model: PerturbationModel, perturbations: Sequence[str] | None, values: torch.Tensor
) -> pd.DataFrame:
    names = model.perturbations
    if perturbations is not None:
        names = as_names("perturbations", perturbations)
    return pd.DataFrame(
        values.cpu().numpy(),
        index=pd.Index(names, name="perturbation"),
        columns=[f"latent_{dimension}" for dimension in range(values.shape[1])],
    )
