"""Mini-batches from disk against those of scvi-tools from memory."""

import anndata
import numpy as np
import pytest
import torch
from scvi.dataloaders import AnnDataLoader

from data.on_disk import FORMS, fingerprint, write_screen
from model.builders import COVARIATES, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen
from scvi_sams.data._block_loader import BlockLoader

SETUP = {
    **COVARIATES,
    "size_factor_key": "transcriptome",
    "dosage_key": "dosage",
    "guide_key": "guide",
    "context_key": "donor",
}


@pytest.fixture(scope="module")
def screen():
    adata = small_screen(dosages=[0.5, 1.0, 2.0], guides_per_perturbation=2)
    adata.layers["counts"] = adata.X.copy()
    return adata


def manager_of(adata, **changes):
    SAMSVAE.setup_anndata(adata, **(SETUP | changes))
    return SAMSVAE(adata, n_latent=2, n_hidden=4).adata_manager


def joined(loader):
    batches = list(loader)
    assert len(batches) == len(loader)
    return {key: torch.cat([batch[key].to_dense() for batch in batches]) for key in batches[0]}


def assert_same(read, expected):
    assert set(read) == set(expected)
    for key, value in expected.items():
        assert read[key].dtype == value.dtype, key
        assert torch.equal(read[key], value), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", [None, "counts"])
def test_tensors_are_those_of_the_loader_in_memory(screen, form, layer, tmp_path):
    path = write_screen(screen, tmp_path, form)
    before = fingerprint(path)
    rows = np.random.default_rng(1).permutation(screen.n_obs)[:90]
    expected = joined(AnnDataLoader(manager_of(screen.copy(), layer=layer), indices=rows))
    loader = BlockLoader(manager_of(open_screen(path), layer=layer), rows, 20, block_size=8)
    assert_same(joined(loader), expected)
    assert fingerprint(path) == before


@pytest.mark.parametrize("form", ["h5ad csr", "h5ad dense"])
def test_a_file_that_anndata_opened(screen, form, tmp_path):
    """There the loader of scvi-tools sorts cells within a mini-batch."""
    path = write_screen(screen, tmp_path, form)
    rows = np.array([90, 3, 3, 41, 5, 77, 0])
    expected = joined(AnnDataLoader(manager_of(screen.copy()), indices=rows))
    backed = anndata.read_h5ad(path, backed="r")
    assert_same(joined(BlockLoader(manager_of(backed), rows, 4)), expected)
    backed.file.close()


def test_a_screen_in_memory(screen):
    manager = manager_of(screen.copy())
    assert_same(joined(BlockLoader(manager)), joined(AnnDataLoader(manager)))


def test_a_cell_may_be_asked_for_twice(screen, tmp_path):
    manager = manager_of(open_screen(write_screen(screen, tmp_path, "zarr csr")))
    rows = np.array([90, 5, 5, 7, 90])
    expected = joined(AnnDataLoader(manager_of(screen.copy()), indices=rows))
    assert_same(joined(BlockLoader(manager, rows, block_size=8)), expected)


def places(loader, screen):
    """Positions of the cells that a loader yields, by a covariate that no two share."""
    ages = screen.obs["age"].to_numpy(dtype=np.float32)
    order = np.argsort(ages)
    read = joined(loader)["extra_continuous_covs"].numpy().ravel()
    return order[np.searchsorted(ages[order], read)]


@pytest.mark.parametrize("form", ["h5ad csr", "zarr dense"])
def test_shuffled_rows_stay_together(screen, form, tmp_path):
    """Every tensor of a cell is that cell's, in two epochs of different orders."""
    manager = manager_of(open_screen(write_screen(screen, tmp_path, form)))
    memory = manager_of(screen.copy())
    loader = BlockLoader(manager, None, 20, shuffle=True, block_size=4, blocks_per_buffer=10)
    orders = []
    for _ in range(2):
        epoch = loader.sampler.epoch
        orders.append(places(loader, screen))
        loader.sampler.set_epoch(epoch)
        assert_same(joined(loader), joined(AnnDataLoader(memory, indices=orders[-1])))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(screen.n_obs))
    assert (orders[0] != orders[1]).mean() > 0.9


def test_an_interrupted_epoch_is_begun_again(screen, tmp_path):
    loader = BlockLoader(manager_of(open_screen(write_screen(screen, tmp_path))), shuffle=True)
    first = next(iter(loader))
    assert_same(next(iter(loader)), first)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("form", ["h5ad csr", "h5ad dense"])
def test_sparse_batches(screen, form, tmp_path):
    manager = manager_of(open_screen(write_screen(screen, tmp_path, form)))
    sparse = BlockLoader(manager, load_sparse_tensor=True)
    layout = torch.sparse_csr if form.endswith("csr") else torch.strided
    assert {batch["X"].layout for batch in sparse} == {layout}
    assert_same(joined(sparse), joined(BlockLoader(manager)))


def test_two_processes_yield_each_cell_once(screen, tmp_path):
    manager = manager_of(open_screen(write_screen(screen, tmp_path)))
    parts = [
        places(BlockLoader(manager, None, 16, shuffle=True, rank=r, world_size=2), screen)
        for r in (0, 1)
    ]
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(screen.n_obs))


def test_memory_is_that_of_a_buffer(screen, tmp_path, monkeypatch):
    """No read asks for more rows than a buffer has, however sparse the cells are."""
    from scvi_sams.counts._block_reader import BlockReader

    manager = manager_of(open_screen(write_screen(screen, tmp_path)))
    asked = []
    read = BlockReader.read
    monkeypatch.setattr(
        BlockReader, "read", lambda self, a, b: asked.append(b - a) or read(self, a, b)
    )
    for shuffle, largest in ((True, 4), (False, 12)):
        asked.clear()
        rows = np.arange(0, screen.n_obs, 3)
        options = {"shuffle": shuffle, "block_size": 4, "blocks_per_buffer": 3}
        n_read = sum(len(batch["X"]) for batch in BlockLoader(manager, rows, 5, **options))
        assert n_read == len(rows)
        assert max(asked) <= largest
