"""Combinations as perturbations of their own."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import InvalidDosageError, SAMSError, UnknownPerturbationError
from scvi_sams.labels._labels import (
    combinations_as_perturbations,
    inseparable_perturbations,
    parts_of_combination,
)
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels
from scvi_sams.labels._spelling import Spelling

LABELS = ["B+A", "A", "control", "A+B", "C", "A + control", "C+B+A"]


def encode(labels, dosages=None, *, delimiter="+", vocabulary=None):
    singles = encode_labels(
        pd.Series(labels),
        None if dosages is None else pd.Series(dosages),
        spelling=Spelling.of("control", delimiter),
    )
    return combinations_as_perturbations(singles, vocabulary=vocabulary)


def test_every_combination_has_one_code_whatever_its_spelling():
    encoded = encode(LABELS)
    assert encoded.vocabulary == ("A", "A+B", "A+B+C", "C")
    assert encoded.codes.tolist() == [[1], [0], [-1], [1], [3], [0], [2]]
    assert encoded.doses.tolist() == [[1], [1], [0], [1], [1], [1], [1]]
    assert encoded.codes.dtype == np.int32
    assert encoded.doses.dtype == np.float32


def test_codes_are_those_of_a_known_vocabulary():
    encoded = encode(["C", "B+A"], vocabulary=["C", "A+B", "D"])
    assert encoded.codes.tolist() == [[0], [1]]
    assert encoded.vocabulary == ("C", "A+B", "D")


def test_labels_that_are_not_split_are_names():
    encoded = encode(["B+A", "A+B", "control"], delimiter=None)
    assert encoded.vocabulary == ("A+B", "B+A")
    assert encoded.codes.tolist() == [[1], [0], [-1]]


def test_a_perturbation_at_dose_zero_was_not_given():
    encoded = encode(["A+B", "B+A", "B", "A"], ["0+1", "1+0", "1", "0"])
    assert encoded.vocabulary == ("B",)
    assert encoded.codes.tolist() == [[0], [0], [0], [-1]]


def test_a_matrix_of_zeros_and_ones_gives_the_same_codes():
    matrix = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 1]])
    for delimiter in ("+", None):
        spelling = Spelling(("control",), delimiter)
        singles = encode_dosage_matrix(matrix[:, ::-1], ["C", "B", "A"], spelling=spelling)
        encoded = combinations_as_perturbations(singles)
        assert encoded.vocabulary == encode(LABELS).vocabulary
        np.testing.assert_array_equal(encoded.codes, encode(LABELS).codes)


def test_other_doses_are_refused():
    with pytest.raises(InvalidDosageError, match=r"\(0\.5, 2\).*drug@0\.5.*SAMSVAE"):
        encode(["A", "B", "A+B"], ["0.5", "1", "1+2"])


def test_unknown_combinations_are_named():
    with pytest.raises(
        UnknownPerturbationError, match=r"'A\+C'.*without training cells.*SAMSVAE and CPAVAE"
    ):
        encode(["A", "C+A", "A+B"], vocabulary=["A", "A+B", "C"])


def test_an_unknown_perturbation_is_named_with_similar_ones():
    with pytest.raises(UnknownPerturbationError, match=r"'KLF2'.*did you mean 'KLF1'"):
        encode(["KLF2"], vocabulary=["KLF1", "MAPK1"])


# Perturbations that only occur together


def test_perturbations_with_the_same_cells_are_inseparable_others_are_not():
    # A and B in as many kinds of cells, but not in the same ones; C and D always together.
    codes = np.array([[0, 1, -1], [0, 2, 3], [1, -1, -1], [2, 3, -1], [-1, -1, -1], [0, 1, -1]])
    assert inseparable_perturbations(codes, "ABCD") == [["C", "D"]]
    assert inseparable_perturbations(codes[[0, 4]], "ABCD") == [["A", "B"]]
    assert inseparable_perturbations(codes[[0, 2]], "ABCD") == []


def test_parts_of_a_combination():
    assert parts_of_combination("A+B+C", Spelling(("control",), "+")) == ["A", "B", "C"]
    for label, delimiter in (("A", "+"), ("A+B", None), ("drug A", None), ("A+B", "_")):
        with pytest.raises(SAMSError, match="is not a combination"):
            parts_of_combination(label, Spelling(("control",), delimiter))
