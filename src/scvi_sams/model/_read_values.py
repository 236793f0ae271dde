"""Check values when a model first reads them, and detect later changes."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from scvi_sams._compat import ADATA_UUID_KEY
from scvi_sams.data._fingerprint import values_digest
from scvi_sams.data._manager import ScreenManager
from scvi_sams.exceptions import ChangedDataError, SAMSError
from scvi_sams.model._registration import registered_values, validate_values
from scvi_sams.module._likelihoods import LIKELIHOODS

_ADVICE = (
    "Normalise, filter or relabel a copy (adata.copy()), and keep counts in a separate layer "
    "(adata.layers['counts'] = adata.X.copy()). To continue, restore the values, or read the data "
    "again and load a saved model with them; for a model of the new values call `setup_anndata` "
    "and train again."
)


class ReadValues:
    """Expression that a model has read, from its own data and others.

    scvi-tools reads ``X``, a layer and size factors from the AnnData each time, but labels as
    registered. Neither may change in between.

    Parameters
    ----------
    given
        Arguments of ``setup_anndata``.
    gene_likelihood
        Likelihood that the values must fit.
    """

    def __init__(self, given: dict[str, Any], gene_likelihood: str) -> None:
        self._given = given
        self._counts = LIKELIHOODS[gene_likelihood].is_count_likelihood
        self._digests: dict[str, str] = {}

    def validate(self, adata: AnnData) -> None:
        """Raise if values do not fit the likelihood."""
        validate_values(adata, self._given, counts=self._counts)

    def validate_once(self, manager: ScreenManager) -> None:
        """Validate the values of registered data unless already done."""
        if manager.id not in self._digests:
            self.validate(manager.adata)
            self._digests[manager.id] = self._digest(manager.adata)

    def changes(self, manager: ScreenManager) -> list[str]:
        """Name what changed since it was registered, or first read."""
        changed = manager.changes()
        if self._digests.get(manager.id) not in (None, self._digest(manager.adata)):
            changed.append(registered_values(manager.adata, self._given)[1])
        return changed

    def check_unchanged(self, manager: ScreenManager | None) -> None:
        """Raise if registered data changed, with the error that a copy of them would raise."""
        changed = [] if manager is None else self.changes(manager)
        if manager is None or not changed:
            return
        told = f"{' and '.join(changed)} changed since the model read the data"
        try:
            manager.check_as_learned()
            self.validate(manager.adata)
        except SAMSError as error:
            raise type(error)(f"{told}: {error} {_ADVICE}") from error
        raise ChangedDataError(f"{told}. {_ADVICE}")

    def forget_if_changed(self, managers: dict[str, ScreenManager], adata: AnnData) -> None:
        """Drop the registration of other data that changed since, so that they get a new one.

        ``managers`` are those of the model, by the identifier of their AnnData.
        """
        manager = managers.get(adata.uns.get(ADATA_UUID_KEY, ""))
        if manager is not None and manager.adata is adata and self.changes(manager):
            del managers[manager.adata_uuid]

    def _digest(self, adata: AnnData) -> str:
        return values_digest(*registered_values(adata, self._given))
