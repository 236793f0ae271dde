"""Reading by annbatch against reading block by block. Where it is not installed: what is said."""

import importlib.util
import sys

import numpy as np
import pytest
import scvi
import torch
import zarr

from data.on_disk import fingerprint, write_screen
from model.builders import small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.data import StreamingDataModule, open_screen
from scvi_sams.data._block_loader import BlockLoader, registered_expression
from scvi_sams.exceptions import InvalidArgumentError, UnreadableDataError

# As the extra of the package says: annbatch needs Python 3.12. There it must be installed.
needs_annbatch = pytest.mark.skipif(
    sys.version_info < (3, 12) and importlib.util.find_spec("annbatch") is None,
    reason="annbatch needs Python 3.12",
)
FORMS = pytest.mark.parametrize("form", ["zarr csr", "zarr dense"])


def write_small_screen(folder, form="zarr csr"):
    return write_screen(small_screen(), folder, form)


def module_of(path, reader, **options):
    adata = open_screen(path)
    SAMSVAE.setup_anndata(adata)
    manager = SAMSVAE(adata, n_latent=2, n_hidden=4).adata_manager
    defaults = {"batch_size": 20, "block_size": 8, "blocks_per_buffer": 4, "seed": 3}
    return StreamingDataModule(manager, reader=reader, **(defaults | options))


def batches_of(loader, epochs=2):
    return [batch for _ in range(epochs) for batch in loader]


@needs_annbatch
@FORMS
def test_batches_are_the_same(form, tmp_path):
    path = write_small_screen(tmp_path, form)
    before = fingerprint(path)
    own, annbatch = (module_of(path, reader) for reader in ("blocks", "annbatch"))
    for name in ("train_dataloader", "val_dataloader"):
        expected = batches_of(getattr(own, name)())
        found = batches_of(getattr(annbatch, name)())
        assert len(found) == len(expected) > 1
        for batch, other in zip(found, expected, strict=True):
            assert set(batch) == set(other)
            for key, values in other.items():
                assert batch[key].dtype == values.dtype
                assert torch.equal(batch[key], values), key
    assert fingerprint(path) == before


@needs_annbatch
def test_a_cell_may_be_asked_for_twice(tmp_path):
    path = write_small_screen(tmp_path)
    manager = module_of(path, "blocks").adata_manager
    rows = np.array([90, 5, 5, 7, 90])
    reader = registered_expression(manager, "annbatch")
    (batch,) = BlockLoader(manager, rows, block_size=8, reader=reader)
    np.testing.assert_array_equal(batch["X"], small_screen().X[rows].toarray())


@needs_annbatch
def test_trained_weights_are_the_same(tmp_path):
    path = write_small_screen(tmp_path)

    def trained(reader):
        scvi.settings.seed = 0
        reading = {"datasplitter_kwargs": {"reader": reader, "block_size": 16}}
        model = train_small(open_screen(path), spread=False, train=reading)
        return model.module.state_dict()

    expected, found = trained("blocks"), trained("annbatch")
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@needs_annbatch
def test_damaged_rows_are_named(tmp_path):
    path = write_small_screen(tmp_path)
    stream = module_of(path, "annbatch")
    genes = zarr.open_array(path / "X" / "indices", mode="r+")
    genes[int(open_screen(path).X.group["indptr"][40])] = 10_000
    with pytest.raises(UnreadableDataError, match=r"Rows 40 to 47 of adata\.X"):
        batches_of(stream.train_dataloader())


@needs_annbatch
@pytest.mark.parametrize("form", ["h5ad csr", "h5ad dense"])
def test_hdf5_is_refused(form, tmp_path):
    path = write_small_screen(tmp_path, form)
    with pytest.raises(InvalidArgumentError, match=r"zarr only, and adata\.X is not.*write_zarr"):
        module_of(path, "annbatch")


def test_another_reader_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"'reader'|`reader`"):
        module_of(write_small_screen(tmp_path), "anndata")


def test_without_annbatch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "annbatch", None)
    path = write_small_screen(tmp_path)
    with pytest.raises(ImportError, match=r'pip install "scvi-sams\[annbatch\]"'):
        module_of(path, "annbatch")
