"""Which cells carry a combination that was measured, with its doses."""

import torch

from scvi_sams.module._combinations import Combinations

CODES = [[0, 2, -1], [2, -1, 0], [0, 2, 3], [4, -1, -1], [0, 2, -1], [-1, -1, -1], [1, 0, -1]]
DOSES = [[1, 0.5, 0], [0.5, 0, 1], [1, 0.5, 2], [1, 0, 0], [1, 2, 0], [0, 0, 0], [0.25, 3, 0]]


def cells(codes=CODES, doses=DOSES):
    return Combinations.of_cells(torch.tensor(codes), torch.tensor(doses, dtype=torch.float32))


def as_set(combinations):
    return {
        tuple(sorted((code, dose) for code, dose in zip(*row, strict=True) if code >= 0))
        for row in zip(combinations.codes.tolist(), combinations.doses.tolist(), strict=True)
    }


def test_distinct_combinations_are_sets_of_perturbations_with_doses():
    found = cells().at_least(1, 100)
    assert as_set(found) == {
        ((0, 1.0), (2, 0.5)),
        ((0, 1.0), (2, 0.5), (3, 2.0)),
        ((0, 1.0), (2, 2.0)),
        ((0, 3.0), (1, 0.25)),
    }
    assert as_set(cells().at_least(2, 100)) == {((0, 1.0), (2, 0.5))}
    assert as_set(cells().at_least(1, 1)) == {((0, 1.0), (2, 0.5))}


def test_perturbations_that_stand_alone_are_no_combinations():
    alone = cells([[0], [1], [0], [-1]], [[1.0], [2.0], [1.0], [0.0]])
    assert len(alone.at_least(1, 100).codes) == 0
    assert alone.at_least(1, 100).rows_of(alone).tolist() == [-1] * 4


def test_cells_find_their_row_whatever_the_order_of_slots():
    measured = cells().at_least(1, 100)
    rows = measured.rows_of(cells())
    assert rows[0] == rows[1]
    assert (rows < 0).tolist() == [False, False, False, True, False, True, False]
    for cell in (0, 2, 4, 6):
        found = Combinations(*(part[rows[cell]][None] for part in measured))
        assert as_set(found) == as_set(Combinations(*(part[cell][None] for part in cells())))


def test_other_doses_or_perturbations_are_not_measured():
    measured = cells([[0, 2], [0, 2]], [[1, 0.5], [1, 0.5]]).at_least(2, 100)
    asked = cells(
        [[0, 2, -1, -1], [0, 2, -1, -1], [0, 3, -1, -1], [0, 2, 3, -1], [2, -1, -1, -1]],
        [[1, 0.5, 0, 0], [1, 0.25, 0, 0], [1, 0.5, 0, 0], [1, 0.5, 1, 0], [0.5, 0, 0, 0]],
    )
    assert measured.rows_of(asked).tolist() == [0, -1, -1, -1, -1]
    assert measured.rows_of(cells([[2], [0]], [[0.5], [1.0]])).tolist() == [-1, -1]


def test_each_of_many_pairs_has_one_row():
    pairs = torch.combinations(torch.arange(60))
    doses = torch.tensor([1.0, 0.5]).expand(len(pairs), 2)
    found = Combinations.of_cells(pairs, doses)
    measured = found.at_least(1, 10_000)
    rows = measured.rows_of(found)
    assert sorted(rows.tolist()) == list(range(60 * 59 // 2))
    torch.testing.assert_close(measured.codes[rows], pairs.flip(1))
