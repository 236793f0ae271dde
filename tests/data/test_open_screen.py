"""Screens on disk: what is read, what stays there, and what is damaged."""

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data.on_disk import FORMS, fingerprint, write_screen
from model.builders import small_screen
from scvi_sams import SAMSVAE
from scvi_sams.counts._block_reader import BlockReader, is_on_disk
from scvi_sams.data import open_screen
from scvi_sams.exceptions import InvalidCountsError, MissingKeyError, UnreadableDataError


def dense(values):
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


@pytest.fixture(scope="module")
def screen():
    adata = small_screen()
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["doses"] = np.arange(2.0 * adata.n_obs).reshape(-1, 2)
    adata.uns["note"] = "kept"
    return adata


@pytest.mark.parametrize("form", FORMS)
def test_cells_and_genes_are_in_memory_and_expression_is_not(screen, form, tmp_path):
    path = write_screen(screen, tmp_path, form)
    opened = open_screen(path)
    assert is_on_disk(opened.X)
    assert all(is_on_disk(opened.layers[key]) for key in ("counts", "normalised"))
    pd.testing.assert_frame_equal(opened.obs, screen.obs, check_categorical=False)
    pd.testing.assert_index_equal(opened.var_names, screen.var_names)
    np.testing.assert_array_equal(opened.obsm["doses"], screen.obsm["doses"])
    assert str(opened.uns["note"]) == "kept"
    np.testing.assert_array_equal(dense(opened.X[20:33]), dense(screen.X[20:33]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows_per_read", [1, 16, 1000])
def test_rows_are_those_of_the_matrix(screen, form, rows_per_read, tmp_path):
    opened = open_screen(write_screen(screen, tmp_path, form))
    rows = np.array([0, 3, 4, 4, 5, 31, 32, 33, 90, screen.n_obs - 1])
    for stored, values in ((opened.X, screen.X), (opened.layers["counts"], screen.X)):
        read = BlockReader(stored).read_rows(rows, rows_per_read)
        assert read.shape == (10, screen.n_vars)
        np.testing.assert_array_equal(dense(read), dense(values)[rows])


def test_only_the_asked_for_blocks_are_read(screen, tmp_path, monkeypatch):
    reader = BlockReader(open_screen(write_screen(screen, tmp_path)).X)
    asked = []
    read = BlockReader.read
    monkeypatch.setattr(
        BlockReader, "read", lambda self, a, b: asked.append((int(a), int(b))) or read(self, a, b)
    )
    reader.read_rows(np.array([3, 7, 18, 64, 70]), 16)
    assert asked == [(3, 8), (18, 19), (64, 71)]


def test_columns_out_of_order_are_read_in_order(screen, tmp_path):
    shuffled = screen.copy()
    counts = shuffled.X.tocsr()
    for row in range(counts.shape[0]):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        counts.indices[part] = counts.indices[part][::-1].copy()
        counts.data[part] = counts.data[part][::-1].copy()
    counts.has_sorted_indices = False
    path = tmp_path / "screen.h5ad"
    shuffled.X = counts
    shuffled.write_h5ad(path)
    with h5py.File(path) as file:
        assert (np.diff(file["X/indices"][:5]) < 0).all(), "the file is not what this test needs"
    read = BlockReader(open_screen(path).X).read(0, 40)
    np.testing.assert_array_equal(read.toarray(), screen.X[:40].toarray())


def test_a_file_without_x(screen, tmp_path):
    """Registered by its layer; without one, the message says what to do."""
    bare = screen.copy()
    bare.X = None
    path = tmp_path / "screen.h5ad"
    bare.write_h5ad(path)
    SAMSVAE.setup_anndata(opened := open_screen(path), layer="counts")
    SAMSVAE(opened)
    SAMSVAE.setup_anndata(opened := open_screen(path))
    with pytest.raises(MissingKeyError, match="as `layer`"):
        SAMSVAE(opened)


@pytest.mark.parametrize("form", FORMS)
def test_registration_leaves_expression_on_disk_and_the_file_as_it_is(screen, form, tmp_path):
    path = write_screen(screen, tmp_path, form)
    before = fingerprint(path)
    opened = open_screen(path)
    SAMSVAE.setup_anndata(opened, batch_key="lane", layer="counts")
    model = SAMSVAE(opened, n_latent=2, n_hidden=4)
    assert is_on_disk(opened.X)
    assert is_on_disk(opened.layers["counts"])
    assert model.summary_stats.n_cells == screen.n_obs
    assert fingerprint(path) == before


def test_checks_of_values_read_blocks(screen, tmp_path, monkeypatch):
    """As in memory, with the position in the whole file."""
    from scvi_sams.counts import _validation

    monkeypatch.setattr(_validation, "_ROWS_PER_CHUNK", 16)
    wrong = screen.copy()
    counts = wrong.X.toarray()
    counts[77] = 0
    wrong.X = sparse.csr_matrix(counts)
    opened = open_screen(write_screen(wrong, tmp_path))
    largest = []
    read = BlockReader.read
    monkeypatch.setattr(
        BlockReader, "read", lambda self, a, b: largest.append(b - a) or read(self, a, b)
    )
    SAMSVAE.setup_anndata(opened)
    with pytest.raises(InvalidCountsError, match="the first at position 77"):
        SAMSVAE(opened)
    assert max(largest) == 16


# Damaged files -----------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5ad"):
        open_screen(tmp_path / "nothing.h5ad")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("cells,genes")])
def test_what_is_no_screen(make, tmp_path):
    make(tmp_path / "other")
    with pytest.raises(UnreadableDataError, match=r"other.*neither"):
        open_screen(tmp_path / "other")


def test_a_truncated_h5ad_file(screen, tmp_path):
    path = write_screen(screen, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableDataError, match=r"screen\.h5ad.*incomplete"):
        open_screen(path)


def test_a_matrix_stored_by_genes(screen, tmp_path):
    opened = open_screen(write_screen(screen, tmp_path, "h5ad csc"))
    SAMSVAE.setup_anndata(opened)
    with pytest.raises(UnreadableDataError, match=r"adata\.X is stored by genes.*tocsr"):
        SAMSVAE(opened)


def damage_h5ad(path, dataset, number):
    """Overwrite a compressed chunk; returns the first entry in it."""
    with h5py.File(path) as file:
        stored = file[dataset]
        first_entry = number * stored.chunks[0]
        info = stored.id.get_chunk_info(number)
    content = bytearray(path.read_bytes())
    content[info.byte_offset : info.byte_offset + info.size] = b"\xff" * info.size
    path.write_bytes(content)
    return first_entry


@pytest.fixture
def large_screen():
    """Large enough for several chunks."""
    adata = small_screen(n_controls=3000)
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


@pytest.mark.parametrize("dataset", ["data", "indices"])
def test_a_damaged_block_of_an_h5ad_file_is_named(large_screen, dataset, tmp_path):
    path = write_screen(large_screen, tmp_path, compression="gzip")
    first_entry = damage_h5ad(path, f"X/{dataset}", 5)
    row = np.searchsorted(large_screen.X.indptr, first_entry, side="right") - 1
    start = row // 16 * 16
    reader = BlockReader(open_screen(path).X)
    assert 16 < start < 3000
    whole = reader.read_rows(np.arange(start), 16)
    np.testing.assert_array_equal(whole.toarray(), large_screen.X[:start].toarray())
    message = rf"Rows {start} to {start + 15} of adata\.X.*screen\.h5ad"
    with pytest.raises(UnreadableDataError, match=message):
        reader.read_rows(np.arange(large_screen.n_obs), 16)


def test_gene_numbers_out_of_range_are_named(screen, tmp_path):
    path = write_screen(screen, tmp_path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][int(screen.X.indptr[50])] = screen.n_vars
    reader = BlockReader(open_screen(path).X)
    with pytest.raises(UnreadableDataError, match="Rows 48 to 63"):
        reader.read_rows(np.arange(screen.n_obs), 16)


def test_row_pointers_that_do_not_fit(screen, tmp_path):
    path = write_screen(screen, tmp_path)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][60] = 0
    with pytest.raises(UnreadableDataError, match=r"row pointers \(indptr\) of adata\.layers"):
        BlockReader(open_screen(path).X, "adata.layers['counts']")


def chunks_of(path, array):
    files = [file for file in (path / array).rglob("*") if file.is_file()]
    return [file for file in files if not file.name.startswith((".z", "zarr.json"))]


@pytest.mark.skipif(
    not hasattr(ad.settings, "zarr_write_format"), reason="anndata writes zarr 3 from 0.12 on"
)
@pytest.mark.parametrize("form", ["zarr csr", "zarr dense"])
def test_a_truncated_chunk_of_a_zarr_file_is_named(large_screen, form, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata: version 3 is to be the only one
        # Version 2 compresses with Blosc, which may read beyond the end of a truncated chunk.
        with ad.settings.override(zarr_write_format=3):
            path = write_screen(large_screen, tmp_path, form)
    for chunk in chunks_of(path, "X/data" if form.endswith("csr") else "X"):
        chunk.write_bytes(chunk.read_bytes()[:-100])
    opened = open_screen(path)
    SAMSVAE.setup_anndata(opened)
    with pytest.raises(UnreadableDataError, match=r"Rows 0 to \d+ of adata\.X.*screen\.zarr"):
        SAMSVAE(opened)


def test_a_missing_chunk_of_a_zarr_file_is_named(screen, tmp_path):
    """Zarr reads zeros in its place, without an error."""
    path = write_screen(screen, tmp_path, "zarr csr")
    for chunk in chunks_of(path, "X/indices"):
        chunk.unlink()
    reader = BlockReader(open_screen(path).X)
    with pytest.raises(UnreadableDataError, match=r"Rows 16 to 31.*twice"):
        reader.read(16, 32)


def test_row_pointers_of_entries_that_are_not_there(screen, tmp_path):
    path = write_screen(screen, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["layers/counts/indices"]
    with pytest.raises(UnreadableDataError, match=r"row pointers \(indptr\) of adata\.layers"):
        BlockReader(open_screen(path).layers["counts"], "adata.layers['counts']")


def test_a_file_with_cells_and_genes_only(screen, tmp_path):
    path = write_screen(screen, tmp_path)
    with h5py.File(path, "r+") as file:
        for slot in ("obsm", "varm", "uns", "layers"):
            if slot in file:
                del file[slot]
    adata = open_screen(path)
    assert adata.obs_names.tolist() == screen.obs_names.tolist()
    assert not len(adata.obsm) + len(adata.varm) + len(adata.uns)
    assert not set(adata.layers) - {None}  # which from anndata 0.13 on is X
