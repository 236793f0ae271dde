"""Gene sets of GMT files become memberships; what is no gene set is told with its line."""

import gzip

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import InvalidArgumentError, UnreadableDataError
from scvi_sams.features import from_gmt

# As MSigDB writes it: a link as description, lines of different lengths, no header.
GMT = (
    "HALLMARK_HEME_METABOLISM\thttps://example.org/HEME\tALAS2\tFECH\tHMBS\tKLF1\n"
    "HALLMARK_TNFA_SIGNALING\thttps://example.org/TNFA\tJUN\tFOS\tKLF1\n"
    "REACTOME_MAPK\t\tMAP2K6\tMAPK14\tJUN\tFOS\tMAP2K3\n"
    "GOBP_SMALL\tNA\tKLF1\tFOS\n"
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text(GMT)
    return path


def members(table):
    return {name: table.index[table[name] == 1].tolist() for name in table.columns}


def test_memberships_are_those_of_the_file(path):
    table = from_gmt(path, min_genes=3)
    assert members(table) == {
        "HALLMARK_HEME_METABOLISM": ["ALAS2", "FECH", "HMBS", "KLF1"],
        "HALLMARK_TNFA_SIGNALING": ["FOS", "JUN", "KLF1"],
        "REACTOME_MAPK": ["FOS", "JUN", "MAP2K3", "MAP2K6", "MAPK14"],
    }
    assert table.to_numpy().sum() == 12
    assert set(table.dtypes) == {pd.SparseDtype("float32", 0.0)}


def test_sets_are_kept_by_their_number_of_genes(path):
    assert list(from_gmt(path, min_genes=4, max_genes=4)) == ["HALLMARK_HEME_METABOLISM"]
    assert list(from_gmt(path)) == ["REACTOME_MAPK"]
    assert "ALAS2" not in from_gmt(path).index, "nothing is known of it"
    with pytest.raises(InvalidArgumentError, match=r"None of 4 gene sets has 6 to 500 genes; .* 5"):
        from_gmt(path, min_genes=6)


def test_sizes_count_the_given_genes_in_whose_order_rows_are(path):
    table = from_gmt(path, genes=["MAPK14", "GATA1", "FOS", "JUN", "ALAS2"], min_genes=2)
    assert members(table) == {
        "HALLMARK_TNFA_SIGNALING": ["FOS", "JUN"],
        "REACTOME_MAPK": ["MAPK14", "FOS", "JUN"],
    }
    assert table.index.tolist() == ["MAPK14", "FOS", "JUN"]
    with pytest.raises(InvalidArgumentError, match="genes of the 2 `genes`; the largest has 0"):
        from_gmt(path, genes=["fos", "jun"])


@pytest.mark.parametrize("name", ["sets.gmt.gz", "sets.gmt"])
def test_compressed_files_are_told_by_their_content(tmp_path, path, name):
    other = tmp_path / "other" / name
    other.parent.mkdir()
    other.write_bytes(gzip.compress(GMT.encode()))
    pd.testing.assert_frame_equal(from_gmt(other, min_genes=2), from_gmt(path, min_genes=2))


def test_line_ends_blank_lines_and_repeated_genes_change_nothing(tmp_path, path):
    other = tmp_path / "other.gmt"
    lines = GMT.replace("FECH", "FECH\tFECH\t").replace("FOS", " FOS ").split("\n")
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    pd.testing.assert_frame_equal(from_gmt(other, min_genes=2), from_gmt(path, min_genes=2))


def test_a_description_may_have_any_mark(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("S\tone\u2028two\x0cthree\tA\tB\n", encoding="utf-8")
    assert members(from_gmt(path, min_genes=1)) == {"S": ["A", "B"]}


def test_sets_of_the_same_name_are_kept_apart_and_told(tmp_path, path, caplog):
    other = tmp_path / "other.gmt"
    other.write_text("GOBP_SMALL\t\tALAS2\tJUN\n")
    table = from_gmt([path, other], min_genes=2, max_genes=2)
    assert members(table) == {"GOBP_SMALL": ["FOS", "KLF1"], "GOBP_SMALL#2": ["ALAS2", "JUN"]}
    assert "Several gene sets are called 'GOBP_SMALL'" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GMT + "NO_GENES\tdescription\n", "Line 5 of .* has no genes: 'NO_GENES"),
        (GMT + "EMPTY\t\t \t\n", "Line 5 of .* has no genes"),
        (GMT + "\tdescription\tFOS\n", "Line 5 of .* has no name"),
        ("gene,x\nFOS,1\n", "Line 1 of .* has no genes: 'gene,x'.*separated by tabs"),
    ],
)
def test_a_line_that_is_no_gene_set_is_named(tmp_path, text, message):
    path = tmp_path / "sets.gmt"
    path.write_text(text)
    with pytest.raises(UnreadableDataError, match=message):
        from_gmt(path)


@pytest.mark.parametrize(
    "content",
    [None, b"\xff\xfe\x00", gzip.compress(b"S\t\tA\n", mtime=0)[:-4], b"\x1f\x8b" + b"x" * 30],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, content):
    path = tmp_path / "sets.gmt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableDataError, match="cannot be read as a GMT file"):
        from_gmt(path)


def test_more_genes_than_the_most_are_contradictory(path):
    with pytest.raises(InvalidArgumentError, match=r"`max_genes` must be .* at least 5"):
        from_gmt(path, max_genes=4)
    assert np.isin([0, 1], from_gmt(path, min_genes=1).to_numpy()).all()
