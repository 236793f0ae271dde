"""Files of results: what is in them is what the model says."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
import scvi

from interpretation.builders import train_until_called
from model.builders import small_screen, train_small
from scvi_sams import CPAVAE
from scvi_sams.exceptions import InvalidArgumentError, MissingPackageError, SavingError
from scvi_sams.interpretation import _export, export
from scvi_sams.interpretation._tables import MEANINGS, settings_table

FEW = {"n_samples": 200, "n_posterior_samples": 20}


@pytest.fixture(scope="module")
def model():
    """Trained long enough to find something; P001 bears the name of a gene."""
    return train_until_called(["P001", "SEPT2"])


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("tables") / "new", **FEW)


def test_every_table_is_a_file_of_its_name(paths):
    assert set(paths) == set(MEANINGS)
    assert all(path.name == f"{name}.csv" for name, path in paths.items())
    (folder,) = {path.parent for path in paths.values()}
    assert sorted(folder.iterdir()) == sorted(paths.values())


def test_files_hold_what_the_model_says(model, paths):
    read = {name: pd.read_csv(path, index_col=0) for name, path in paths.items()}
    effects = model.get_perturbation_effects(key_added=None)
    direct = model.get_direct_effects(key_added=None)
    for name, expected in (
        ("masks", model.get_perturbation_masks(key_added=None)),
        ("effects_mean", effects.mean),
        ("effects_sd", effects.sd),
        ("programs", model.get_latent_programs(key_added=None)),
    ):
        pd.testing.assert_frame_equal(
            read[name], expected, check_dtype=False, check_names=False, rtol=1e-5
        )
    assert read["masks"].index.name == "perturbation"
    assert read["programs"].index.name == "gene"
    assert sorted(read["hits"].index) == sorted(model.perturbations)
    listed = pd.read_csv(paths["direct_effects"])
    assert len(listed) == (direct.lfsr < 0.05).to_numpy().sum() > 0
    for row in listed.itertuples():
        assert row.mean == pytest.approx(direct.mean.loc[row.perturbation, row.gene], rel=1e-4)
        assert row.lfsr < 0.05
    assert read["knockdown"].index.tolist() == ["P001"]
    assert len(read["guides"]) == 10
    assert len(read["contexts"]) == 10


def test_genes_are_those_called_and_the_best_founded_of_them(model, tmp_path):
    scvi.settings.seed = 0
    paths = export(model, tmp_path, n_genes=3, fdr=0.1, **FEW)
    genes = pd.read_csv(paths["differential_genes"])
    scvi.settings.seed = 0
    found = model.differential_expression(fdr_target=0.1, n_samples=200)
    n_called = found.groupby("group1", sort=False)["is_de_fdr_0.1"].sum()
    assert n_called.max() > 3
    listed = genes.groupby("perturbation")["rank"].max().reindex(n_called.index).fillna(0)
    assert listed.tolist() == n_called.clip(upper=3).tolist()
    assert genes["proba_de"].min() > 0.5
    assert genes["adj_p_value"].max() <= 0.1 + 1e-6
    for _, of_one in genes.groupby("perturbation"):
        assert of_one["rank"].tolist() == list(range(1, len(of_one) + 1))
        assert of_one["proba_de"].is_monotonic_decreasing


def test_many_perturbations_are_compared_in_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr("scvi_sams.interpretation._tables._AT_ONCE", 2)
    genes = pd.read_csv(export(model, tmp_path, **FEW)["differential_genes"])
    order = list(dict.fromkeys(genes["perturbation"]))
    assert order == [name for name in model.perturbations if name in order]
    assert len(order) > 2


def test_settings_are_those_on_record(model, paths):
    table = pd.read_csv(paths["settings"], index_col="setting", keep_default_na=False)["value"]
    assert table["model"] == "SAMSVAE"
    assert table["settings.n_latent"] == "4"
    assert table["setup.guide_key"] == "guide"
    assert table["trainings.1.n_epochs"] == "30"
    assert table["trainings.1.versions.scvi-tools"] == scvi.__version__
    nested = {"a": {"b": [1, 2], "c": {}}, "d": [{"e": None}, {"e": True}]}
    assert settings_table(nested).to_numpy().tolist() == [
        ["a.b", "1, 2"], ["a.c", "{}"], ["d.1.e", "None"], ["d.2.e", "True"],
    ]  # fmt: skip


def test_nothing_is_written_into_the_data(model, tmp_path):
    before = set(model.adata.uns), set(model.adata.varm)
    export(model, tmp_path, **FEW)
    assert (set(model.adata.uns), set(model.adata.varm)) == before


def test_a_workbook_has_the_tables_as_sheets(model, tmp_path):
    pytest.importorskip("openpyxl")
    paths = export(model, tmp_path, formats="xlsx", **FEW)
    assert list(paths) == ["results"]
    assert list(tmp_path.iterdir()) == [tmp_path / "results.xlsx"]
    sheets = pd.read_excel(paths["results"], sheet_name=None, index_col=0)
    assert set(sheets) == set(MEANINGS)
    masks = model.get_perturbation_masks(key_added=None)
    np.testing.assert_allclose(sheets["masks"].to_numpy(), masks, rtol=1e-6)
    assert sheets["programs"].index[1] == "SEPT2"  # no date
    both = export(model, tmp_path, formats=["csv", "xlsx"], overwrite=True, **FEW)
    assert set(both) == {"results", *MEANINGS}


def test_a_workbook_needs_its_package(model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openpyxl" else find(name)
    )
    with pytest.raises(MissingPackageError, match=r"scvi-sams\[excel\]"):
        export(model, tmp_path / "folder", formats="xlsx")
    assert not (tmp_path / "folder").exists()


def test_a_table_that_no_sheet_holds_is_an_error_before_anything_is_written(tmp_path):
    pytest.importorskip("openpyxl")
    table = pd.DataFrame({"a": np.zeros(1_048_576)})
    with pytest.raises(InvalidArgumentError, match="1,048,576 rows"):
        _export.write_tables({"masks": table}, tmp_path / "folder", ["csv", "xlsx"])
    assert not (tmp_path / "folder").exists()


def test_earlier_tables_are_replaced_only_if_asked_for(model, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    export(model, tmp_path, **FEW)
    first = (tmp_path / "guides.csv").read_text()
    with pytest.raises(SavingError, match=r"already has 'hits\.csv'.*overwrite=True"):
        export(model, tmp_path, **FEW)
    assert (tmp_path / "guides.csv").read_text() == first
    other = train_small(small_screen(), model_cls=CPAVAE)
    paths = export(other, tmp_path, overwrite=True, **FEW)
    # It has no masks, no guides, and no perturbation bears the name of a gene.
    absent = {"masks", "mask_q_values", "guides", "contexts", "knockdown"}
    assert absent.isdisjoint(paths)
    assert sorted(tmp_path.iterdir()) == sorted([notes, *paths.values()])
    assert notes.read_text() == "mine"


def test_a_normal_likelihood_has_no_differential_genes(tmp_path):
    normal = train_small(small_screen(), {"layer": "normalised"}, gene_likelihood="normal")
    paths = export(normal, tmp_path, **FEW)
    assert "differential_genes" not in paths
    assert "masks" in paths


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"formats": "parquet"}, "parquet"),
        ({"formats": []}, "empty"),
        ({"fdr": 2}, "`fdr`"),
        ({"n_genes": 0}, "`n_genes`"),
    ],
    ids=["format", "no format", "rate", "genes"],
)
def test_invalid_arguments_raise_before_work_starts(model, tmp_path, wrong, match):
    with pytest.raises(InvalidArgumentError, match=match):
        export(model, tmp_path / "folder", **wrong)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_the_name_of_a_file_is_an_error_that_names_the_format(model, tmp_path, kind):
    with pytest.raises(InvalidArgumentError, match=f"name of a file.*formats='{kind}'"):
        export(model, tmp_path / f"tables.{kind}")
    assert not any(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_an_error_before_work_starts(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavingError, match="is a file"):
        export(model, tmp_path / "file", **FEW)
