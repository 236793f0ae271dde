"""Record of a model: settings, trainings, versions, and the card made from them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from scvi import settings
from scvi.model.base import BaseModelClass

from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._plurals import counted
from scvi_sams._versions import installed_versions
from scvi_sams.data._manager import ADATA_LOCK
from scvi_sams.features._table import FeatureTable

_OF_THE_SPLIT = ("train_size", "validation_size", "shuffle_set_split", "datasplitter_kwargs")
_OF_THE_MACHINE = ("accelerator", "devices", "load_sparse_tensor", "datamodule")

_LIMITS = """\
- It can predict only the perturbations named above. Unknown names raise an error.
- Effects are those in the training cells: for another cell type, time or dose they may differ.
- Latent dimensions have no names, and can differ between trainings.
- `load` unpickles `model.pt`, which can execute code: load only files from people you trust."""


def model_record(model: BaseModelClass) -> dict[str, Any]:
    """Provenance of a model, as in ``provenance``."""
    given = model.init_params_
    made_with = dict(given["non_kwargs"])
    for further in given["kwargs"].values():
        made_with |= further
    return _as_json(
        {
            "model": type(model).__name__,
            "settings": {k: v for k, v in made_with.items() if k != "registry"},
            "setup": model.registry_[SETUP_ARGUMENTS_KEY],
            "trainings": model.trainings_,
        }
    )


def is_result_of(model: BaseModelClass, adata: AnnData, key: str) -> bool:
    """Whether a result in an AnnData was recorded by this model since its last training."""
    records = adata.uns.get(RESULT_KEYS.PROVENANCE, {})
    return bool(records.get(key) == json.dumps(model.provenance))


def keep_record(adata: AnnData, key: str, record: Mapping[str, Any]) -> None:
    """Write the provenance of the result ``key`` to ``adata.uns``, as JSON."""
    with ADATA_LOCK:
        records = dict(adata.uns.get(RESULT_KEYS.PROVENANCE, {}))
        adata.uns[RESULT_KEYS.PROVENANCE] = records | {key: json.dumps(record)}


def training_record(model: BaseModelClass, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the last training by the arguments of ``train``, except split and hardware."""
    left_out = (*_OF_THE_SPLIT, *_OF_THE_MACHINE)
    given = {k: v for k, v in arguments.items() if v is not None and k not in left_out}
    if "plan_kwargs" in given:
        plan = given["plan_kwargs"].items()
        given["plan_kwargs"] = {k: v for k, v in plan if k != "checkpoint_of"}
    return _as_json(
        {
            "settings": given,
            "n_training_cells": len(model.train_indices),
            "n_epochs": model.trainer.current_epoch,
            "ending": model.trainer.lightning_module.ending,
            "seed": settings.seed,
            "versions": installed_versions(),
        }
    )


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """Copy a record as plain values; objects, such as a configuration, are described."""
    return json.loads(json.dumps(record, default=_as_plain))


def _as_plain(value: Any) -> Any:
    """Convert numpy numbers and arrays to plain ones, and anything else to a description.

    Tables of features may have millions of entries: their hash is stored.
    """
    if isinstance(value, FeatureTable):
        shape = {"perturbations": len(value), "features": value.n_features}
        return {**shape, "sha256": value.digest}
    if hasattr(value, "tolist"):
        return value.tolist()
    # The default text has an address in memory, which differs in every run.
    kind = type(value)
    return kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(value)


def model_card(model: BaseModelClass, description: str | None, license: str | None) -> str:
    """Describe a model in Markdown, as in ``card``."""
    record = model.provenance
    name = record["model"]
    summary = (inspect.getdoc(type(model)) or "").partition("\n\n")[0].replace("\n", " ")
    sections = [
        _header(name, record["trainings"], license),
        f"# {name}",
        description or "No description was given.",
        summary,
        "## Data",
        _data_lines(model),
        "## Settings",
        _block({"model": record["settings"], "setup_anndata": record["setup"]}),
        "## Trainings",
        _block(record["trainings"]),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _data_lines(model: BaseModelClass) -> str:
    sizes = model.summary_stats
    cells = model.module.cells_per_perturbation.cpu().numpy().astype(int)
    spread = f"{cells.min()} / {int(np.median(cells))} / {cells.max()}"
    lines = [
        f"- {counted(int(sizes['n_cells']), 'cell')}, {counted(int(sizes['n_vars']), 'gene')}",
        f"- {counted(len(model.perturbations), 'perturbation')}; training cells per perturbation: "
        f"{spread} (min / median / max)",
        f"- their names: {', '.join(model.perturbations)}",
    ]
    if model.unmeasured:
        lines.append(
            f"- {counted(len(model.unmeasured), 'perturbation')} without cells, predicted from "
            f"their features: {', '.join(model.unmeasured)}"
        )
    return "\n".join(lines)


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
