"""What perturbations would do: average treatment effects and counterfactual cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy import sparse

from scvi_sams._checks import as_names, check_choice, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import MissingControlError, SAMSError
from scvi_sams.labels._labels import Labels
from scvi_sams.model._arms import Arms, Method, Statistic
from scvi_sams.model._base import BasePerturbationModel
from scvi_sams.model._draws import bounds, check_sampling, summary
from scvi_sams.module._normals import draw_particles
from scvi_sams.module._slots import positions_in, sum_of_rows, sum_over_slots

_PERTURBATIONS_AT_ONCE = 256
"""Whose masks and effects are drawn in one go: some 20 MB an array for a hundred draws."""

_SHIFTS_AT_ONCE = 2**20
"""Numbers in an array (labels x draws x latent dimensions): four megabytes."""

_UNCERTAINTY = ("standard_error", "interval_low", "interval_high")
"""Layers of a table of effects. By name, because those of anndata 0.13 hold X as well."""


class CounterfactualMixin(BasePerturbationModel):
    """Adds :meth:`predict_ate` and :meth:`predict`."""

    @torch.inference_mode()
    def predict_ate(
        self,
        perturbations: Sequence[str] | None = None,
        *,
        dosages: Sequence[float | str] | None = None,
        method: Method = "lognorm",
        n_samples: int = 2500,
        n_posterior_samples: int = 100,
        basal: Literal["prior", "control"] = "prior",
        library_size: float = 1e4,
        target_sum: float = 1e4,
        interval: float | None = 0.95,
        key_added: str | None = RESULT_KEYS.ATE,
    ) -> AnnData:
        """Predict average treatment effects, of unmeasured combinations too where effects add up.

        Both arms of every comparison share basal states, masks and effects (common random numbers),
        so that the noise of the draws cancels.

        Parameters
        ----------
        perturbations
            Labels as registered, such as ``["KLF1+MAP2K6"]``; ``None`` for every single
            perturbation.
        dosages
            A dose per label, as in ``setup_anndata``; ``None`` means 1.
        method
            ``"lognorm"``: f(x) = log2(1 + target_sum * x / size) of counts x, the quantity that
            the paper reports; size is the sum of x, or the size factor if one is registered.
            ``"lograte"``: f = log2(1 + target_sum * rate) of a cell's expected expression, without
            the noise of its counts: close to ``"lognorm"`` where counts are high.
            ``"mean"``: f(x) = target_sum * x / size
            (for a normal likelihood: f(x) = x, in the units of the data).
            Expectations over x are taken, not drawn (the paper draws): see
            :ref:`effects <effects>` for what is left out for ``"lognorm"``.
        n_samples
            Draws of a basal state (paper: 2,500), in equal parts for each posterior sample.
        n_posterior_samples
            Draws of masks and effects.
        basal
            Basal states from the prior (paper), or from the posteriors of random control cells.
            Batch and covariates are those of random control cells in both cases.
        library_size
            Size of the predicted cells, in counts (of the size factor, if one is registered).
        target_sum
            Total to which expression is normalised.
        interval
            Probability mass of the posterior interval. ``None`` leaves intervals out, which are
            half of the tables.
        key_added
            Key of ``adata.uns`` of the training data that the tables are also written to (as a
            dict of arrays); ``None`` writes nothing.

        Returns
        -------
        AnnData, labels x genes. ``X``: posterior mean of the effect. ``layers["standard_error"]``:
        its Monte-Carlo standard error. ``layers["interval_low"]`` and ``["interval_high"]``:
        posterior interval, from averages over ``n_samples / n_posterior_samples`` basal states.
        ``obs``: ``"effect_norm"``, the posterior mean of the Euclidean norm over genes, and its
        interval ``"effect_norm_low"`` and ``"effect_norm_high"``. ``uns["ate"]``: method, units and
        settings. Without ``interval`` there is none of the ``_low`` and ``_high``.

        Raises
        ------
        UnknownPerturbationError
            If a label names a perturbation that was not trained on, or a combination where the
            model takes combinations for perturbations of their own.
        SAMSError
            If the method needs counts and the likelihood has none, or an argument is of the wrong
            type or out of range.

        Examples
        --------
        A combination that no cell carries, in any order of its names:

        >>> ate = model.predict_ate(["P001", "P002+P001"], n_samples=200)
        >>> ate.to_df().shape
        (2, 100)
        >>> bool((ate.layers["interval_low"] <= ate.layers["interval_high"]).all())
        True
        >>> ate.uns["ate"]["method"]
        'lognorm'

        The control has no effect:

        >>> float(abs(model.predict_ate(["control"], method="mean").X).max())
        0.0

        Unknown names are refused:

        >>> model.predict_ate(["P009"])
        Traceback (most recent call last):
        ...
        scvi_sams.exceptions.UnknownPerturbationError: Unknown perturbation: 'P009'. ...
        """
        check_sampling(n_samples, n_posterior_samples, basal)
        if interval is not None:
            check_number(above=0, below=1, interval=interval)
        self._check_if_trained(warn=True)
        labels = as_names(
            "perturbations", self.perturbations if perturbations is None else perturbations
        )
        requested = self._encode_requested(labels, dosages)
        statistic = Statistic(
            self.module.likelihood, method, library_size, target_sum, self.module.device
        )
        n_basal = max(1, round(n_samples / n_posterior_samples))
        arms = Arms(
            self.module, statistic, *self._basal_states(basal, n_posterior_samples, n_basal)
        )
        genes = pd.Index(self.get_var_names())
        names = ["X", *(_UNCERTAINTY[:1] if interval is None else _UNCERTAINTY)]
        tables = {n: np.empty((len(labels), len(genes)), np.float32) for n in names}
        norms = torch.empty(n_posterior_samples, len(labels), device=self.module.device)
        for row, shift in enumerate(self._drawn_shifts(requested, n_posterior_samples)):
            effects = arms.effect(shift)
            for name, value in zip(names, summary(effects, interval), strict=True):
                tables[name][row] = value.cpu().numpy()
            norms[:, row] = effects.norm(dim=1)

        obs = pd.DataFrame(_norm_columns(norms, interval), pd.Index(labels, name="perturbation"))
        result = AnnData(
            tables.pop("X"),
            obs=obs,
            var=pd.DataFrame(index=genes),
            layers=tables,
        )
        result.uns["ate"] = {
            **statistic.description(),
            "interval": "none" if interval is None else interval,  # not every anndata writes None
            "n_samples": n_posterior_samples * n_basal,
            "n_posterior_samples": n_posterior_samples,
            "basal": basal,
        }
        if key_added is not None:
            self._keep_effects(result, key_added, perturbations=np.array(labels))
        return result

    def _keep_effects(self, result: AnnData, key_added: str, **of_rows: np.ndarray) -> None:
        """Write a table of effects, and what names its rows, to ``uns`` of the training data."""
        if self.adata is None:
            return
        self.adata.uns[key_added] = {
            "effect": result.X.copy(),
            **{n: result.layers[n].copy() for n in _UNCERTAINTY if n in result.layers},
            **of_rows,
            "genes": np.array(result.var_names, dtype=str),
            **result.uns["ate"],
        }
        self.keep_provenance(self.adata, key_added)

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
            for ``"rate"`` and refuses ``"lognorm"``; its ``"counts"`` are drawn values.
        target_sum
            See ``output``.
        batch_size
            Cells per mini-batch; ``None`` for ``scvi.settings.batch_size``. With a seed, rates
            depend neither on it nor on the order of ``indices``; drawn counts do.

        Returns
        -------
        AnnData, (labels x cells) x genes, labels slowest. ``obs["perturbation"]`` the label,
        ``obs["source_cell"]`` the name of the cell it starts from. ``uns["prediction"]`` says what
        ``X`` holds.

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

        Ten other cells, without the perturbation that they have:

        >>> model.predict(
        ...     ["control"], indices=np.flatnonzero(adata.obs["perturbation"] == "P001")[:10]
        ... ).shape
        (10, 100)
        """
        check_choice("output", output, ("lognorm", "rate", "counts"))
        check_number(above=0, target_sum=target_sum)
        self._check_if_trained(warn=True)
        likelihood = self.module.likelihood
        if output == "lognorm" and not likelihood.is_count_likelihood:
            raise SAMSError("A normal likelihood has no counts to normalise: use output='rate'.")
        labels = as_names("perturbations", perturbations)
        requested = self._encode_requested(labels, dosages)
        if adata is None:
            self._check_has_data("adata")
        from_controls = adata is None and indices is None
        adata = self._validate_anndata(adata)
        positions = self._control_cells() if from_controls else self._indices(adata, indices)
        own_rows = self._perturbations_of(adata, positions)
        shape = (len(requested.codes), len(positions), adata.n_vars)
        values = np.empty(shape, dtype=np.float32)
        own = self.module.global_posterior(own_rows, 1).shifts
        targets = list(self._drawn_shifts(requested, 1))
        # For all cells at once: what a generator gives depends on how many numbers are asked for.
        noise = torch.randn(len(positions), self.module.n_latent, device=self.module.device)
        start = 0
        for place, cells in self._cells(adata, positions, batch_size):
            own_shift = sum_over_slots(own, positions_in(own_rows, cells.codes), cells.doses)
            qz = self.module.encode(cells.x, own_shift, cells.covariates)
            z_basal = qz.loc + qz.scale * noise[start : start + len(place)]
            start += len(place)
            for label, shift in enumerate(targets):
                logits = self.module.decode(z_basal, shift[:, None], cells.covariates)
                if output == "counts":
                    expression = likelihood.sample(logits, cells.size)
                else:
                    expression = likelihood.rate(logits)
                    if output == "lognorm":
                        expression = torch.log1p(target_sum * expression)
                values[label, place] = expression[0].cpu().numpy()
        return self._counterfactual_cells(values, labels, adata, positions, output, target_sum)

    def _counterfactual_cells(
        self,
        values: np.ndarray,
        labels: list[str],
        adata: AnnData,
        positions: np.ndarray,
        output: str,
        target_sum: float,
    ) -> AnnData:
        n_labels, n_cells, n_genes = values.shape
        sources = np.tile(np.asarray(adata.obs_names)[positions], n_labels)
        names = np.repeat(labels, n_cells)
        flat = values.reshape(n_labels * n_cells, n_genes)
        labelled = [f"{name}:{source}" for name, source in zip(names, sources, strict=True)]
        counts = output == "counts" and self.module.likelihood.is_count_likelihood
        cells = AnnData(
            sparse.csr_matrix(flat) if counts else flat,
            obs=pd.DataFrame(
                {"perturbation": pd.Categorical(names), "source_cell": sources},
                index=make_index_unique(pd.Index(labelled)),  # a cell may be asked for twice
            ),
            var=pd.DataFrame(index=adata.var_names),
        )
        cells.uns["prediction"] = {"output": output}
        if output == "lognorm":
            cells.uns["prediction"] |= {"target_sum": target_sum, "log": "natural, log(1 + x)"}
        return cells

    def _basal_states(
        self, basal: str, n_posterior: int, n_basal: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Basal states ``(n_posterior, n_basal, n_latent)``, covariates to go with them."""
        n_draws = n_posterior * n_basal
        z_basal = torch.randn(n_draws, self.module.n_latent, device=self.module.device)
        shape = (n_posterior, n_basal, -1)
        if basal == "prior" and not self.module.covariates.n_out:
            return z_basal.reshape(shape), None
        self._check_has_data("basal")
        control = self._control_cells()
        if basal == "control" and not len(control):
            raise MissingControlError(
                "The data has no control cells to take basal states from. Use basal='prior'."
            )
        sources = control if len(control) else np.arange(self.adata.n_obs)
        chosen = torch.randint(len(sources), (n_draws,)).numpy()
        covariates = z_basal.new_empty(n_draws, self.module.covariates.n_out)
        for place, cells in self._cells(self.adata, sources[chosen], None):
            if basal == "control":
                no_shift = torch.zeros(1, 1, self.module.n_shift, device=self.module.device)
                qz = self.module.encode(cells.x, no_shift, cells.covariates)
                z_basal[place] = draw_particles(qz, 1)[0]
            if cells.covariates is not None:
                covariates[place] = cells.covariates
        return (
            z_basal.reshape(shape),
            covariates.reshape(shape) if self.module.covariates.n_out else None,
        )

    def _check_has_data(self, argument: str) -> None:
        if self.adata is None:
            raise SAMSError(
                f"The model was loaded without data, which `{argument}` needs here: load it with "
                "`adata`, or pass data."
            )

    def _drawn_shifts(self, requested: Labels, n_draws: int) -> Iterator[torch.Tensor]:
        """Yield the total shift of each label in ``n_draws`` posterior samples."""
        device = self.module.device
        rows = torch.as_tensor(
            np.unique(requested.codes[requested.codes >= 0]).astype(np.int64), device=device
        )
        # Drawn for few at a time, which saves memory, and kept, as labels may share perturbations.
        table = torch.cat(
            [
                self.module.global_posterior(some, n_draws).shifts.transpose(0, 1).flatten(1)
                for some in rows.split(_PERTURBATIONS_AT_ONCE)
            ]
        )
        n_shift = self.module.n_shift
        n_labels = max(1, _SHIFTS_AT_ONCE // (n_draws * n_shift))
        for start in range(0, len(requested.codes), n_labels):
            labels = slice(start, start + n_labels)
            codes = torch.as_tensor(requested.codes[labels].astype(np.int64), device=device)
            doses = torch.tensor(requested.doses[labels], device=device)  # a copy: they are kept
            shifts = sum_of_rows(table, positions_in(rows, codes), doses)
            yield from shifts.unflatten(1, (-1, n_shift)).expand(-1, n_draws, -1)


def _norm_columns(norms: torch.Tensor, interval: float | None) -> dict[str, np.ndarray]:
    """Columns of ``obs`` for norms of effects, ``(n_draws, n_labels)``."""
    columns = {"effect_norm": norms.mean(dim=0)}
    if interval is not None:
        low, high = bounds(norms, interval)
        columns |= {"effect_norm_low": low, "effect_norm_high": high}
    return {name: values.double().cpu().numpy() for name, values in columns.items()}
