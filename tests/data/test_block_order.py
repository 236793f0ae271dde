"""Which cell is read when, and by which process."""

from itertools import pairwise

import numpy as np
import pytest

from scvi_sams.data._block_loader import BlockOrder
from scvi_sams.exceptions import InvalidSplitError

CELLS = np.sort(np.random.default_rng(0).permutation(1000)[:883])


def batches(order):
    return [
        positions[start:stop]
        for positions, ends in order.buffers()
        for start, stop in pairwise(ends)
    ]


def make(cells=CELLS, batch_size=20, **options):
    shape = {"shuffle": True, "block_size": 16, "blocks_per_buffer": 6}
    return BlockOrder(cells, batch_size, **(shape | options))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 20, 96, 500, 5000])
def test_every_cell_comes_once_in_an_epoch(batch_size, shuffle):
    order = make(batch_size=batch_size, shuffle=shuffle)
    read = batches(order)
    np.testing.assert_array_equal(np.sort(np.concatenate(read)), CELLS)
    full, rest = divmod(len(CELLS), batch_size)
    assert [len(batch) for batch in read] == [batch_size] * full + [rest] * (rest > 0)
    assert len(order) == len(read)


def test_epochs_differ_and_repeat_with_seed_and_epoch():
    def epoch(seed, number):
        order = make(seed=seed)
        order.set_epoch(number)
        return np.concatenate(batches(order)).tolist()

    assert epoch(3, 5) == epoch(3, 5)
    others = [epoch(3, 5), epoch(3, 6), epoch(4, 5), epoch(4, 6)]
    assert len({tuple(other) for other in others}) == 4


def test_without_shuffling_cells_come_as_given():
    cells = np.array([5, 3, 900, 3, 17, 16, 2])
    for blocks_per_buffer in (1, 6):
        order = make(
            cells, batch_size=2, shuffle=False, block_size=2, blocks_per_buffer=blocks_per_buffer
        )
        assert np.concatenate(batches(order)).tolist() == cells.tolist()


def test_a_buffer_reads_few_blocks_and_mixes_them():
    """A block is cut at most where a buffer ends; the cells of a batch come from many blocks."""
    order = make(np.arange(9600), batch_size=24)
    n_distinct = []
    for positions, ends in order.buffers():
        assert len(positions) == 96
        assert len(np.unique(positions // 16)) <= 7
        n_distinct += [len(np.unique(positions[a:b] // 16)) for a, b in pairwise(ends)]
    # 24 draws from 6 blocks: 5.9 distinct ones.
    assert np.mean(n_distinct) > 5.7


def test_blocks_are_rows_of_the_file_not_of_the_training_cells():
    """Sparse training cells must not make a block longer than it is in the file."""
    cells = np.arange(0, 10_000, 10)
    for positions, _ in make(cells, batch_size=8, blocks_per_buffer=1).buffers():
        runs = np.split(np.sort(positions), np.flatnonzero(np.diff(np.sort(positions)) > 10) + 1)
        assert all(len(np.unique(run // 16)) >= len(run) / 2 for run in runs)


def test_each_cell_comes_early_and_late():
    """Over epochs, mean place of a cell: 500 +- 288 / sqrt(400) = 14; five sd."""
    places = np.zeros(1000)
    order = make(np.arange(1000))
    for epoch in range(400):
        order.set_epoch(epoch)
        places[np.concatenate(batches(order))] += np.arange(1000) / 400
    assert np.abs(places - 499.5).max() < 75


# Several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("batch_size", [2, 20, 63, 126, 147, 441, 5000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_an_epoch(world_size, batch_size, shuffle):
    for epoch in (0, 1):
        orders = [
            make(batch_size=batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for order in orders:
            order.set_epoch(epoch)
        read = [batches(order) for order in orders]
        everything = np.concatenate([np.concatenate(part) for part in read])
        np.testing.assert_array_equal(np.sort(everything), CELLS)
        assert {len(part) for part in read} == {len(orders[0])}
        sizes = np.array([[len(batch) for batch in part] for part in read])
        assert sizes.max() <= batch_size
        assert sizes.min() >= 1
        assert (sizes[:, :-2] == min(batch_size, 883 // world_size)).all()
        assert np.ptp(sizes.sum(axis=1)) <= 1


def test_processes_read_blocks_of_their_own():
    parts = [
        {block for p, _ in make(rank=r, world_size=2).buffers() for block in (p // 16).tolist()}
        for r in (0, 1)
    ]
    # One block may lie across the boundary.
    assert len(parts[0] & parts[1]) <= 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_full_batches_only(world_size):
    sizes = [
        [len(batch) for batch in batches(make(drop_last=True, rank=r, world_size=world_size))]
        for r in range(world_size)
    ]
    assert sizes == [[20] * (883 // world_size // 20)] * world_size


def test_one_cell_a_batch_on_two_processes():
    """Three cells: one process has two. Equal numbers of batches go before their size."""
    read = [batches(make(np.arange(3), batch_size=1, rank=r, world_size=2)) for r in (0, 1)]
    assert sorted(np.concatenate([*read[0], *read[1]]).tolist()) == [0, 1, 2]
    assert len(read[0]) == len(read[1]) == 1


def test_more_processes_than_cells_are_refused():
    with pytest.raises(InvalidSplitError, match="2 cells cannot be divided between 3 processes"):
        make(np.arange(2), world_size=3)


def test_no_cells_are_no_batches():
    assert batches(make(np.arange(0))) == []
