"""Effects of perturbations, counterfactual cells, interactions, differential expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_names, check_choice, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._rows import rows_as_asked
from scvi_sams.model._average_effects import EffectSettings, average_effects, keep_effects
from scvi_sams.model._basal_states import Basal, contexts_asked
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._contrast import EffectScale, rate_scale
from scvi_sams.model._counterfactual import (
    counterfactual_cells,
    counterfactual_expression,
    encode_requested,
    interactions_of_labels,
    make_contrast,
    measured_combinations,
)
from scvi_sams.model._descriptions import cells_with_effects, control_cells, description_of_cells
from scvi_sams.model._differential_table import differential_table
from scvi_sams.model._responses import Among, response_rates
from scvi_sams.module._settings import given


class PerturbationModel(CellModel):
    """Base of all models of a screen; a subclass sets its module and further methods.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata`; ``None`` for a model that is loaded without data.
    gene_likelihood
        Name in ``scvi_sams.module.LIKELIHOODS``.
    registry
        What was registered, instead of ``adata``.
    **module_kwargs
        Arguments of the module, whose signature contains their ranges.

    Raises
    ------
    RegistrationError
        If ``adata`` is not registered.
    """

    @torch.inference_mode()
    def predict_ate(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        dosages: Sequence[float | str] | None = None,
        method: EffectScale = "lognorm",
        n_samples: int = 2500,
        n_posterior_samples: int = 100,
        basal: Basal | None = None,
        library_size: float | None = None,
        target_sum: float = 1e4,
        interval: float | None = 0.95,
        among: Among = "responding",
        context: str | Sequence[str] | None = None,
        indices: Sequence[int] | Sequence[bool] | None = None,
        key_added: str | None = RESULT_KEYS.ATE,
    ) -> AnnData:
        """Predict average treatment effects, including unmeasured combinations if effects add up.

        Treated and control cells of every comparison share basal states, masks and effects (common
        random numbers), so that most sampling noise cancels.

        Parameters
        ----------
        perturbations
            Labels as registered, such as ``["KLF1+MAP2K6"]``; ``None``: every single perturbation.
        dosages
            A dose per label, as in ``setup_anndata``; ``None`` means 1. Doses above those of
            training cells raise a warning.
        method
            ``"lognorm"``: f(x) = log2(1 + target_sum * x / size) of counts x, the quantity reported
            in the paper; size is the sum of x, or the size factor if one is registered.
            ``"lograte"``: f = log2(1 + target_sum * rate) of a cell's expected expression.
            ``"mean"``: f(x) = target_sum * x / size (for a normal likelihood f(x) = x).
            Expectations over x are computed, not sampled as in the paper; for the approximation in
            ``"lognorm"`` see :ref:`effects <effects>`.
        n_samples
            Samples of basal states (paper: 2,500), divided equally between posterior samples.
        n_posterior_samples
            Samples of masks and effects.
        basal
            Basal states from the ``"prior"`` (paper), or from the posteriors of random cells
            (``"control"``), the default with contexts or ``indices``. Batch, covariates and
            contexts are those of these cells in both cases.
        library_size
            Size of the predicted cells; only ``"lognorm"`` depends on it. ``None``: those of the
            training data's control cells (1e4 if a model was saved without them).
        target_sum
            Total to which expression is normalised.
        interval
            Probability mass of the posterior interval; ``None`` omits intervals.
        among
            If cells may have escaped (``responses=True``): ``"responding"``, the effect on cells
            that respond, or ``"all"``, the effect on all labelled cells, comparable with observed
            effects. For an unmeasured combination, the log-odds of a response are the mean of those
            of its perturbations.
        context
            If contexts are registered: the effect in one or several of them; ``None`` or
            ``"mean"``: on all cells, each in its own. An unmeasured pair has the shared effect, and
            more as in other contexts (:ref:`contexts <contexts>`).
        indices
            Cells of the training data to compare on; ``None``: control cells (of the context).
        key_added
            Key of ``adata.uns`` of the training data for the tables; ``None`` writes nothing.

        Returns
        -------
        AnnData, labels x genes. ``X``: posterior mean of the effect. ``layers["standard_error"]``:
        its Monte Carlo standard error. ``layers["interval_low"]`` and ``["interval_high"]``:
        posterior interval, from averages over ``n_samples / n_posterior_samples`` basal states.
        ``obs``: the canonical label ``"perturbation"``; ``"dosage"``, text if a combination has
        several; ``"effect_norm"``, the posterior mean of the Euclidean norm over genes, and its
        interval ``"effect_norm_low"`` and ``"effect_norm_high"``. ``uns["ate"]``: method, units,
        settings, size factor, source of sizes, whether direct effects are included, and weights of
        stacking. Row names are labels, ``"A@0.5"`` for several doses of a label, ``"A:T cell"`` for
        several contexts. Without ``interval`` there are no ``_low`` and ``_high``. With
        ``context``, obs contains it; with it, or features, also what was ``"measured"``.

        Raises
        ------
        UnknownPerturbationError
            If a label contains a perturbation that was not trained on, or is a combination in a
            model that treats combinations as separate perturbations.
        SAMSError
            If the method requires counts, but the likelihood is normal.

        Examples
        --------
        An unmeasured combination, with its names in any order:

        >>> ate = model.predict_ate(["P001", "P002+P001"], n_samples=200)
        >>> ate.to_df().shape
        (2, 100)
        >>> ate.uns["ate"]["method"]
        'lognorm'
        """
        check_key(key_added=key_added)
        labels = as_names(
            "perturbations", self.perturbations if perturbations is None else perturbations
        )
        sizes = library_size, target_sum, interval
        settings = EffectSettings(method, n_samples, n_posterior_samples, basal, *sizes)
        contexts = contexts_asked(self, context)
        result = average_effects(self, labels, dosages, among, contexts, indices, settings)
        keep_effects(self, result, key_added)
        return result

    @torch.inference_mode()
    def predict(
        self,
        perturbations: Sequence[str],
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        dosages: Sequence[float | str] | None = None,
        output: Literal["lognorm", "rate", "counts"] = "lognorm",
        target_sum: float = 1e4,
        batch_size: int | None = None,
        among: Among = "responding",
    ) -> AnnData:
        """Predict expression of given cells under given perturbations.

        The basal state of each cell is sampled from its posterior; the effects of its own
        perturbations are subtracted and those of the requested ones added. Masks and effects are
        sampled once for all cells of a call: an uncertain mask is on or off in all of them.

        Parameters
        ----------
        perturbations
            Labels as registered; if effects add up, combinations need not have been measured. A
            control label gives unperturbed cells.
        adata, indices
            Cells to start from; by default the control cells of the training data.
        dosages
            A dose per label; ``None`` means 1.
        output
            ``"lognorm"``: log(1 + target_sum * rate), natural logarithm, like ``scanpy.pp.log1p``
            of normalised counts. ``"rate"``: proportions (or counts per unit of size factor).
            ``"counts"``: sampled counts with each cell's own size. A normal likelihood gives its
            mean for ``"rate"`` and raises for ``"lognorm"``; its ``"counts"`` are sampled values.
        target_sum
            See ``output``.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``. With a seed, results
            depend neither on it nor on the order of ``indices`` (except counts on an accelerator).
        among
            If cells may have escaped: ``"responding"``, all cells respond, or ``"all"``, the same
            proportion responds as of the cells with the label.

        Returns
        -------
        AnnData, (labels x cells) x genes, labels slowest. ``obs``: ``"perturbation"`` and
        ``"dosage"`` as in :meth:`predict_ate`; ``"source_cell"``, the cell it starts from, and the
        other columns of that cell. Each cell is in its own context. ``uns["prediction"]`` describes
        ``X`` and the parts of predictions.

        Raises
        ------
        UnknownPerturbationError
            As for :meth:`predict_ate`.

        Examples
        --------
        Every control cell with each of two labels:

        >>> cells = model.predict(["P001", "P001+P002"])
        >>> cells.shape
        (400, 100)
        >>> cells.obs["perturbation"].value_counts().to_dict()
        {'P001': 200, 'P001+P002': 200}
        """
        check_choice("output", output, ("lognorm", "rate", "counts"))
        check_number(above=0, target_sum=target_sum)
        is_count = self.module.likelihood.is_count_likelihood
        if output == "lognorm" and not is_count:
            raise SAMSError("A normal likelihood has no counts to normalise: use output='rate'.")
        labels = as_names("perturbations", perturbations)
        requested = encode_requested(self, labels, dosages)
        if adata is None:
            self._check_has_data("adata")
        from_controls = adata is None and indices is None
        sources = self._read(adata, control_cells(self) if from_controls else indices, batch_size)
        rates = response_rates(self.module, requested, among)
        values = counterfactual_expression(sources, requested, output, target_sum, rates)
        rows = rows_as_asked(labels, dosages, self._spelling)
        are_counts = output == "counts" and is_count
        cells = counterfactual_cells(values, rows, sources, sparsely=are_counts)
        description = description_of_cells(self, sources, output, target_sum)
        cells.uns["prediction"] = description | cells_with_effects(self.module, among)
        return cells

    @torch.inference_mode()
    def predict_interactions(
        self,
        combinations: Sequence[str] | None = None,
        *,
        method: EffectScale = "lograte",
        n_samples: int = 5000,
        n_posterior_samples: int = 100,
        basal: Basal | None = None,
        library_size: float | None = None,
        target_sum: float = 1e4,
        interval: float = 0.95,
    ) -> AnnData:
        """Predict the difference of the effect of a combination from the sum of single effects.

        ``interaction = effect(A+B) - (effect(A) + effect(B))`` per gene, where effects are average
        treatment effects (see :meth:`predict_ate`) at unit doses. Effects are added on the scale of
        f, log2 for ``"lograte"`` and ``"lognorm"``, so that independent fold changes of a gene
        multiply. If shifts add up, interactions arise from the curvature of the decoder: an
        interaction in which a pair reaches a state outside of the training data is not predicted.

        Parameters
        ----------
        combinations
            Labels such as ``["KLF1+MAP2K6"]``; ``None`` for every combination in the training data.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_ate` (here there is always an interval); all three effects share
            basal states, masks and effects.

        Returns
        -------
        AnnData, combinations x genes. ``X``: posterior mean of the interaction; ``layers``:
        ``"effect"`` of the combination, ``"additive"`` expectation, and for the interaction
        ``"standard_error"`` (Monte Carlo), ``"interval_low"`` and ``"interval_high"``. ``obs``:

        - ``score``: the interaction along the direction u of the additive expectation (a unit
          vector over genes), with ``score_low`` and ``score_high``: negative if the combination is
          weaker than the sum (buffering), positive if it is stronger (synergy). The interval
          includes noise of averages over ``n_samples / n_posterior_samples`` basal states.
          ``additive_score``: the length of the additive expectation, in the same units.
        - ``effect_norm`` and ``interaction_norm``: norms over genes of the posterior means. Also
          ``perturbation`` and ``dosage``. ``uns["interaction"]``: method, units and settings.

        Raises
        ------
        SAMSError
            As for :meth:`predict_ate`, or if a label is not a combination, or there are none.

        Examples
        --------
        >>> interactions = model.predict_interactions(["P001+P007"], n_samples=200)
        >>> difference = interactions.layers["effect"] - interactions.layers["additive"]
        >>> np.allclose(interactions.X, difference, atol=1e-4)
        True
        """
        labels = (
            measured_combinations(self)
            if combinations is None
            else as_names("combinations", combinations)
        )
        # For data on their own scale the mean is the same.
        method = rate_scale(self.module.likelihood, method)
        contrast, description = make_contrast(
            self, method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        result = interactions_of_labels(self, contrast, labels, interval)
        result.uns["interaction"] = description
        return result

    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Sequence[int] | Sequence[bool] | None = None,
        idx2: Sequence[int] | Sequence[bool] | None = None,
        mode: Literal["vanilla", "change"] = "change",
        delta: float = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool = False,
        batchid1: Sequence[str] | None = None,
        batchid2: Sequence[str] | None = None,
        fdr_target: float = 0.05,
        pseudocounts: float | None = None,
        n_samples: int = 5000,
        key_added: str | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Find genes whose expression differs between two perturbations, or two groups of cells.

        Arguments and columns are those of scvi-tools. There are two comparisons:

        - **Perturbations** (neither ``groupby`` nor ``idx1``): the same control cells with one
          perturbation and with the other (or none). A gene is differential if the fold change of
          its mean over cells probably exceeds ``delta`` by more than the error due to its counts.
          Genes with equal probabilities, because they depend on the same mask, are ordered by their
          fold change over that error. Unmeasured labels can be compared too.
        - **Groups of cells** (``groupby``, or ``idx1``): Bayesian differential expression of
          scvi-tools (Lopez et al. 2018; Boyeau et al. 2019) on inferred expression. A gene is
          differential if two cells, one of each group, probably differ in it, as for cell types.
          Effects smaller than the differences within groups are not detected.

        Parameters
        ----------
        adata
            Cells of the groups (for perturbations only used for statistics); ``None`` for the
            training data.
        groupby
            Column of obs that groups the cells; ``None`` to compare perturbations.
        group1
            Perturbation or group, or several, compared one by one; ``None`` for every perturbation,
            or every group.
        group2
            Reference; ``None`` for no perturbation, or all other cells.
        idx1, idx2
            Positions or boolean masks of two groups of cells, instead of ``groupby``; without
            ``idx2`` all other cells.
        mode
            ``"change"``: P(log2 fold change > delta) or P(< -delta), whichever is larger (for
            perturbations: delta + ``lfc_error``).
            ``"vanilla"``: P(scale1 > scale2), only for groups of cells, and without a false
            discovery rate.
        delta
            Smallest log2 fold change that counts.
        batch_size
            Cells per mini-batch, for groups of cells.
        all_stats
            Add means and proportions of non-zero values of the registered expression (NaN for an
            unmeasured perturbation).
        batch_correction, batchid1, batchid2
            For groups of cells: decode both as if they were in every batch in turn (or the named
            ones). Perturbations are always compared within the same batches.
        fdr_target
            Expected false discovery rate at which genes are called.
        pseudocounts
            Added to both rates before the logarithm; ``None``: a tenth of a count in a control cell
            of median size (for groups of cells the estimate of scvi-tools).
        n_samples
            For perturbations: samples of a control cell, ten for each sample of masks and effects.
            If a mask probability is near ``1 - fdr_target``, calls vary; more samples reduce this.
        key_added
            Key of ``adata.uns`` for scanpy's ``rank_genes_groups`` functions, whose default is
            ``"rank_genes_groups"``. ``scores`` are ``lfc_z``. ``pvals`` are **not frequentist
            p-values** but posterior errors, ``proba_not_de``, the probability that the gene does
            not change in this direction, and ``pvals_adj`` is ``adj_p_value``.
        **kwargs
            For groups of cells: ``scvi.model.base.DifferentialComputation.get_bayes_factors``.

        Returns
        -------
        Per comparison and gene, most differential first: ``proba_de``, ``proba_not_de``,
        ``bayes_factor``, ``scale1``, ``scale2`` (mean normalised expression: proportions of the
        library or counts per unit of size factor), ``pseudocounts``, ``delta``, ``lfc_mean``,
        ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``; ``lfc_error``, the standard error of
        a log2 fold change due to Poisson counts in that many cells, and ``lfc_z``, ``lfc_mean`` in
        units of it; ``raw_mean1``, ``raw_mean2``, ``non_zeros_proportion1``,
        ``non_zeros_proportion2``; ``is_de_fdr_0.05``, ``comparison``, ``group1``, ``group2``. For
        pertpy ``variable`` (gene), ``log_fc`` (``lfc_mean``) and ``adj_p_value``: the mean
        posterior error of all genes that are at least as likely, which is the smallest false
        discovery rate at which the gene is called, from posterior probabilities, not a test. With
        ``mode="vanilla"`` ``proba_m1`` and ``proba_m2`` replace the probabilities of a change.

        Raises
        ------
        MissingKeyError
            If obs has no column ``groupby``.
        UnknownPerturbationError
            If a perturbation is unknown, or there are no cells in a group.
        SAMSError
            If the likelihood is normal (fold changes need rates), or arguments contradict each
            other.

        Examples
        --------
        P001 against no perturbation, on the same control cells:

        >>> genes = model.differential_expression(group1="P001", n_samples=200)
        >>> genes.shape[0], genes["comparison"].iloc[0]
        (100, 'P001 vs control')
        >>> genes["proba_de"].is_monotonic_decreasing
        True
        """
        asked = given(locals())
        asked["of_cells"] = asked.pop("kwargs")
        return differential_table(self, asked)
