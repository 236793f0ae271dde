"""The summary page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scvi_sams.cli._figures import RunFigure, called_entries, strongest_latents
from scvi_sams.interpretation._programs import top_genes
from scvi_sams.interpretation._tables import MEANINGS
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.pages._page import write_page

_MOST_ROWS = 50
_MOST_LATENTS = 12
_MOST_GENES = 8
_HITS = {
    "is_hit": "hit",
    "n_cells": "training cells",
    "q_value": "q-value",
    "active_latents": "active latents",
    "effect_norm": "effect size",
    "genes_up": "genes up",
    "genes_down": "genes down",
    "confounded": "confounded with",
}
_KNOCKDOWN = {
    "gene": "gene",
    "n_cells": "cells",
    "lfc": "log2 fold change",
    "lfc_low": "low",
    "lfc_high": "high",
    "observed": "observed",
}


def write_summary(
    path: Path,
    model: PerturbationModel,
    *,
    screen: str,
    command: str,
    fdr: float,
    tables: Mapping[str, pd.DataFrame],
    figures: Sequence[RunFigure],
    warnings: Sequence[str],
    files: Sequence[str],
) -> None:
    """Write ``summary.html``, one self-contained file."""
    hits = tables["hits"]
    summary = model.summary()
    facts = summary.drop(index="warnings", level="part", errors="ignore")["value"]
    of_model = summary["value"].get("warnings", pd.Series(dtype=object))
    write_page(
        path,
        "scvi_sams.cli",
        "summary.html.jinja",
        title=f"{type(model).__name__} of {Path(screen).name}",
        screen=screen,
        command=command,
        fdr=fdr,
        parts={
            part: list(rows.droplevel(0).items())
            for part, rows in facts.groupby(level=0, sort=False)
        },
        versions=model.provenance["trainings"][-1]["versions"],
        warnings=[*warnings, *of_model],
        n_hits=int(hits["is_hit"].sum()),
        n_perturbations=len(hits),
        units=hits.attrs["ate"]["units"],
        hits=_shown(hits, _HITS),
        n_rows=_MOST_ROWS,
        knockdown=_shown(tables["knockdown"], _KNOCKDOWN) if "knockdown" in tables else None,
        mechanisms=_mechanisms(tables, fdr),
        figures={one.name: one for one in figures},
        files={name: MEANINGS.get(Path(name).stem, "all tables as sheets") for name in files},
    )


def _shown(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The first rows, with their names, and those of the columns that the table has."""
    present = {name: title for name, title in columns.items() if name in table}
    shown = table[list(present)].head(_MOST_ROWS).rename(columns=present)
    if "hit" in shown:
        shown["hit"] = shown["hit"].map({True: "yes", False: "no"})
        # Smaller ones are 0 in double precision.
        shown["q-value"] = [f"{q:.1g}" if q > 0 else "< 1e-300" for q in shown["q-value"]]
        if (shown["confounded with"] == "").all():
            shown = shown.drop(columns="confounded with")
    return shown.rename_axis("perturbation").reset_index()


def _mechanisms(tables: Mapping[str, pd.DataFrame], fdr: float) -> pd.DataFrame | None:
    """One row per latent dimension in use: perturbations that shift it, and its genes."""
    if "masks" not in tables:
        return None
    called, effects = called_entries(tables, fdr), tables["effects_mean"]
    rows: list[dict[str, Any]] = []
    for name in strongest_latents(tables, fdr)[:_MOST_LATENTS]:
        movers = effects.loc[called[name], name].sort_values(key=abs, ascending=False)
        row: dict[str, Any] = {"latent": name.replace("_", " ")}
        row["perturbations"] = ", ".join(f"{who} ({by:+.1f})" for who, by in movers.items())
        program = tables["programs"][[name]]
        row["genes up"] = ", ".join(top_genes(program, _MOST_GENES, direction="up")["gene"])
        row["genes down"] = ", ".join(top_genes(program, _MOST_GENES, direction="down")["gene"])
        rows.append(row)
    columns = ["latent", "perturbations", "genes up", "genes down"]
    return pd.DataFrame(rows, columns=columns)
