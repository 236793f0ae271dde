"""The same embedding comes out of every kind of file; pickles and unnamed numbers do not."""

import gzip
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingKeyError,
    MissingPackageError,
    UnknownPerturbationError,
    UnreadableDataError,
)
from scvi_sams.features import from_embedding

NAMES = ["KLF1", "NA", "STAT1"]
VALUES = np.array([[0.5, -1.25], [3.0, 0.0], [1e-3, 7.0]])
TABLE = pd.DataFrame(VALUES, index=NAMES, columns=["dim_0", "dim_1"])


def write_text(path):
    TABLE.to_csv(path, sep="," if ".csv" in path.name else "\t")


def write_as_r_does(path):
    """Without a name for the column of names."""
    lines = TABLE.to_csv(sep="\t").split("\n")
    path.write_text("\n".join([lines[0].lstrip("\t"), *lines[1:]]))


def write_npz(path):
    np.savez(path, embedding=VALUES.astype(np.float32), genes=np.array(NAMES))


def write_npz_with_more(path):
    np.savez(path, other=np.ones((2, 2)), a=VALUES, genes=np.array(NAMES, "S"), n=np.array(["x"]))


def write_npz_by_name(path):
    np.savez(path, **dict(zip(NAMES, VALUES, strict=True)))


def anndata():
    adata = ad.AnnData(VALUES, obs=TABLE[[]], var=TABLE.T[[]])
    adata.obsm["a"] = VALUES
    adata.obsm["frame"] = TABLE
    adata.obsm["sparse"] = sparse.csr_matrix(VALUES)
    return adata


def write_h5ad(path):
    anndata().write_h5ad(path)


@pytest.mark.parametrize(
    ("name", "write", "key"),
    [
        ("e.csv", write_text, None),
        ("e.tsv", write_text, None),
        ("v1.2.csv.gz", write_text, None),
        ("e.TSV.gz", write_text, None),
        ("e.tsv", write_as_r_does, None),
        ("e.npz", write_npz, None),
        ("e.npz", write_npz_with_more, "a"),
        ("e.npz", write_npz_by_name, None),
        ("e.h5ad", write_h5ad, None),
        ("e.h5ad", write_h5ad, "a"),
        ("e.h5ad", write_h5ad, "frame"),
        ("e.h5ad", write_h5ad, "sparse"),
    ],
)
def test_the_same_embedding_from_any_file(tmp_path, name, write, key):
    write(tmp_path / name)
    table = from_embedding(tmp_path / name, key=key)
    assert table.index.tolist() == NAMES
    np.testing.assert_array_equal(table.to_numpy(), VALUES.astype(np.float32))
    kind = pd.SparseDtype("float32", 0.0) if key == "sparse" else np.dtype("float32")
    assert set(table.dtypes) == {kind}
    some = from_embedding(tmp_path / name, key=key, genes=["STAT1", "GATA1", "KLF1"])
    assert some.index.tolist() == ["STAT1", "KLF1"]
    np.testing.assert_array_equal(some.to_numpy(), VALUES[[2, 0]].astype(np.float32))


def test_columns_are_those_of_the_file_or_numbered_by_the_key(tmp_path):
    write_h5ad(tmp_path / "e.h5ad")
    write_npz(tmp_path / "e.npz")
    assert list(from_embedding(tmp_path / "e.h5ad")) == ["dim_0", "dim_1"]
    assert list(from_embedding(tmp_path / "e.h5ad", key="a")) == ["a_0", "a_1"]
    assert list(from_embedding(tmp_path / "e.npz")) == ["dim_0", "dim_1"]


def test_none_of_the_genes_is_told(tmp_path):
    write_text(tmp_path / "e.csv")
    with pytest.raises(UnknownPerturbationError, match="none of 'klf1', but 'KLF1', 'NA', 'STAT1'"):
        from_embedding(tmp_path / "e.csv", genes=["klf1"])
    TABLE.T.to_csv(tmp_path / "t.csv")
    with pytest.raises(UnknownPerturbationError, match=r"transpose the table"):
        from_embedding(tmp_path / "t.csv", genes=["KLF1"])


@pytest.mark.parametrize("name", ["e.pkl", "e.pickle", "e.pt", "e.PTH", "e.joblib", "e.pkl.gz"])
def test_pickles_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(dict(zip(NAMES, VALUES, strict=True))))
    with pytest.raises(InvalidArgumentError, match=r"can run arbitrary code.* np.savez"):
        from_embedding(tmp_path / name)


def test_objects_in_an_npz_are_pickles_too(tmp_path):
    np.savez(tmp_path / "e.npz", names=np.array(NAMES, dtype=object), matrix=VALUES)
    with pytest.raises(InvalidArgumentError, match=r"Python objects, which are pickles.*dtype=str"):
        from_embedding(tmp_path / "e.npz")


NPZ = [
    (
        {"names": np.array(NAMES), "a": VALUES, "b": VALUES},
        InvalidArgumentError,
        "several matrices: 'a', 'b'. Choose one by `key`",
    ),
    ({"a": VALUES}, UnreadableDataError, r"It contains 'a' of shape \(3, 2\) and type float64"),
    ({"names": np.array(NAMES[1:]), "a": VALUES}, UnreadableDataError, "names of its rows"),
    ({"A": np.ones(2), "B": np.ones(3)}, InvalidArgumentError, r"different lengths: 2 \('A'\)"),
    ({"a": np.ones((2, 2, 2))}, UnreadableDataError, "needs a matrix"),
    (
        {"names": np.array(["A", "A", "B"]), "a": VALUES},
        InvalidArgumentError,
        "several rows of 'A'",
    ),
]


@pytest.mark.parametrize(("arrays", "error", "message"), NPZ)
def test_what_is_wrong_with_an_npz_is_told(tmp_path, arrays, error, message):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(error, match=message):
        from_embedding(tmp_path / "e.npz")


TEXTS = [
    ("KLF1,0.5,1.5\nSTAT1,0.1,0.2\n", UnreadableDataError, "no header: its first line is '0.5'"),
    ("gene,x\nA,1\nB,\n", InvalidArgumentError, "`e.csv` is nan for 'B' in column 'x'"),
    ("gene,x\nA,1\nB,nan\n", InvalidArgumentError, "`e.csv` must be numbers; .*: 'x'"),
    ("gene,x\nA,1\nB,high\n", InvalidArgumentError, "`e.csv` must be numbers; .*: 'x'"),
    ("gene,x\nA,1\nA,2\n", InvalidArgumentError, "`e.csv` has several rows of 'A'"),
    ("gene,x\n,1\nA,2\n", InvalidArgumentError, "`e.csv` has no name in row 0"),
    ("gene\nA\nB\n", InvalidArgumentError, "`e.csv` has no columns"),
    ("", UnreadableDataError, "cannot be read as .csv: No columns"),
    ("gene,x\nA,1\nB,1,2,3\n", UnreadableDataError, "cannot be read as .csv"),
]


@pytest.mark.parametrize(("text", "error", "message"), TEXTS)
def test_what_is_wrong_with_a_text_is_told(tmp_path, text, error, message):
    (tmp_path / "e.csv").write_text(text)
    with pytest.raises(error, match=message):
        from_embedding(tmp_path / "e.csv")


@pytest.mark.parametrize("name", ["e.npz", "e.h5ad", "e.csv.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01nonsense", gzip.compress(b"a,b\n" * 99, mtime=0)[:-9]]
)
def test_damaged_files_are_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableDataError, match=r"cannot be read as \."):
        from_embedding(tmp_path / name)


def test_keys_and_endings_that_do_not_exist_are_told(tmp_path):
    write_h5ad(tmp_path / "e.h5ad")
    write_npz(tmp_path / "e.npz")
    write_text(tmp_path / "e.csv")
    with pytest.raises(
        MissingKeyError, match=r"in obsm that is called 'b'. There are 'a', 'frame'"
    ):
        from_embedding(tmp_path / "e.h5ad", key="b")
    with pytest.raises(MissingKeyError, match=r"'genes'. There are 'embedding'"):
        from_embedding(tmp_path / "e.npz", key="genes")
    with pytest.raises(InvalidArgumentError, match=r"`key` is for \.npz and \.h5ad files; \.csv"):
        from_embedding(tmp_path / "e.csv", key="a")
    with pytest.raises(InvalidArgumentError, match=r"end in one of '\.csv'.*, not '\.xlsx'"):
        from_embedding(tmp_path / "e.xlsx")
    with pytest.raises(UnreadableDataError, match="There is no file"):
        from_embedding(tmp_path / "none.csv")
    adata = anndata()
    adata.X = None
    adata.write_h5ad(tmp_path / "without.h5ad")
    with pytest.raises(InvalidArgumentError, match=r"has no X.*'a', 'frame', 'sparse'"):
        from_embedding(tmp_path / "without.h5ad")


@pytest.mark.parametrize("stored", [TABLE, TABLE.rename_axis("gene").reset_index()])
def test_names_in_parquet_are_the_index_or_the_only_text(tmp_path, monkeypatch, stored):
    (tmp_path / "e.parquet").touch()
    monkeypatch.setattr(pd, "read_parquet", lambda path: stored)
    table = from_embedding(tmp_path / "e.parquet")
    pd.testing.assert_frame_equal(table, TABLE.astype("float32"), check_names=False)


def test_parquet_is_read(tmp_path):
    pytest.importorskip("pyarrow")
    TABLE.to_parquet(tmp_path / "e.parquet")
    table = from_embedding(tmp_path / "e.parquet")
    pd.testing.assert_frame_equal(table, TABLE.astype("float32"), check_names=False)


def test_parquet_without_names_or_pyarrow_is_told(tmp_path, monkeypatch):
    (tmp_path / "e.parquet").touch()
    monkeypatch.setattr(pd, "read_parquet", lambda path: TABLE.reset_index(drop=True))
    with pytest.raises(UnreadableDataError, match=r"its only column of text; .* are none"):
        from_embedding(tmp_path / "e.parquet")

    def without_pyarrow(path):
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", without_pyarrow)
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        from_embedding(tmp_path / "e.parquet")
