"""What perturbations do: effects, counterfactual cells, interactions, differential expression."""

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
    """What all models of a screen share; a subclass names its module and what else it can do.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata`; ``None`` for a model that is loaded without data.
    gene_likelihood
        Name in ``scvi_sams.module.LIKELIHOODS``.
    registry
        What was registered, in place of ``adata``.
    **module_kwargs
        Passed to the module, whose signature says what each may be.

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
        """Predict average treatment effects, of unmeasured combinations too where effects add up.

        Treated and control cells of every comparison share basal states, masks and effects (common
        random numbers), so that the noise of the draws cancels.

        Parameters
        ----------
        perturbations
            Labels as registered, such as ``["KLF1+MAP2K6"]``; ``None``: every single perturbation.
        dosages
            A dose per label, as in ``setup_anndata``; ``None`` means 1. Doses larger than those of
            training cells are warned of.
        method
            ``"lognorm"``: f(x) = log2(1 + target_sum * x / size) of counts x, the quantity that
            the paper reports; size is the sum of x, or the size factor if one is registered.
            ``"lograte"``: f = log2(1 + target_sum * rate) of a cell's expected expression.
            ``"mean"``: f(x) = target_sum * x / size (for a normal likelihood f(x) = x).
            Expectations over x are taken, not drawn (the paper draws): see
            :ref:`effects <effects>` for what is left out for ``"lognorm"``.
        n_samples
            Draws of a basal state (paper: 2,500), in equal parts for each posterior sample.
        n_posterior_samples
            Draws of masks and effects.
        basal
            Basal states from the ``"prior"`` (paper), or from the posteriors of random cells
            (``"control"``), by default where there are contexts or ``indices``. Batch, covariates
            and contexts are those of these cells in both cases.
        library_size
            Size of the predicted cells; only ``"lognorm"`` depends on it. ``None``: those of the
            training data's control cells (1e4 where a model was saved without them).
        target_sum
            Total to which expression is normalised.
        interval
            Probability mass of the posterior interval; ``None`` leaves intervals out.
        among
            Where cells may have escaped (``responses=True``): ``"responding"``, the effect on cells
            that respond, or ``"all"``, on cells as they were labelled, to compare with observed
            effects. Of a combination nobody measured, the log-odds of a response are the mean of
            those of its perturbations.
        context
            Where contexts are registered: the effect in one of them, or in several; ``None`` or
            ``"mean"``: on all cells, each in its own. A pair that was not measured has what
            contexts share, and more as others show (:ref:`contexts <contexts>`).
        indices
            Cells of the training data to compare on; ``None``: control cells, those of the context.
        key_added
            Key of ``adata.uns`` of the training data that tables are written to; ``None`` for none.

        Returns
        -------
        AnnData, labels x genes. ``X``: posterior mean of the effect. ``layers["standard_error"]``:
        its Monte-Carlo standard error. ``layers["interval_low"]`` and ``["interval_high"]``:
        posterior interval, from averages over ``n_samples / n_posterior_samples`` basal states.
        ``obs``: the canonical label as ``"perturbation"``; ``"dosage"``, text where a combination
        has several; ``"effect_norm"``, the posterior mean of the Euclidean norm over genes, and its
        interval ``"effect_norm_low"`` and ``"effect_norm_high"``. ``uns["ate"]``: method, units,
        settings, size factor, where sizes are from, whether direct effects take part, and weights
        of stacking. Rows are called by the label, ``"A@0.5"`` if it is there at several doses,
        ``"A:T cell"`` with several contexts. Without ``interval`` there is none of the ``_low`` and
        ``_high``. With ``context`` obs says that; with it, or features, what was ``"measured"``.

        Raises
        ------
        UnknownPerturbationError
            If a label names a perturbation that was not trained on, or a combination where the
            model takes combinations for perturbations of their own.
        SAMSError
            If the method needs counts and the likelihood has none.

        Examples
        --------
        A combination that no cell carries, in any order of its names:

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
        """Predict what given cells would express under given perturbations.

        The basal state of each cell is drawn from its posterior, its own perturbations are taken
        away and the asked-for ones put in their place. Masks and effects are drawn once for all
        cells of a call: an uncertain mask is on or off in all of them.

        Parameters
        ----------
        perturbations
            Labels as registered; where effects add up, combinations need not have been measured.
            A control label asks for the unperturbed cell.
        adata, indices
            Cells to start from; by default the control cells of the training data.
        dosages
            A dose per label; ``None`` means 1.
        output
            ``"lognorm"``: log(1 + target_sum * rate), natural logarithm, as ``scanpy.pp.log1p`` of
            normalised counts. ``"rate"``: share of the library (or counts per unit of size factor).
            ``"counts"``: drawn counts at each cell's own size. A normal likelihood gives its mean
            for ``"rate"`` and raises for ``"lognorm"``; its ``"counts"`` are sampled values.
        target_sum
            See ``output``.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``. With a seed, results
            depend neither on it nor on the order of ``indices`` (but counts on an accelerator).
        among
            Where cells may have escaped: ``"responding"``, cells that respond, or ``"all"``, of
            which as many respond as of those that carry the label.

        Returns
        -------
        AnnData, (labels x cells) x genes, labels slowest. ``obs``: ``"perturbation"`` and
        ``"dosage"`` as in :meth:`predict_ate`; ``"source_cell"``, the cell it starts from, and what
        obs says of that otherwise. Each cell is in its own context.
        ``uns["prediction"]`` says what ``X`` holds and what predictions are made of.

        Raises
        ------
        UnknownPerturbationError
            As for :meth:`predict_ate`.

        Examples
        --------
        Every control cell, as it would look with each of two labels:

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
        """Predict how far the effect of a combination is from the sum of the single effects.

        ``interaction = effect(A+B) - (effect(A) + effect(B))`` per gene, where effects are average
        treatment effects (see :meth:`predict_ate`) at unit doses. The sum is taken where f lives:
        of log2 expression for ``"lograte"`` and ``"lognorm"``, so that independent fold changes of
        a gene multiply. In models whose shifts add up, an interaction is how the decoder curves: an
        interaction in which a pair reaches a state that no cell was in cannot be predicted.

        Parameters
        ----------
        combinations
            Labels such as ``["KLF1+MAP2K6"]``; ``None`` for every combination in the training data.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_ate` (here there always is an interval); all three effects share
            basal states, masks and effects.

        Returns
        -------
        AnnData, combinations x genes. ``X``: posterior mean of the interaction; ``layers``:
        ``"effect"`` of the combination, ``"additive"`` expectation, and of the interaction
        ``"standard_error"`` (Monte Carlo), ``"interval_low"`` and ``"interval_high"``. ``obs``:

        - ``score``: the interaction along the direction u of the additive expectation (a unit
          vector over genes), with ``score_low`` and ``score_high``: below zero the combination is
          weaker than the sum (buffering), above it is stronger (synergy). The interval holds the
          posterior and the noise of averages over ``n_samples / n_posterior_samples`` basal states.
          ``additive_score``: the length of the additive expectation, in the same units.
        - ``effect_norm`` and ``interaction_norm``: norms over genes of the posterior means. And
          ``perturbation`` and ``dosage``. ``uns["interaction"]``: method, units and settings.

        Raises
        ------
        SAMSError
            As for :meth:`predict_ate`, or if a label is no combination, or there are none.

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
        # Of data that are on their own scale already the mean is the same thing.
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
          its mean over cells is likely to exceed ``delta`` by more than the error that its counts
          leave. Of genes that are equally likely, as they hang on one mask, those with the largest
          fold change over that error come first. Unmeasured labels can be compared too.
        - **Groups of cells** (``groupby``, or ``idx1``): Bayesian differential expression of
          scvi-tools (Lopez et al. 2018; Boyeau et al. 2019) on inferred expression. A gene is
          differential if two cells, one of each group, are likely to differ in it: the question for
          cell types. Effects smaller than the differences within groups are not found so.

        Parameters
        ----------
        adata
            Cells of the groups (of perturbations only for their statistics); ``None`` for the
            training data.
        groupby
            Column of obs that groups the cells; ``None`` to compare perturbations.
        group1
            Perturbation or group, or several, each compared on its own; ``None`` for every
            perturbation, or every group.
        group2
            What they are compared with; ``None`` for no perturbation, or all other cells.
        idx1, idx2
            Positions or boolean masks of two groups of cells, instead of ``groupby``; without
            ``idx2`` all other cells.
        mode
            ``"change"``: P(log2 fold change > delta) or P(< -delta), whichever is larger (of
            perturbations: delta + ``lfc_error``).
            ``"vanilla"``: P(scale1 > scale2), of groups of cells only, and without a false
            discovery rate.
        delta
            Smallest log2 fold change that counts.
        batch_size
            Cells per mini-batch, for groups of cells.
        all_stats
            Add means and shares of non-zero values of the registered expression (NaN for a
            perturbation that no cell carries).
        batch_correction, batchid1, batchid2
            For groups of cells: decode both as if they were of every batch in turn (of the named
            ones). Perturbations are always compared within the same batches.
        fdr_target
            Expected false discovery rate at which genes are called.
        pseudocounts
            Added to both rates before the logarithm; ``None``: a tenth of a count in a control cell
            of median size (for groups of cells the estimate of scvi-tools).
        n_samples
            For perturbations: draws of a control cell, ten for each draw of masks and effects.
            Where a mask's probability is near ``1 - fdr_target``, calls vary; with more draws less.
        key_added
            Key of ``adata.uns`` for what scanpy's ``rank_genes_groups`` functions read; their
            default is ``"rank_genes_groups"``. ``scores`` are ``lfc_z``. ``pvals`` are **no
            frequentist p-values** but posterior errors, ``proba_not_de``, the probability that the
            gene does not change so in this direction, and ``pvals_adj`` is ``adj_p_value``.
        **kwargs
            For groups of cells: to ``scvi.model.base.DifferentialComputation.get_bayes_factors``.

        Returns
        -------
        Per comparison and gene, most differential first: ``proba_de``, ``proba_not_de``,
        ``bayes_factor``, ``scale1``, ``scale2`` (mean normalised expression: shares of the library
        or counts per unit of size factor), ``pseudocounts``, ``delta``, ``lfc_mean``,
        ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``; ``lfc_error``, the standard error
        that (Poisson) counts in so many cells leave a log2 fold change, and ``lfc_z``, ``lfc_mean``
        in units of it; ``raw_mean1``, ``raw_mean2``, ``non_zeros_proportion1``,
        ``non_zeros_proportion2``; ``is_de_fdr_0.05``, ``comparison``, ``group1``, ``group2``. For
        pertpy ``variable`` (gene), ``log_fc`` (``lfc_mean``) and ``adj_p_value``: the mean
        posterior error of all genes at least as likely, and so the smallest false discovery rate
        at which the gene is called, from posterior probabilities and not from a test. With
        ``mode="vanilla"`` ``proba_m1`` and ``proba_m2`` in place of probabilities of a change.

        Raises
        ------
        MissingKeyError
            If obs has no column ``groupby``.
        UnknownPerturbationError
            If a perturbation is unknown, or no cell is in a group.
        SAMSError
            If the likelihood is normal (fold changes need rates), or arguments contradict one
            another.

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
