"""Genetic interactions: what a combination does beyond the sum of its perturbations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, islice, product
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import as_names, check_choice, check_number
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._field import PerturbationField, registered_labels
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import distinct_combinations, parts_of_combination
from scvi_sams.labels._names import check_known
from scvi_sams.labels._spelling import canonical_label
from scvi_sams.model._arms import Arms, Method, Statistic
from scvi_sams.model._counterfactual import CounterfactualMixin
from scvi_sams.model._draws import bounds, check_sampling, summary

_PAIRS_PER_CHUNK = 32
"""Combinations whose single effects are held in memory at a time."""
_PERTURBATIONS_PER_BLOCK = 32
"""Of all pairs, those between two blocks of perturbations are looked at at a time."""


class _Interaction(NamedTuple):
    """Draws of a combination's effect and of its additive expectation, ``(n_draws, n_genes)``."""

    effect: torch.Tensor
    additive: torch.Tensor

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Interaction and additive expectation along the expected additive direction."""
        mean = self.additive.mean(dim=0)
        direction = mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
        return (self.effect - self.additive) @ direction, mean.norm()


class InteractionsMixin(CounterfactualMixin):
    """Adds :meth:`predict_interactions`."""

    @torch.inference_mode()
    def predict_interactions(
        self,
        combinations: Sequence[str] | None = None,
        *,
        method: Method = "lograte",
        n_samples: int = 5000,
        n_posterior_samples: int = 100,
        basal: Literal["prior", "control"] = "prior",
        library_size: float = 1e4,
        target_sum: float = 1e4,
        interval: float = 0.95,
    ) -> AnnData:
        """Predict how far the effect of a combination is from the sum of the single effects.

        ``interaction = effect(A+B) - (effect(A) + effect(B))`` per gene, where effects are average
        treatment effects (see :meth:`predict_ate`) at unit doses. The sum is taken where f lives:
        of log2 expression for ``"lograte"`` and ``"lognorm"``, so that independent fold changes of
        a gene multiply. In models whose shifts add up, an interaction is how the decoder bends: an
        interaction in which a pair reaches a state that no cell was in cannot be predicted.

        Parameters
        ----------
        combinations
            Labels such as ``["KLF1+MAP2K6"]``; ``None`` for every combination in the training data.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_ate` (here there always is an interval); all three arms share basal
            states, masks and effects.

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
        - ``effect_norm`` and ``interaction_norm``: norms over genes of the posterior means.

        ``uns["interaction"]``: method, units and settings.

        Raises
        ------
        UnknownPerturbationError
            If a label names a perturbation that was not trained on.
        SAMSError
            If a label is no combination, or there are no combinations.

        Examples
        --------
        >>> interactions = model.predict_interactions(["P001+P007"], n_samples=200)
        >>> interactions.shape
        (1, 100)
        >>> np.allclose(
        ...     interactions.X,
        ...     interactions.layers["effect"] - interactions.layers["additive"],
        ...     atol=1e-4,
        ... )
        True
        >>> interactions.obs.columns.tolist()
        ['score', 'score_low', 'score_high', 'additive_score', 'effect_norm', 'interaction_norm']
        """
        labels = (
            self._measured_combinations()
            if combinations is None
            else as_names("combinations", combinations)
        )
        parts = [self._parts_of(label) for label in labels]
        arms, description = self._interaction_arms(
            method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        names = ("X", "effect", "additive", "standard_error", "interval_low", "interval_high")
        genes = pd.Index(self.get_var_names())
        tables = {name: np.empty((len(labels), len(genes)), np.float32) for name in names}
        rows = []
        for start in range(0, len(labels), _PAIRS_PER_CHUNK):
            chunk = slice(start, start + _PAIRS_PER_CHUNK)
            found = self._drawn_interactions(labels[chunk], parts[chunk], arms)
            for place, drawn in enumerate(found, start):
                interaction = drawn.effect - drawn.additive
                mean, *uncertainty = summary(interaction, interval)
                means = (mean, drawn.effect.mean(0), drawn.additive.mean(0))
                for name, value in zip(names, (*means, *uncertainty), strict=True):
                    tables[name][place] = value.cpu().numpy()
                rows.append(_summary(drawn, interval))
        return AnnData(
            tables.pop("X"),
            obs=pd.DataFrame(rows, index=pd.Index(labels, name="combination")),
            var=pd.DataFrame(index=genes),
            layers=tables,
            uns={"interaction": description},
        )

    def _interaction_arms(
        self,
        method: Method,
        n_samples: int,
        n_posterior_samples: int,
        basal: str,
        library_size: float,
        target_sum: float,
        interval: float,
    ) -> tuple[Arms, dict]:
        check_sampling(n_samples, n_posterior_samples, basal)
        check_number(above=0, below=1, interval=interval)
        self._check_if_trained(warn=True)
        likelihood = self.module.likelihood
        if method == "lograte" and not likelihood.is_count_likelihood:
            method = "mean"  # the same thing for data that are on their own scale already
        statistic = Statistic(likelihood, method, library_size, target_sum, self.module.device)
        n_basal = max(1, round(n_samples / n_posterior_samples))
        states = self._basal_states(basal, n_posterior_samples, n_basal)
        description = {
            **statistic.description(),
            "interval": interval,
            "n_samples": n_posterior_samples * n_basal,
            "n_posterior_samples": n_posterior_samples,
            "basal": basal,
        }
        return Arms(self.module, statistic, *states), description

    def _drawn_interactions(
        self, labels: list[str], parts: list[list[str]], arms: Arms
    ) -> list[_Interaction]:
        singles = sorted({name for names in parts for name in names})
        requested = self._encode_requested([*singles, *labels], None)
        drawn = self._drawn_shifts(requested, len(arms.z_basal))
        of_single = {
            name: arms.effect(shift)
            for name, shift in zip(singles, islice(drawn, len(singles)), strict=True)
        }
        return [
            _Interaction(arms.effect(shift), torch.stack([of_single[p] for p in names]).sum(0))
            for names, shift in zip(parts, drawn, strict=True)
        ]

    def _parts_of(self, label: str) -> list[str]:
        arguments = self._setup_arguments
        delimiter = arguments["delimiter"]
        canonical = canonical_label(label, delimiter=delimiter, control=arguments["control"])
        return parts_of_combination(canonical, delimiter)

    def _measured_combinations(self) -> list[str]:
        """Canonical labels of the combinations in the training data, sorted."""
        self._check_has_data("combinations")
        delimiter = self._setup_arguments["delimiter"] or "+"
        codes = registered_labels(self.adata_manager).codes
        names, _ = distinct_combinations(np.sort(codes, axis=1), self.perturbations)
        if not self._additive:  # a combination is the one perturbation of a cell
            names = [name.split(delimiter) for cell in names for name in cell]
        found = sorted({delimiter.join(parts) for parts in names if len(parts) > 1})
        if not found:
            raise SAMSError(
                "The training data has no combinations. Name some in `combinations`; "
                "rank_unseen_pairs looks at all pairs."
            )
        return found


class UnseenPairsMixin(InteractionsMixin):
    """Adds :meth:`rank_unseen_pairs` to models in which perturbations add up."""

    @torch.inference_mode()
    def rank_unseen_pairs(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        by: Literal["effect", "interaction"] = "effect",
        method: Method = "lograte",
        n_samples: int = 200,
        n_posterior_samples: int = 20,
        basal: Literal["prior", "control"] = "prior",
        library_size: float = 1e4,
        target_sum: float = 1e4,
        interval: float = 0.9,
    ) -> pd.DataFrame:
        """Rank all pairs that nobody measured: which to screen next.

        The number of pairs grows with the square of the number of perturbations; memory does not.

        Parameters
        ----------
        perturbations
            Pairs of these; ``None`` for all. Name the hits to keep it short.
        by
            ``"effect"``: by the norm of the predicted effect. ``"interaction"``: by the absolute
            score, how far the effect is from additive.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_interactions`, with fewer samples: ranks need less precision.

        Returns
        -------
        One row per pair that no training cell carries alone (a pair within a larger combination
        counts as not measured), best first: ``first``, ``second``, ``combination``,
        ``effect_norm``, ``score`` with ``score_low`` and ``score_high``, ``additive_score``,
        ``interaction_norm`` (as in :meth:`predict_interactions`), and ``n_cells``, the smaller
        number of training cells of the two.

        Raises
        ------
        UnknownPerturbationError
            If a name is not one of the model's perturbations.
        SAMSError
            If there are not two perturbations, or all pairs were measured.

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
        rows = self._rows_of(perturbations)
        measured = self._measured_pairs()
        arms, _ = self._interaction_arms(
            method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        device = self.module.device
        table = self.module.global_posterior(
            torch.as_tensor(rows, device=device), n_posterior_samples
        ).shifts.expand(n_posterior_samples, -1, -1)
        blocks = [
            range(start, min(start + _PERTURBATIONS_PER_BLOCK, len(rows)))
            for start in range(0, len(rows), _PERTURBATIONS_PER_BLOCK)
        ]
        places, summaries = [], []
        for left, right in combinations_with_replacement(blocks, 2):
            pairs = [
                (i, j)
                for i, j in product(left, right)
                if i < j and (rows[i], rows[j]) not in measured
            ]
            singles = {i: arms.effect(table[:, i]) for i in {*(k for pair in pairs for k in pair)}}
            for i, j in pairs:
                effect = arms.effect(table[:, i] + table[:, j])
                summaries.append(_summary(_Interaction(effect, singles[i] + singles[j]), interval))
                places.append((rows[i], rows[j]))
        if not places:
            raise SAMSError("All pairs of these perturbations were measured.")
        return self._ranked(np.array(places), pd.DataFrame(summaries), by)

    def _rows_of(self, perturbations: Sequence[str] | None) -> list[int]:
        names = as_names(
            "perturbations", self.perturbations if perturbations is None else perturbations
        )
        check_known(names, self.perturbations)
        rows = pd.Index(self.perturbations).get_indexer(pd.Index(names))
        if len(set(rows)) < 2:
            raise SAMSError("Pairs need at least two perturbations.")
        return sorted({int(row) for row in rows})

    def _measured_pairs(self) -> set[tuple[int, int]]:
        self._check_has_data("perturbations")
        codes = registered_labels(self.adata_manager).codes
        pairs = codes[(codes >= 0).sum(axis=1) == 2]
        distinct = np.unique(np.sort(pairs, axis=1)[:, -2:], axis=0)
        return {(int(a), int(b)) for a, b in distinct}

    def _ranked(self, places: np.ndarray, summaries: pd.DataFrame, by: str) -> pd.DataFrame:
        names = np.array(self.perturbations, dtype=object)[places]
        delimiter = self._setup_arguments["delimiter"] or "+"
        pairs = pd.DataFrame(names, columns=["first", "second"])
        pairs["combination"] = [delimiter.join(pair) for pair in names]
        counts = self._state(REGISTRY_KEYS.PERTURBATIONS)[
            PerturbationField.CELLS_PER_PERTURBATION_KEY
        ]
        support = pd.Series(np.asarray(counts)[places].min(axis=1), name="n_cells")
        table = pd.concat([pairs, summaries, support], axis=1)
        strength = table["effect_norm"] if by == "effect" else table["score"].abs()
        order = np.argsort(-strength.to_numpy(), kind="stable")
        return table.iloc[order].reset_index(drop=True)


def _summary(drawn: _Interaction, interval: float) -> dict[str, float]:
    draws, additive_score = drawn.scores()
    low, high = bounds(draws, interval)
    effect, additive = drawn.effect.mean(dim=0), drawn.additive.mean(dim=0)
    return {
        "score": float(draws.mean()),
        "score_low": float(low),
        "score_high": float(high),
        "additive_score": float(additive_score),
        "effect_norm": float(effect.norm()),
        "interaction_norm": float((effect - additive).norm()),
    }
