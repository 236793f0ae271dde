"""Saved models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

from bad_input.cases import Case, legal, refused
from bad_input.situation import Situation, elbo, full_screen
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
    RegistrationError,
    SavingError,
    UnknownPerturbationError,
    UnreadableDataError,
)


def load(folder: Path, adata: Any = False, model_cls: Any = SAMSVAE, **options: Any) -> Any:
    return model_cls.load(folder, adata, accelerator="cpu", **options)


def after(spoil: Callable[[Path], Any], adata: Any = False) -> Callable[[Situation], Any]:
    """Load a saved model after something has happened to its folder."""

    def act(situation: Situation) -> Any:
        folder = situation.folder / "model"
        situation.shared.save(folder)
        spoil(folder)
        return load(folder, adata)

    return act


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def save_again(situation: Situation) -> None:
    folder = situation.folder / "model"
    situation.shared.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    try:
        situation.shared.save(folder)
    finally:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def save_below_a_file(situation: Situation) -> None:
    (situation.folder / "file").write_text("no folder")
    situation.shared.save(situation.folder / "file" / "model")


def save_with(change: Callable[[Any], None]) -> Callable[[Situation], Any]:
    """Save a model of its own with the data; nothing may be left, and a later save must work."""

    def act(situation: Situation) -> None:
        model = situation.train()
        folder = situation.folder / "new" / "model"
        kept = model.adata.copy()
        change(model.adata)
        try:
            model.save(folder, save_anndata=True)
        finally:
            assert not folder.parent.exists()
            situation.built = None
            model.save(folder)
            for slot in ("X", "obs", "var", "uns", "obsm"):
                setattr(model.adata, slot, getattr(kept, slot))

    return act


def column(values: Any, name: str = "new") -> Callable[[Any], None]:
    return lambda adata: adata.obs.insert(0, name, values)


def gene_column(values: Any) -> Callable[[Any], None]:
    return lambda adata: adata.var.insert(0, "new", values)


def in_uns(value: Any) -> Callable[[Any], None]:
    return lambda adata: adata.uns.update(mine=value)


def in_obsm(adata: Any) -> None:
    adata.obsm["new"] = pd.DataFrame({"a": [("x", 1)] * 24}, index=adata.obs_names)


def normalised(adata: Any) -> None:
    adata.X = adata.X / 3


def save_read_only(situation: Situation) -> None:
    """As a folder refuses that may not be written to; a superuser may write to any."""
    folder = situation.folder / "model"
    situation.shared.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    denied = PermissionError(13, "Permission denied")
    with mock.patch("tempfile.TemporaryDirectory", side_effect=denied):
        try:
            situation.shared.save(folder, overwrite=True)
        finally:
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def save_without_data(situation: Situation) -> None:
    situation.shared.save(situation.folder / "model")
    model = load(situation.folder / "model")
    try:
        model.save(situation.folder / "copy", save_anndata=True)
    finally:
        assert not (situation.folder / "copy").exists()


def load_with(change: Callable[[Any], Any]) -> Callable[[Situation], Any]:
    def act(situation: Situation) -> Any:
        situation.shared.save(situation.folder / "model")
        return load(situation.folder / "model", change(full_screen()))

    return act


def same_numbers(situation: Situation, model: Any) -> None:
    np.testing.assert_allclose(elbo(model), elbo(situation.shared), rtol=1e-5)


def has_no_data(situation: Situation, model: Any) -> None:
    assert model.adata is None
    assert model.perturbations == situation.shared.perturbations


def relabelled(adata: Any) -> Any:
    adata.obs["perturbation"] = ["Q", *adata.obs["perturbation"].iloc[1:]]
    return adata


CASES: list[Case] = [
    refused(
        "saving to an existing folder",
        save_again,
        SavingError,
        "already exists",
        "overwrite=True",
    ),
    refused(
        "`save`: an unknown argument",
        lambda situation: situation.shared.save(
            situation.folder / "model", save_anndata=True, as_dense="X"
        ),
        InvalidArgumentError,
        "`save` has no argument `as_dense`",
    ),
    refused(
        "saving where no folder can be created",
        save_below_a_file,
        SavingError,
        "file/model",
        "write",
    ),
    refused(
        "saving the AnnData of a model that was loaded without one",
        save_without_data,
        SavingError,
        "loaded without data",
    ),
    *(
        refused(
            f"`{name}` is {folder!r}", act, InvalidArgumentError, "`dir_path`", "path", repr(folder)
        )
        for folder in (None, "", 3)
        for name, act in (
            ("save(dir_path)", lambda situation, to=folder: situation.shared.save(to)),
            ("load(dir_path)", lambda situation, of=folder: load(of)),
        )
    ),
    *(
        refused(
            f"saving data with {what}", save_with(change), SavingError, where, "h5ad", "astype(str)"
        )
        for what, where, change in (
            ("a column of tuples", "adata.obs['new']", column([("x", 1)] * 24)),
            ("a column of text and numbers", "adata.obs['new']", column(["x", 1] * 12)),
            ("a column `_index`", "adata.obs['_index']", column(1, "_index")),
            ("a column of genes of sets", "adata.var['new']", gene_column([{1}] * 4)),
            ("a set in uns", "adata.uns['mine']['deep']", in_uns({"deep": {1, 2}})),
            ("a table of objects in obsm", "adata.obsm['new']['a']", in_obsm),
        )
    ),
    refused(
        "saving data that were normalised after training",
        save_with(normalised),
        InvalidCountsError,
        "adata.X",
        "fractional",
    ),
    refused(
        "saving again to a read-only folder",
        save_read_only,
        SavingError,
        "model",
        "Permission denied",
    ),
    refused(
        "loading a folder that does not exist",
        lambda situation: load(situation.folder / "nothing"),
        UnreadableDataError,
        "nothing",
        "no saved model",
    ),
    refused(
        "loading a folder without a model",
        after(lambda folder: (folder / "model.pt").rename(folder / "other.pt")),
        UnreadableDataError,
        "model.pt",
        "['other.pt']",
    ),
    *(
        refused(
            f"a file truncated to {share:.0%}",
            after(lambda folder, share=share: cut(folder / "model.pt", share)),
            UnreadableDataError,
            "model.pt",
            "damaged or incomplete",
        )
        for share in (0.0, 0.01, 0.5, 0.99)
    ),
    refused(
        "a text file named like a model",
        after(lambda folder: (folder / "model.pt").write_text("hello")),
        UnreadableDataError,
        "model.pt",
        "not a saved model",
    ),
    *(
        refused(
            f"a file of torch that holds {what}",
            after(lambda folder, content=content: torch.save(content, folder / "model.pt")),
            UnreadableDataError,
            "model.pt",
            "not a saved model",
        )
        for what, content in (
            ("a tensor", torch.zeros(2)),
            ("weights only", {"decoder.bias": torch.zeros(2)}),
        )
    ),
    refused(
        "a model of another class",
        lambda situation: (
            situation.shared.save(situation.folder / "model"),
            load(situation.folder / "model", model_cls=CPAVAE),
        ),
        UnreadableDataError,
        "a saved SAMSVAE, not a CPAVAE",
        "SAMSVAE.load",
    ),
    refused(
        "loading with an object that is not an AnnData",
        load_with(lambda adata: "screen.h5ad"),
        RegistrationError,
        "`adata` must be an AnnData",
    ),
    refused(
        "loading with other genes",
        load_with(lambda adata: adata[:, :3].copy()),
        MissingKeyError,
        "'g3'",
    ),
    refused(
        "loading with an unknown perturbation",
        load_with(relabelled),
        UnknownPerturbationError,
        "'Q'",
    ),
    refused(
        "damaged saved data",
        after(lambda folder: (folder / "adata.h5ad").write_text("hello"), adata=None),
        UnreadableDataError,
        "cannot be read",
        "`adata`",
    ),
    legal(
        "loading without data if none were saved",
        after(lambda folder: None, adata=None),
        "the model has no data, with a warning",
        has_no_data,
        warns=("no saved anndata",),
    ),
    legal("loading with the training data", load_with(lambda a: a), "same results", same_numbers),
]
