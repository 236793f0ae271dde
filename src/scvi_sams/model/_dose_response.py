"""Effects over a grid of doses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._checks import as_names, check_integer
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidDosageError, UnknownPerturbationError
from scvi_sams.model._arms import Method
from scvi_sams.model._counterfactual import CounterfactualMixin


class DoseResponseMixin(CounterfactualMixin):
    """Adds :meth:`predict_dose_response` to models that are linear in the dose."""

    def predict_dose_response(
        self,
        perturbations: Sequence[str] | None = None,
        doses: Sequence[float] | np.ndarray | None = None,
        *,
        n_doses: int = 11,
        method: Method = "lograte",
        n_samples: int = 5000,
        n_posterior_samples: int = 100,
        basal: Literal["prior", "control"] = "prior",
        library_size: float = 1e4,
        target_sum: float = 1e4,
        interval: float | None = 0.95,
        key_added: str | None = RESULT_KEYS.DOSE_RESPONSE,
    ) -> AnnData:
        """Predict average treatment effects over a grid of doses.

        Latent shifts are linear in the dose as it was registered; expression follows by the
        decoder, so that curves may bend or saturate. All doses share basal states, masks and
        effects, hence curves are smooth.

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
            Key of ``adata.uns`` of the training data that the tables are written to (as a dict of
            arrays); ``None`` writes nothing.

        Returns
        -------
        AnnData, (perturbations x doses) x genes, as :meth:`predict_ate` returns it.
        ``obs["perturbation"]``, ``obs["dose"]``, and ``obs["is_measured_range"]``: whether training
        cells had both smaller (0 counts) and larger doses of the perturbation, so that nothing is
        extrapolated.

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
        >>> curves.obs["dose"].tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0]
        >>> float(abs(curves.X[0]).max())  # dose 0
        0.0
        """
        self._check_has_doses()
        names = as_names(
            "perturbations", self.perturbations if perturbations is None else perturbations
        )
        largest = self._largest_doses(names)
        grids = [_grid(doses, n_doses, maximum) for maximum in largest]
        labels = np.repeat(names, [len(grid) for grid in grids])
        grid = np.concatenate(grids)
        if method == "lograte" and not self.module.likelihood.is_count_likelihood:
            method = "mean"
        with warnings.catch_warnings():
            # They are until the doses become part of them.
            warnings.filterwarnings("ignore", message="Observation names are not unique")
            result = self.predict_ate(
                list(labels),
                dosages=list(grid),
                method=method,
                n_samples=n_samples,
                n_posterior_samples=n_posterior_samples,
                basal=basal,
                library_size=library_size,
                target_sum=target_sum,
                interval=interval,
                key_added=None,
            )
        result.obs["perturbation"] = labels
        result.obs["dose"] = grid
        result.obs["is_measured_range"] = grid <= np.repeat(largest, [len(g) for g in grids])
        result.obs_names = [f"{name}@{dose:g}" for name, dose in zip(labels, grid, strict=True)]
        if key_added is not None:
            self._keep_effects(result, key_added, perturbations=labels.copy(), doses=grid.copy())
        return result

    def _check_has_doses(self) -> None:
        self._check_has_data("doses")
        arguments = self._setup_arguments
        doses = registered_labels(self.adata_manager).doses
        registered = arguments["dosage_key"] or arguments["dosage_obsm_key"]
        if not registered or np.isin(doses, (0, 1)).all():
            raise InvalidDosageError(
                "The perturbations were registered without doses"
                + (" (all are 0 or 1)" if registered else "")
                + ": there is nothing to draw a curve over. Register them with `dosage_key` (or "
                "`dosage_obsm_key`) and train again."
            )

    def _largest_doses(self, names: list[str]) -> np.ndarray:
        vocabulary = pd.Index(self.perturbations)
        rows = vocabulary.get_indexer(pd.Index(names))
        if (rows < 0).any() or not names:
            unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
            raise UnknownPerturbationError(
                f"{', '.join(map(repr, unknown[:5])) or 'An empty list'} is not one of the model's "
                "perturbations. Curves are those of single perturbations; for combinations pass "
                "`dosages` to predict_ate."
            )
        labels = registered_labels(self.adata_manager)
        codes, doses = labels.codes, labels.doses
        largest = np.zeros(len(vocabulary))
        carried = codes >= 0
        np.maximum.at(largest, codes[carried], doses[carried])
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
