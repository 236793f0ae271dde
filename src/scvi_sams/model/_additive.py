"""Additive quantities: direct effects on genes, unmeasured pairs, and doses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_names, check_choice, check_integer, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidDosageError, UnknownPerturbationError
from scvi_sams.labels._rows import label_rows
from scvi_sams.model._average_effects import effects_of_labels, keep_effects
from scvi_sams.model._basal_states import Basal
from scvi_sams.model._contrast import EffectScale, rate_scale
from scvi_sams.model._counterfactual import encode_requested, make_contrast
from scvi_sams.model._direct_effects import (
    DirectEffectTables,
    direct_effect_tables,
    switch_stacking,
)
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._ranking import rows_of, unseen_pairs


class AdditiveMixin(PerturbationModel):
    """Models in which perturbations and doses add up, so that any combination can be predicted.

    Direct effects on single genes add up as well.
    """

    _additive: ClassVar[bool] = True

    @torch.inference_mode()
    def get_direct_effects(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        key_added: str | None = RESULT_KEYS.DIRECT_EFFECTS,
    ) -> DirectEffectTables:
        """Return direct effects of perturbations on single genes, in addition to latent shifts.

        Most are zero. The strongest is usually on the gene that a perturbation targets (see
        :ref:`direct effects <direct-effects>`).

        Parameters
        ----------
        perturbations
            Names; ``None`` for all perturbations. Name some if the screen is large: the model
            stores at most 20 million entries, but these tables contain all genes.
        key_added
            Key of ``adata.uns`` of the training data to which the tables are written, as a dict of
            arrays with the names ``"perturbations"`` and ``"genes"`` and ``"units"``; ``None``
            writes nothing.

        Returns
        -------
        ``mean`` and ``sd`` of the posterior, and ``lfsr``, the local false sign rate: the
        probability that the effect is zero or has the opposite sign of its mean. Each perturbations
        x genes. The mean is 0 if that rate is 0.05 or more. Mean and SD are changes of the natural
        logarithm of the rate per unit dose (before the softmax, if no size factor is registered),
        or of the mean, in units of the data, for a normal likelihood. If the model has no direct
        effect, for example for perturbations without training cells, mean and SD are 0 and the rate
        is 1.

        Raises
        ------
        UnknownPerturbationError
            If a name is not one of the model's perturbations.
        SAMSError
            If the model was made with ``direct_effects=False``, or trained with a version without
            direct effects.

        Notes
        -----
        The posterior under a scale mixture of normals with a point mass at zero (adaptive
        shrinkage; Stephens 2017, doi:10.1093/biostatistics/kxw041).

        Examples
        --------
        >>> direct = model.get_direct_effects(["P001", "P002"])
        >>> direct.mean.shape
        (2, 100)
        >>> bool((direct.lfsr.to_numpy() <= 1).all())
        True
        >>> sorted(adata.uns["sams_direct_effects"])
        ['genes', 'lfsr', 'mean', 'perturbations', 'sd', 'units']
        """
        return direct_effect_tables(self, perturbations, key_added)

    @property
    def stacking(self) -> dict[str, float] | None:
        """Weights of stacked predictions of means; set to ``False`` to use the model alone.

        ``"model"`` is the model with its direct effects; ``"entrywise"`` and ``"rowwise"`` are the
        effects observed in training cells, shrunken gene by gene and as a whole (see
        :ref:`stacking <stacking>`). ``None`` before training, and while stacking is off.
        ``model.stacking = False`` turns it off for all further predictions, ``True`` turns it on
        again; :meth:`save` stores this setting.

        Raises
        ------
        SAMSError
            If it is turned on in a model that was made with ``stacking=False``, or trained with a
            version without stacking.

        Examples
        --------
        >>> weights = model.stacking
        >>> list(weights), round(sum(weights.values()), 3)
        (['model', 'entrywise', 'rowwise'], 1.0)
        >>> model.stacking = False
        >>> model.predict_ate(["P001"], n_samples=200).uns["ate"]["stacking"]
        'none'
        >>> model.stacking = True
        """
        return None if self.module.direct is None else self.module.direct.stacking

    @stacking.setter
    def stacking(self, is_on: bool) -> None:
        switch_stacking(self, is_on)

    @torch.inference_mode()
    def rank_unseen_pairs(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        by: Literal["effect", "interaction"] = "effect",
        method: EffectScale = "lograte",
        n_samples: int = 200,
        n_posterior_samples: int = 20,
        basal: Basal | None = None,
        library_size: float | None = None,
        target_sum: float = 1e4,
        interval: float = 0.9,
    ) -> pd.DataFrame:
        """Rank all unmeasured pairs: which to screen next.

        The number of pairs grows with the square of the number of perturbations; memory does not.

        Parameters
        ----------
        perturbations
            Pairs of these; ``None`` for all. Name the hits to reduce the number of pairs.
        by
            ``"effect"``: by the norm of the predicted effect. ``"interaction"``: by the absolute
            score, the deviation of the effect from additivity.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_interactions`, with fewer samples: ranks need less precision.

        Returns
        -------
        One row per pair without training cells with exactly these two (a pair within a larger
        combination counts as unmeasured), best first: ``first``, ``second``, ``combination``,
        ``effect_norm``, ``score`` with ``score_low`` and ``score_high``, ``additive_score``,
        ``interaction_norm`` (as in :meth:`predict_interactions`), and ``n_cells``, the smaller
        number of training cells of the two.

        Raises
        ------
        UnknownPerturbationError
            If a name is not one of the model's perturbations.
        SAMSError
            If there are not two perturbations, or all pairs were measured.

        Warnings
        --------
        A perturbation without cells that have it alone has an effect that is known only from
        combinations, and scores of its pairs are not reliable: a warning names such perturbations.

        Examples
        --------
        Six of the 28 pairs of 8 perturbations were measured:

        >>> ranking = model.rank_unseen_pairs(n_samples=40)
        >>> len(ranking)
        22
        >>> ranking["effect_norm"].is_monotonic_decreasing
        True
        """
        check_choice("by", by, ("effect", "interaction"))
        check_number(above=0, below=1, interval=interval)
        rows = rows_of(self, perturbations)
        encode_requested(self, [self.perturbations[row] for row in rows])  # warns of unit doses
        method = rate_scale(self.module.likelihood, method)
        contrast, _ = make_contrast(
            self, method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        return unseen_pairs(self, rows, by, contrast, interval)

    @torch.inference_mode()
    def predict_dose_response(
        self,
        perturbations: Sequence[str] | None = None,
        doses: Sequence[float] | np.ndarray | None = None,
        *,
        n_doses: int = 11,
        method: EffectScale = "lograte",
        n_samples: int = 5000,
        n_posterior_samples: int = 100,
        basal: Basal | None = None,
        library_size: float | None = None,
        target_sum: float = 1e4,
        interval: float | None = 0.95,
        key_added: str | None = RESULT_KEYS.DOSE_RESPONSE,
    ) -> AnnData:
        """Predict average treatment effects over a grid of doses.

        Latent shifts are linear in the registered dose; expression may saturate or curve because
        of the decoder. All doses share basal states, masks and effects, so that curves are smooth.

        Parameters
        ----------
        perturbations
            Names; ``None`` for all perturbations.
        doses
            Grid, in the units that were registered; ``None`` for ``n_doses`` equal steps from 0 to
            the largest dose of each perturbation in the training data.
        n_doses
            See ``doses``.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_ate`.
        key_added
            Key of ``adata.uns`` of the training data to which the tables are written (as a dict of
            arrays); ``None`` writes nothing.

        Returns
        -------
        AnnData, (perturbations x doses) x genes, as returned by :meth:`predict_ate`.
        ``obs["is_measured_range"]``: whether training cells had both smaller (including 0) and
        larger doses of the perturbation, so that nothing is extrapolated.

        Raises
        ------
        InvalidDosageError
            If no doses were registered, or ``doses`` has negative or non-finite values.
        UnknownPerturbationError
            If a name is not one of the model's perturbations.

        Examples
        --------
        >>> doses = scvi_sams.datasets.simulate_screen(n_genes=50, dosages=[0.5, 1.0, 2.0])
        >>> scvi_sams.SAMSVAE.setup_anndata(doses, dosage_key="dosage")
        >>> dosed = scvi_sams.SAMSVAE(doses, n_latent=5, n_hidden=16)
        >>> dosed.train(max_epochs=1, enable_progress_bar=False)
        >>> curves = dosed.predict_dose_response(["P001"], n_doses=5, n_samples=200)
        >>> curves.obs["dosage"].tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0]
        >>> float(abs(curves.X[0]).max())  # dose 0
        0.0
        """
        check_key(key_added=key_added)
        _check_has_doses(self)
        names = as_names(
            "perturbations", self.perturbations if perturbations is None else perturbations
        )
        names = [self._spelling.canonical(name) for name in names]
        largest = _largest_doses(self, names)
        grids = [_grid(doses, n_doses, maximum) for maximum in largest]
        labels = np.repeat(names, [len(grid) for grid in grids])
        grid = np.concatenate(grids)
        requested = encode_requested(self, list(labels), list(grid))
        method = rate_scale(self.module.likelihood, method)
        contrast, description = make_contrast(
            self, method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        rows = label_rows(list(labels), list(grid))
        genes = pd.Index(self.get_var_names())
        all_respond = np.ones(len(requested.codes))
        result = effects_of_labels(contrast, rows, requested, genes, interval, all_respond)
        result.uns["ate"] = description
        result.obs["is_measured_range"] = grid <= np.repeat(largest, [len(g) for g in grids])
        keep_effects(self, result, key_added)
        return result


def _check_has_doses(model: PerturbationModel) -> None:
    model._check_has_data("doses")
    arguments = model._setup_arguments
    doses = registered_labels(model.adata_manager).doses
    registered = arguments["dosage_key"] or arguments["dosage_obsm_key"]
    if not registered or np.isin(doses, (0, 1)).all():
        raise InvalidDosageError(
            "The perturbations were registered without doses"
            + (" (all are 0 or 1)" if registered else "")
            + ": there is no range to draw a curve over. Register them with `dosage_key` (or "
            "`dosage_obsm_key`) and train again."
        )


def _largest_doses(model: PerturbationModel, names: list[str]) -> np.ndarray:
    vocabulary = pd.Index(model.perturbations)
    rows = vocabulary.get_indexer(pd.Index(names))
    if (rows < 0).any() or not names:
        unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
        raise UnknownPerturbationError(
            f"{', '.join(map(repr, unknown[:5])) or 'An empty list'} is not one of the model's "
            "perturbations. Dose-response curves are for single perturbations; for combinations "
            "pass `dosages` to predict_ate."
        )
    labels = registered_labels(model.adata_manager)
    largest = np.zeros(len(vocabulary))
    carried = labels.codes >= 0
    np.maximum.at(largest, labels.codes[carried], labels.doses[carried])
    return largest[rows]


def _grid(doses: Sequence[float] | np.ndarray | None, n_doses: int, largest: float) -> np.ndarray:
    if doses is None:
        check_integer(at_least=2, n_doses=n_doses)
        return np.linspace(0, largest, n_doses)
    try:
        grid = np.asarray(doses, dtype=np.float64)
    except (TypeError, ValueError):
        grid = np.array(np.nan)
    if grid.ndim != 1:
        raise InvalidDosageError(f"`doses` must be a list of numbers, not {doses!r}.")
    bad = ~np.isfinite(grid) | (grid < 0)
    if bad.any() or not len(grid):
        raise InvalidDosageError(
            "Doses must be finite and not negative"
            + (f", unlike {grid[bad][0]:g}." if bad.any() else "; there are none.")
        )
    return grid
