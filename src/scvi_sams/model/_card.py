"""The model card: what a saved model is, for whoever is handed it."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_sams.model._provenance import ProvenanceMixin

_LIMITS = """\
- It knows the perturbations named above and no others. Unknown names are refused.
- Effects are those of the cells it was trained on: another cell type, time or dose is a guess.
- Latent dimensions have no names. What they do can differ between trainings.
- `load` unpickles `model.pt`, which can execute code: load files of people you trust."""


class CardMixin(ProvenanceMixin):
    """Adds a description in Markdown."""

    if TYPE_CHECKING:

        @property
        def perturbations(self) -> list[str]: ...

    def card(self, *, description: str | None = None, license: str | None = None) -> str:
        """Describe the model in Markdown: data, settings, trainings, versions and limits.

        The text begins with the metadata that Hugging Face reads, so that it can be saved as
        ``README.md`` beside the model and handed to ``scvi.hub.HubModel``. The data need not be
        there.

        Parameters
        ----------
        description
            What the model is of and for: screen, cells, reference. Nobody but you knows it.
        license
            Of the model, such as ``"cc-by-4.0"``.

        Returns
        -------
        The card.

        Examples
        --------
        >>> card = model.card(description="CRISPR screen of cells that do not exist.")
        >>> "860 cells" in card and "8 perturbations" in card
        True
        """
        self._check_if_trained(warn=True)
        record = self.provenance
        name = record["model"]
        summary = (inspect.getdoc(type(self)) or "").partition("\n\n")[0].replace("\n", " ")
        sections = [
            _header(name, record["trainings"], license),
            f"# {name}",
            description or "No description was given.",
            summary,
            "## Data",
            self._data_lines(),
            "## Settings",
            _block({"model": record["settings"], "setup_anndata": record["setup"]}),
            "## Trainings",
            _block(record["trainings"]),
            "## Limits",
            _LIMITS,
        ]
        return "\n\n".join(sections) + "\n"

    def _data_lines(self) -> str:
        sizes = self.summary_stats
        cells = self.module.cells_per_perturbation.cpu().numpy().astype(int)
        spread = f"{cells.min()} / {int(np.median(cells))} / {cells.max()}"
        return "\n".join(
            [
                f"- {sizes['n_cells']:,} cells, {sizes['n_vars']:,} genes",
                f"- {len(self.perturbations):,} perturbations; cells of each that it was trained "
                f"on: {spread} (min / median / max)",
                f"- their names: {', '.join(self.perturbations)}",
            ]
        )


def _header(name: str, trainings: list[dict[str, Any]], license: str | None) -> str:
    tags = ["biology", "genomics", "single-cell", "perturbation", f"model_cls_name:{name}"]
    if trainings:
        versions = trainings[-1]["versions"]
        tags += [f"scvi_version:{versions['scvi-tools']}", f"anndata_version:{versions['anndata']}"]
    lines = ["---", "library_name: scvi-tools"]
    if license is not None:
        lines.append(f"license: {license}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _block(content: Any) -> str:
    return f"```json\n{json.dumps(content, indent=2)}\n```"
