"""Whatever way a screen is written, the same dosages are read, and can be written again."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from properties.schemes import CONTROL, DELIMITERS, as_kept, decoded, names, screens, spellings
from scvi_sams.data import canonical_label
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels
from scvi_sams.labels._spelling import Spelling


def read(written, vocabulary=None):
    return encode_labels(
        written.labels,
        written.doses,
        spelling=Spelling.of(CONTROL, written.delimiter),
        vocabulary=vocabulary,
    )


@given(st.data())
def test_any_spelling_is_read_as_what_was_given(data):
    received = data.draw(screens())
    encoded = read(data.draw(spellings(received)))
    assert decoded(encoded.codes, encoded.doses, encoded.vocabulary) == as_kept(received)
    assert list(encoded.vocabulary) == sorted({name for cell in received for name in cell})
    np.testing.assert_array_equal(encoded.is_control, [not cell for cell in received])


@given(st.data())
def test_two_spellings_have_the_same_codes(data):
    received = data.draw(screens())
    first, second = (read(data.draw(spellings(received))) for _ in range(2))
    assert first.vocabulary == second.vocabulary
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.doses, second.doses)


@given(st.data())
def test_cells_do_not_depend_on_the_cells_beside_them(data):
    received = data.draw(screens())
    whole = read(data.draw(spellings(received)))
    order = data.draw(st.permutations(range(len(received))))[: max(1, len(received) // 2)]
    part = read(data.draw(spellings([received[i] for i in order])), whole.vocabulary)
    found = decoded(part.codes, part.doses, part.vocabulary)
    assert found == as_kept([received[i] for i in order])


@given(st.data())
def test_what_was_read_can_be_written_and_read_again(data):
    encoded = read(data.draw(spellings(data.draw(screens()))))
    cells = decoded(encoded.codes, encoded.doses, encoded.vocabulary)
    again = read(data.draw(spellings(cells)), encoded.vocabulary)
    np.testing.assert_array_equal(again.codes, encoded.codes)
    np.testing.assert_array_equal(again.doses, encoded.doses)


@given(st.data())
def test_a_dosage_matrix_says_the_same_as_labels(data):
    received = data.draw(screens())
    by_label = read(data.draw(spellings(received)))
    columns = data.draw(st.permutations(by_label.vocabulary))
    table = pd.DataFrame([{name: cell.get(name, 0.0) for name in columns} for cell in received])
    forms = [table[columns], table.to_numpy(), sparse.csr_matrix(table), sparse.csc_matrix(table)]
    matrix = data.draw(st.sampled_from(forms))
    by_matrix = encode_dosage_matrix(matrix, columns, vocabulary=by_label.vocabulary)
    np.testing.assert_array_equal(by_matrix.codes, by_label.codes)
    np.testing.assert_array_equal(by_matrix.doses, by_label.doses)


@given(
    st.lists(names, min_size=1, max_size=4, unique=True), st.sampled_from(DELIMITERS), st.randoms()
)
def test_a_label_has_one_canonical_spelling(parts, delimiter, random):
    shuffled = random.sample([*parts, "control"], len(parts) + 1)
    label = f" {delimiter} ".join(shuffled)
    canonical = canonical_label(label, delimiter=delimiter)
    assert canonical == delimiter.join(sorted(parts))
    assert canonical_label(canonical, delimiter=delimiter) == canonical
