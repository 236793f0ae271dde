"""Morgan fingerprints of drugs."""

import sys

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import InvalidArgumentError, MissingPackageError
from scvi_sams.features import from_smiles

SMILES = {"ethanol": "CCO", "water": "O", "aspirin": "CC(=O)Oc1ccccc1C(=O)O"}


def test_without_rdkit_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingPackageError, match=r'pip install "scvi-sams\[chem\]"') as raised:
        from_smiles(SMILES)
    assert isinstance(raised.value, ImportError)


@pytest.mark.parametrize("smiles", [None, "CCO", ["CCO"], {}, pd.Series(dtype=object)])
def test_smiles_need_names(smiles):
    with pytest.raises(InvalidArgumentError, match="dict or Series of SMILES by the names"):
        from_smiles(smiles)


def test_bits_are_those_of_distinct_surroundings():
    pytest.importorskip("rdkit")
    table = from_smiles(SMILES, n_bits=4096)
    assert table.shape == (3, 4096)
    assert set(table.dtypes) == {np.dtype("float32")}
    assert set(np.unique(table)) == {0, 1}
    # Of ethanol: three atoms that differ; around each end the bond to the middle, which sees all.
    # Two bonds away nothing is new.
    assert table.sum(axis=1).loc[["ethanol", "water"]].tolist() == [6, 1]
    assert from_smiles(SMILES, n_bits=4096, radius=0).loc["ethanol"].sum() == 3


def test_the_way_a_molecule_is_written_plays_no_part():
    pytest.importorskip("rdkit")
    names = {"a": "OCC", "b": "C(O)C", "c": " CCO"}
    pd.testing.assert_frame_equal(
        from_smiles(pd.Series(names)), from_smiles(dict.fromkeys(names, "CCO"))
    )


def test_invalid_smiles_are_named(capfd):
    pytest.importorskip("rdkit")
    wrong = {
        "good": "C",
        "open": "C1CC",
        "pentavalent": "C(C)(C)(C)(C)C",
        "none": None,
        "blank": " ",
    }
    with pytest.raises(
        InvalidArgumentError, match=r"4 of 5 SMILES .*: 'C1CC' \(open\), "
    ) as raised:
        from_smiles(wrong)
    assert "None (none), ' ' (blank)" in str(raised.value)
    assert capfd.readouterr().err == ""
    twice = pd.Series(["C", "CC"], index=["a", "a"])
    with pytest.raises(InvalidArgumentError, match="several rows of 'a'"):
        from_smiles(twice)
