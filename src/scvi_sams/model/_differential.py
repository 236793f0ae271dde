"""Differential expression between perturbations or groups of cells, in the form of scvi-tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.model.base import DifferentialComputation

from scvi_sams._checks import as_names, check_choice, check_integer, check_key, check_number
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._fdr import active_at_fdr
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.model._arms import Arms, Statistic
from scvi_sams.model._cell_groups import groups_of_cells, positions_of_groups
from scvi_sams.model._counterfactual import CounterfactualMixin
from scvi_sams.model._expression import ExpressionMixin

_DRAWS_OF_EFFECTS = 25
"""Parts in which cells are sampled, each with its own draw of masks and effects."""
_NOT_EXPRESSED = 0.01
"""Mean count below which a gene counts as not expressed, as in scvi-tools."""
_EPSILON = 1e-8


class DifferentialExpressionMixin(CounterfactualMixin, ExpressionMixin):
    """Adds :meth:`differential_expression`."""

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
        n_samples: int = 2500,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Find genes whose expression differs between two perturbations, or two groups of cells.

        Arguments and columns are those of scvi-tools. There are two comparisons:

        - **Perturbations** (neither ``groupby`` nor ``idx1``): the same control cells with one
          perturbation and with the other (or none), so that differences between cells cancel. A
          gene is differential if its fold change in such a pair is likely to exceed ``delta``:
          over what is not known of masks and effects, and over cells. Combinations that nobody
          measured can be compared too.
        - **Groups of cells** (``groupby``, or ``idx1``): Bayesian differential expression of
          scvi-tools (Lopez et al. 2018; Boyeau et al. 2019) on the expression that is inferred for
          the cells. A gene is differential if two cells, one of each group, are likely to differ
          in it: the question for cell types. Effects that are smaller than the differences within
          groups are not found so.

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
            ``"change"``: P(log2 fold change > delta) or P(< -delta), whichever is larger.
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
            Added to both rates before the logarithm; ``None``: a hundredth of a count in a control
            cell of median size (for groups of cells the estimate of scvi-tools).
        n_samples
            For perturbations: number of draws of a control cell, and of masks and effects with it.
            Where a mask's inclusion probability is near ``1 - fdr_target``, as those of strong
            effects often are (``evidence_cells``), which genes are called varies between calls;
            more draws make it vary less.
        **kwargs
            For groups of cells: to ``scvi.model.base.DifferentialComputation.get_bayes_factors``.

        Returns
        -------
        Per comparison and gene, most differential first: ``proba_de``, ``proba_not_de``,
        ``bayes_factor``, ``scale1``, ``scale2`` (mean normalised expression: shares of the library
        or counts per unit of size factor), ``pseudocounts``, ``delta``, ``lfc_mean``,
        ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``; ``raw_mean1``, ``raw_mean2``,
        ``non_zeros_proportion1``, ``non_zeros_proportion2``; ``is_de_fdr_0.05``, ``comparison``,
        ``group1``, ``group2``. With ``mode="vanilla"`` ``proba_m1`` and ``proba_m2`` in place of
        probabilities of a change.

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
        check_choice("mode", mode, ("vanilla", "change"))
        check_integer(n_samples=n_samples)
        check_number(at_least=0, delta=delta)
        check_number(above=0, below=1, fdr_target=fdr_target)
        if pseudocounts is not None:
            check_number(at_least=0, pseudocounts=pseudocounts)
        if not self.module.likelihood.is_count_likelihood:
            raise SAMSError(
                "Fold changes are those of rates, and a normal likelihood has none. Use "
                "predict_ate(method='mean') for differences of means and their intervals."
            )
        if idx1 is None and idx2 is not None:
            raise SAMSError("`idx2` needs `idx1`.")
        if idx1 is not None and not (groupby is group1 is group2 is None):
            raise SAMSError("Pass either `idx1` (and `idx2`) or groups, not both.")
        self._check_if_trained(warn=True)
        adata = self._validate_anndata(adata)
        if groupby is None and idx1 is None:
            if mode == "vanilla" or kwargs or batch_correction or batchid1 or batchid2:
                raise SAMSError(
                    "`mode='vanilla'`, batches and arguments for scvi-tools "
                    f"({', '.join(kwargs) or 'none were given'}) are of comparisons of cells: pass "
                    "`groupby` or `idx1`."
                )
            found = self._compare_perturbations(
                adata, group1, group2, delta, pseudocounts, n_samples
            )
        else:
            if pseudocounts is not None:
                kwargs["pseudocounts"] = pseudocounts
            kwargs |= {"mode": mode, "delta": delta, "batchid1": batchid1, "batchid2": batchid2}
            kwargs["use_observed_batches"] = not batch_correction
            if idx1 is not None:
                groups = [("one", "two", *positions_of_groups(adata.n_obs, idx1, idx2))]
            else:
                groups = groups_of_cells(adata, groupby, group1, group2)
            found = self._compare_cells(adata, groups, batch_size, kwargs)
        expression = self.get_anndata_manager(adata, required=True).get_from_registry(
            REGISTRY_KEYS.X
        )
        tables = []
        for name1, name2, cells1, cells2, columns in found:
            if all_stats:
                columns |= _statistics(expression, cells1, cells2)
            table = pd.DataFrame(columns, index=adata.var_names)
            key = "proba_de" if mode == "change" else "bayes_factor"
            table = table.sort_values(key, ascending=False, kind="stable")
            if mode == "change":
                active = active_at_fdr(table["proba_de"].to_numpy(), fdr_target)
                table[f"is_de_fdr_{fdr_target}"] = active
            comparison = f"{name1} vs {name2}"
            tables.append(table.assign(comparison=comparison, group1=name1, group2=name2))
        return pd.concat(tables)

    @torch.inference_mode()
    def _compare_perturbations(
        self,
        adata: AnnData,
        group1: str | Sequence[str] | None,
        group2: str | None,
        delta: float,
        pseudocounts: float | None,
        n_samples: int,
    ) -> list[tuple]:
        labels = registered_labels(self.get_anndata_manager(adata, required=True))
        second = labels.control if group2 is None else group2
        if group1 is None:
            group1 = [name for name in self.perturbations if name != second]
        first = as_names("group1", group1)
        if not first:
            raise InvalidArgumentError("`group1` is empty: there is nothing to compare.")
        check_key(group2=group2)
        requested = self._encode_requested([second, *first], None)
        statistic = Statistic(self.module.likelihood, "mean", 1.0, 1.0, self.module.device)
        basal = "control" if len(self._control_cells()) else "prior"
        states = self._basal_states(basal, n_samples, 1)
        arms = Arms(self.module, statistic, *states)
        if pseudocounts is None:
            pseudocounts = _NOT_EXPRESSED / self._median_size()

        def cells_of(label: str) -> np.ndarray:
            return labels.canonical == labels.spelling.canonical(label)

        shifts = self._drawn_shifts(requested, n_samples)
        reference = arms.every_state(next(shifts)).cpu().numpy()
        found = []
        for name, shift in zip(first, shifts, strict=True):
            columns = _fold_changes(
                arms.every_state(shift).cpu().numpy(), reference, delta, pseudocounts
            )
            found.append((name, second, cells_of(name), cells_of(second), columns))
        return found

    def _median_size(self) -> float:
        """Size of a typical control cell (of any, where there are none)."""
        manager = self.adata_manager
        cells = self._control_cells()
        chosen = cells if len(cells) else np.arange(self.adata.n_obs)
        if self.module.uses_size_factor:
            sizes = manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR)[chosen]
        else:
            sizes = manager.get_from_registry(REGISTRY_KEYS.X)[chosen].sum(axis=1)
        return float(np.median(np.asarray(sizes)))

    def _compare_cells(
        self, adata: AnnData, groups: list[tuple], batch_size: int | None, kwargs: dict[str, Any]
    ) -> list[tuple]:
        computation = DifferentialComputation(
            lambda data, **request: self._sampled_expression(data, batch_size, **request),
            None,
            self.get_anndata_manager(adata, required=True),
        )
        return [
            (*group, computation.get_bayes_factors(group[2], group[3], **kwargs))
            for group in groups
        ]

    def _sampled_expression(
        self,
        adata: AnnData,
        batch_size: int | None,
        *,
        indices: np.ndarray,
        transform_batch: str | None,
        n_samples_overall: int,
    ) -> np.ndarray:
        """Draw cells with replacement, and expression from the posterior of each."""
        chosen = indices[torch.randint(len(indices), (n_samples_overall,)).numpy()]
        parts = np.array_split(chosen, min(_DRAWS_OF_EFFECTS, len(chosen)))
        drawn = [
            self.get_normalized_expression(
                adata,
                part.tolist(),
                transform_batch=transform_batch,
                batch_size=batch_size,
                return_numpy=True,
            )
            for part in parts
        ]
        return np.concatenate(drawn)


def _fold_changes(
    scale1: np.ndarray, scale2: np.ndarray, delta: float, pseudocounts: float
) -> dict[str, Any]:
    """Columns of scvi-tools for paired draws of rates, each ``(n_draws, n_genes)``."""
    change = np.log2(scale1 + pseudocounts) - np.log2(scale2 + pseudocounts)
    likely = np.maximum((change > delta).mean(axis=0), (change < -delta).mean(axis=0))
    return {
        "proba_de": likely,
        "proba_not_de": 1 - likely,
        "bayes_factor": np.log(likely + _EPSILON) - np.log(1 - likely + _EPSILON),
        "scale1": scale1.mean(axis=0),
        "scale2": scale2.mean(axis=0),
        "pseudocounts": pseudocounts,
        "delta": delta,
        "lfc_mean": change.mean(axis=0),
        "lfc_median": np.median(change, axis=0),
        "lfc_std": change.std(axis=0),
        "lfc_min": change.min(axis=0),
        "lfc_max": change.max(axis=0),
    }


def _statistics(
    expression: Any, cells1: np.ndarray, cells2: np.ndarray
) -> dict[str, np.ndarray | float]:
    statistics: dict[str, np.ndarray | float] = {}
    for number, cells in ((1, cells1), (2, cells2)):
        mean: np.ndarray | float = np.nan
        share: np.ndarray | float = np.nan
        if cells.any():
            values = expression[np.flatnonzero(cells)]
            mean = np.asarray(values.mean(axis=0)).ravel()
            share = np.asarray((values != 0).mean(axis=0)).ravel()
        statistics[f"raw_mean{number}"] = mean
        statistics[f"non_zeros_proportion{number}"] = share
    return statistics
