"""Slices of mini-batches: on a CPU by size, on an accelerator everything at once."""

import pytest
import torch

from scvi_sams.module import _minibatch
from scvi_sams.module._minibatch import chunks_of_cells, chunks_of_particles


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (6, [(0, 2), (2, 4), (4, 5)]),
        (3, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (15, [(0, 5)]),
    ],
)
def test_a_chunk_has_at_most_so_many_values(values, expected, monkeypatch):
    monkeypatch.setattr(_minibatch, "_VALUES_PER_CHUNK", values)
    assert [(s.start, s.stop) for s in chunks_of_cells(torch.zeros(5, 3))] == expected


def test_particles_one_by_one():
    found = list(chunks_of_particles(3, torch.device("cpu")))
    assert found == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_an_accelerator_takes_everything_at_once(monkeypatch):
    monkeypatch.setattr(_minibatch, "_VALUES_PER_CHUNK", 1)
    elsewhere = torch.zeros(5, 3, device="meta")
    assert list(chunks_of_cells(elsewhere)) == [slice(0, 5)]
    assert list(chunks_of_particles(4, elsewhere.device)) == [slice(0, 4)]
