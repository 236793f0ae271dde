"""Cells that stay on the device: batches, epochs, splits and trained models as from memory."""

import tracemalloc
from itertools import chain, pairwise

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from torch._subclasses.fake_tensor import FakeTensorMode

from scvi_sams import SAMSVAE
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import BlockReader
from scvi_sams.data import ResidentDataModule, _resident, open_screen
from scvi_sams.data._resident import ResidentCells, _as_small_as_possible, _starts_of
from scvi_sams.datasets import simulate_screen
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError

CPU = torch.device("cpu")
TRAINING = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "max_epochs": 3}


def make_screen(seed=0):
    return simulate_screen(
        n_genes=40,
        n_controls=30,
        n_perturbations=4,
        cells_per_perturbation=20,
        n_combinations=2,
        cells_per_combination=10,
        library_size=200.0,
        seed=seed,
    )


def make_model(adata, **setup):
    SAMSVAE.setup_anndata(adata, **setup)
    return SAMSVAE(adata, n_latent=4, n_hidden=8, effect_n_hidden=8)


def stored_as(x, format):
    return x.toarray() if format == "dense" else getattr(x, f"to{format}")()


@pytest.mark.parametrize("format", ["csr", "csc", "dense"])
@pytest.mark.parametrize("largest", [1, 200, 300, 40_000, 16_000_000])
def test_batches_hold_the_registered_cells(format, largest):
    """Whatever type the values are kept in."""
    adata = make_screen()
    x = adata.X.toarray()
    x[3, 5], x[7, 39] = largest, largest - 1
    adata.X = stored_as(sparse.csr_matrix(x.astype(np.float32)), format)
    adata.obs["age"] = np.linspace(-1, 1, adata.n_obs)
    model = make_model(adata, continuous_covariate_keys=["age"])
    cells = ResidentCells(model.adata_manager, CPU)
    positions = np.random.default_rng(0).permutation(adata.n_obs)[:50]
    positions[:2] = 3, 7
    n_values = int(cells.values_of_cells[positions].sum())
    batch = cells.batch(torch.from_numpy(positions), n_values)
    expected = next(iter(model._make_data_loader(adata, indices=positions, batch_size=50)))
    assert set(batch) == set(expected)
    for key, value in batch.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key]), key


def test_values_that_are_not_whole_and_rows_without_any():
    adata = make_screen()
    x = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    x[4] = 0
    adata.X = sparse.csr_matrix(x)
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=4, n_hidden=8, gene_likelihood="normal")
    cells = ResidentCells(model.adata_manager, CPU)
    rows = torch.tensor([4, 2, 4, 0])
    batch = cells.batch(rows, int(cells.values_of_cells[rows].sum()))
    assert torch.equal(batch[REGISTRY_KEYS.X], torch.from_numpy(x[rows]))


def test_values_stored_twice_add_up_and_the_matrix_is_left_alone():
    adata = make_screen()
    dense = adata.X.toarray()
    indices = np.tile(np.arange(adata.n_vars), 2 * adata.n_obs)
    halves = np.repeat(dense[:, None, :], 2, axis=1)
    halves[:, 0], halves[:, 1] = dense - np.floor(dense / 2), np.floor(dense / 2)
    pointers = np.arange(adata.n_obs + 1) * 2 * adata.n_vars
    adata.X = sparse.csr_matrix((halves.ravel(), indices, pointers), shape=adata.shape)
    stored = adata.X.data.copy()
    cells = ResidentCells(make_model(adata).adata_manager, CPU)
    rows = torch.arange(adata.n_obs)
    batch = cells.batch(rows, int(cells.values_of_cells.sum()))
    np.testing.assert_array_equal(batch[REGISTRY_KEYS.X], dense)
    np.testing.assert_array_equal(adata.X.data, stored)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], np.uint8),
        ([0, 256], np.int16),
        ([-1, 3], np.int16),
        ([0, 32_768], np.int32),
        ([0, 2**24], np.int32),
        ([0.5, 1], np.float32),
        ([], np.uint8),
    ],
)
def test_small_types(values, dtype):
    kept = _as_small_as_possible(np.array(values, dtype=np.float64))
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, values)


@pytest.mark.parametrize(
    ("later", "dtype"),
    [([2], "uint8"), ([256], "int16"), ([70_000], "int32"), ([300, 70_000, 0.5], "float32")],
)
def test_the_type_of_values_is_the_smallest_for_all_blocks(monkeypatch, later, dtype):
    monkeypatch.setattr(_resident, "_ROWS_PER_READ", 32)
    adata = make_screen()
    x = np.minimum(adata.X.toarray(), 255)
    for number, value in enumerate(later):
        x[40 + 32 * number, 3] = value
    adata.X = sparse.csr_matrix(x)
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=4, n_hidden=8, gene_likelihood="normal")
    cells = ResidentCells(model.adata_manager, CPU)
    assert cells.values.dtype == getattr(torch, dtype)
    assert cells.genes.dtype == torch.uint8
    batch = cells.batch(torch.arange(adata.n_obs), int(cells.values_of_cells.sum()))
    np.testing.assert_array_equal(batch[REGISTRY_KEYS.X], x)


@pytest.mark.parametrize("place", ["memory", "h5ad", "zarr"])
@pytest.mark.parametrize("format", ["csr", "dense"])
def test_every_row_is_read_once_in_blocks(tmp_path, monkeypatch, format, place):
    adata = make_screen()
    adata.X = stored_as(adata.X, format)
    x = adata.X
    if place != "memory":
        getattr(adata, f"write_{place}")(tmp_path / f"screen.{place}")
        adata = open_screen(tmp_path / f"screen.{place}")
    manager = make_model(adata).adata_manager
    monkeypatch.setattr(_resident, "_ROWS_PER_READ", 32)
    read, requests = BlockReader.read, []

    def read_and_note(reader, start, stop):
        requests.append((start, stop))
        return read(reader, start, stop)

    monkeypatch.setattr(BlockReader, "read", read_and_note)
    cells = ResidentCells(manager, CPU)
    assert len(requests) == -(-adata.n_obs // 32)
    assert all(stop == start for (_, stop), (start, _) in pairwise(requests))
    assert (requests[0][0], requests[-1][1]) == (0, adata.n_obs)
    assert max(stop - start for start, stop in requests) == 32
    batch = cells.batch(torch.arange(adata.n_obs), int(cells.values_of_cells.sum()))
    np.testing.assert_array_equal(batch[REGISTRY_KEYS.X], x if format == "dense" else x.toarray())


@pytest.mark.parametrize("format", ["csr", "dense"])
def test_host_memory_holds_a_block_of_a_screen_on_disk(tmp_path, monkeypatch, format):
    """Memory of numpy, which is the host's; that of torch stands for the device."""
    n_cells, n_genes = 2_000, 300
    counts = np.random.default_rng(0).poisson(3.0, (n_cells, n_genes)).astype(np.float32)
    adata = anndata.AnnData(stored_as(sparse.csr_matrix(counts), format))
    adata.obs["perturbation"] = np.where(np.arange(n_cells) % 2, "A", "control")
    adata.write_h5ad(tmp_path / "screen.h5ad")
    manager = make_model(open_screen(tmp_path / "screen.h5ad")).adata_manager
    peaks = {}
    for n_rows in (n_cells, 50):
        monkeypatch.setattr(_resident, "_ROWS_PER_READ", n_rows)
        tracemalloc.start()
        ResidentCells(manager, CPU)
        peaks[n_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[n_cells] > counts.nbytes
    assert peaks[50] < counts.nbytes / 4


class FarAway:
    """Stored values of which the first one is at a position that 32 bits do not hold."""

    FIRST = 2**33

    def __init__(self, values):
        self._values = values

    def __getitem__(self, positions):
        assert positions.dtype == torch.int64
        assert int(positions.min()) >= self.FIRST
        return self._values[positions - self.FIRST]


def test_positions_of_stored_values_have_64_bits():
    lengths = np.full(3, 2**31 - 1, dtype=np.int32)
    assert _starts_of(lengths).tolist() == [0, 2**31 - 1, 2**32 - 2, 3 * 2**31 - 3]
    cells = ResidentCells(make_model(make_screen()).adata_manager, CPU)
    assert cells.starts.dtype == torch.int64
    rows = torch.tensor([5, 2, 90, 5])
    n_values = int(cells.values_of_cells[rows].sum())
    expected = cells.batch(rows, n_values)[REGISTRY_KEYS.X]
    cells.starts = cells.starts + FarAway.FIRST
    cells.genes, cells.values = FarAway(cells.genes), FarAway(cells.values)
    assert expected.sum() > 0
    assert torch.equal(cells.batch(rows, n_values)[REGISTRY_KEYS.X], expected)


def test_a_batch_is_made_without_waiting_for_the_device():
    """Tensors without values raise an error where a size depends on values."""
    cells = ResidentCells(make_model(make_screen()).adata_manager, CPU)
    with FakeTensorMode() as without_values:
        for name in ("starts", "genes", "values"):
            setattr(cells, name, without_values.from_tensor(getattr(cells, name)))
        cells.others = {k: without_values.from_tensor(v) for k, v in cells.others.items()}
        batch = cells.batch(torch.empty(12, dtype=torch.int64), 345)
        assert batch[REGISTRY_KEYS.X].shape == (12, 40)


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_an_epoch_has_every_training_cell_once_in_another_order_each_time(batch_size):
    adata = make_screen()
    adata.obs["number"] = np.arange(adata.n_obs).astype(float)
    model = make_model(adata, continuous_covariate_keys=["number"])
    data = ResidentDataModule(model.adata_manager, batch_size=batch_size, train_size=0.8)
    loader = data.train_dataloader()

    def epoch():
        batches = [batch["extra_continuous_covs"].ravel().int().tolist() for batch in loader]
        assert len(batches) == len(loader)
        assert max(map(len, batches)) <= batch_size
        return list(chain.from_iterable(batches))

    first, second = epoch(), epoch()
    assert sorted(first) == sorted(second) == sorted(data.train_idx.tolist())
    assert first != second
    again = ResidentDataModule(model.adata_manager, batch_size=batch_size, train_size=0.8)
    loader = again.train_dataloader()
    assert epoch() == first
    validation = [b["extra_continuous_covs"].ravel().int() for b in data.val_dataloader()]
    assert torch.cat(validation).tolist() == data.val_idx.tolist()


def test_trains_with_the_split_of_training_from_memory(tmp_path):
    adata = make_screen()
    model = make_model(adata)
    model.train(data_on_device=True, batch_size=32, **TRAINING)
    other = make_model(make_screen())
    other.train(batch_size=32, **TRAINING)
    np.testing.assert_array_equal(model.train_indices, other.train_indices)
    np.testing.assert_array_equal(model.validation_indices, other.validation_indices)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    assert model.trainer.datamodule._cells is None, "the device's memory is still taken"
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )


def test_the_elbo_is_that_of_training_from_memory():
    """Over seeds, as the order of cells differs: within what single runs differ by."""
    ends = {True: [], False: []}
    for seed in range(4):
        for on_device, values in ends.items():
            torch.manual_seed(seed)
            model = make_model(make_screen())
            options = TRAINING | {"max_epochs": 20, "plan_kwargs": {"lr": 5e-3}}
            model.train(data_on_device=on_device, batch_size=32, **options)
            values.append(float(model.history["elbo_validation"].iloc[-1, 0]))
    here, there = np.array(ends[True]), np.array(ends[False])
    assert abs(here.mean() - there.mean()) < 3 * there.std(ddof=1)
    assert there.std(ddof=1) < 0.02 * there.mean()


def test_from_disk_too(tmp_path):
    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    states = []
    for adata in (
        open_screen(tmp_path / "screen.h5ad"),
        anndata.read_h5ad(tmp_path / "screen.h5ad"),
    ):
        torch.manual_seed(0)
        model = make_model(adata)
        torch.manual_seed(1)
        model.train(data_on_device=True, batch_size=32, **TRAINING)
        states.append(model.module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


def test_one_way_to_load_cells():
    model = make_model(make_screen())
    data = ResidentDataModule(model.adata_manager)
    with pytest.raises(InvalidArgumentError, match=r"two ways to load cells"):
        model.train(data_on_device=True, datamodule=data, **TRAINING)


def test_splits_are_checked():
    model = make_model(make_screen())
    with pytest.raises(InvalidSplitError, match="no training cells"):
        ResidentDataModule(model.adata_manager, external_indexing=[np.arange(0)])


def test_parts_may_be_masks_and_the_batch_size_a_number_of_numpy():
    manager = make_model(make_screen()).adata_manager
    mask = np.arange(manager.adata.n_obs) % 3 == 0
    module = ResidentDataModule(manager, external_indexing=[mask, ~mask], batch_size=np.int64(16))
    assert module.train_idx.tolist() == np.flatnonzero(mask).tolist()
    assert len(module.train_idx) + len(module.val_idx) == manager.adata.n_obs
    assert type(module._batch_size) is int
    with pytest.raises(InvalidArgumentError, match="`batch_size` must be a whole number"):
        ResidentDataModule(manager, batch_size=0)
