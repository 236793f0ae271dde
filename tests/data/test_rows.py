"""Rows of tables with one per label: names, and doses as they were written."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._rows import dosage_text, groups_of_cells, label_rows, rows_as_asked
from scvi_sams.labels._spelling import Spelling

SPELLING = Spelling(("control", "NT"), "+")


@pytest.mark.parametrize(
    ("dosage", "text"),
    [
        (0.2, "0.2"),
        (np.float32(0.2), "0.2"),
        (1.0, "1"),
        (1234567, "1234567"),
        (1e-9, "1e-09"),
        (1e9, "1e+09"),
        ("0.5+1", "0.5+1"),
    ],
)
def test_dosages_are_written_with_the_digits_that_they_have(dosage, text):
    assert dosage_text(dosage) == text


def test_rows_are_called_by_the_label_and_by_the_dose_where_there_are_several():
    rows = rows_as_asked(["B+A", "NT + A", "A", "NT"], ["1+0.5", 2, "0.5", 7], SPELLING)
    assert rows.index.tolist() == ["A+B", "A@2", "A@0.5", "control"]
    assert rows["perturbation"].tolist() == ["A+B", "A", "A", "control"]
    assert rows["dosage"].tolist() == ["0.5+1", "2", "0.5", "0"]
    whole = rows_as_asked(["B+A", "A"], None, SPELLING)
    assert whole["dosage"].tolist() == [1.0, 1.0]
    assert whole.index.tolist() == ["A+B", "A"]
    assert label_rows([], []).empty


def test_groups_of_cells_by_hand():
    labels = pd.Series(["B", "A", "B+A", "A", "control", "A", "B"])
    dosages = pd.Series(["0.1", "2", "0.3+0.4", "0.2", "5", "0", "0.1"])
    encoded = encode_labels(labels, dosages, spelling=SPELLING)
    names, doses, group = groups_of_cells(encoded)
    assert names == ["A", "A", "A+B", "B", "control"]
    assert doses == [0.2, 2.0, "0.4+0.3", 0.1, 0.0]
    assert group.tolist() == [3, 1, 2, 0, 4, 4, 3]
