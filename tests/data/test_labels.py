"""Labels to codes: expected codes are positions in the sorted names, written out by hand."""

import enum

import numpy as np
import pandas as pd
import pytest

from scvi_sams.data import canonical_label
from scvi_sams.exceptions import InvalidPerturbationLabelError, UnknownPerturbationError
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Spelling, control_names


def encode(labels, *, control=("ctrl",), delimiter="+", vocabulary=None):
    return encode_labels(labels, spelling=Spelling.of(control, delimiter), vocabulary=vocabulary)


def test_codes_are_positions_in_the_sorted_names_and_doses_are_one(cells):
    encoded = encode(cells(["KLF1", "ctrl", "MAP2K6+KLF1", "CEBPA"]))
    assert encoded.vocabulary == ("CEBPA", "KLF1", "MAP2K6")
    np.testing.assert_array_equal(encoded.codes, [[1, -1], [-1, -1], [1, 2], [0, -1]])
    np.testing.assert_array_equal(encoded.doses, [[1, 0], [0, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(encoded.is_control, [False, True, False, False])


@pytest.mark.parametrize("delimiter", ["+", "_", "|", ".", ";", "-", " ", " & ", "::", "--", "and"])
def test_every_delimiter_splits_and_the_order_of_names_plays_no_part(cells, delimiter):
    join = delimiter.join
    labels = [join("BA"), join("AB"), "ctrl", join("CBA"), join("BCA"), "C"]
    encoded = encode(cells(labels), delimiter=delimiter)
    assert encoded.vocabulary == ("A", "B", "C")
    np.testing.assert_array_equal(
        encoded.codes,
        [[0, 1, -1], [0, 1, -1], [-1, -1, -1], [0, 1, 2], [0, 1, 2], [2, -1, -1]],
    )


@pytest.mark.parametrize("delimiter", [None, ""])
def test_labels_are_never_split_without_a_delimiter(cells, delimiter):
    encoded = encode(cells(["A+B", "ctrl", "B+A", "A_B"]), delimiter=delimiter)
    assert encoded.vocabulary == ("A+B", "A_B", "B+A")
    np.testing.assert_array_equal(encoded.codes, [[0], [-1], [2], [1]])


def test_spaces_around_names_play_no_part(cells):
    encoded = encode(cells(["A + B", " B+A ", "ctrl ", "A"]))
    assert encoded.vocabulary == ("A", "B")
    np.testing.assert_array_equal(encoded.codes, [[0, 1], [0, 1], [-1, -1], [0, -1]])


class Guide:
    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Target(enum.StrEnum):
    A = "A"
    CONTROL = "ctrl"
    PAIR = "B+A"


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(["A", "ctrl", "B+A"], dtype="str"),
        pd.Series(["A", "ctrl", "B+A"], dtype="string"),
        pd.Series(["A", "ctrl", "B+A"], dtype=object),
        pd.Series(
            pd.Categorical(["A", "ctrl", "B+A"], categories=["Z", "B+A", "ctrl", "A", "Y+X"])
        ),
        pd.Series(pd.Categorical(["A", "ctrl", "B+A"], ordered=True)),
        pd.Series([np.str_("A"), np.str_("ctrl"), np.str_("B+A")], dtype=object),
        pd.Series([Guide("A"), Guide("ctrl"), Guide("B+A")], dtype=object),
        pd.Series([Target.A, Target.CONTROL, Target.PAIR], dtype=object),
    ],
    ids=[
        "str",
        "string",
        "object",
        "unused levels",
        "ordered",
        "numpy strings",
        "objects",
        "enumeration",
    ],
)
def test_labels_of_any_type_are_read_as_they_print(labels):
    encoded = encode(labels)
    assert encoded.vocabulary == ("A", "B")
    np.testing.assert_array_equal(encoded.codes, [[0, -1], [-1, -1], [0, 1]])


def test_integer_labels_are_names_sorted_as_text(cells):
    encoded = encode(cells([0, 10, 9, 0]), control=("0",))
    assert encoded.vocabulary == ("10", "9")
    np.testing.assert_array_equal(encoded.codes, [[-1], [0], [1], [-1]])


def test_a_number_and_its_text_are_the_same_label(cells):
    encoded = encode(cells([1, "1", "ctrl"], dtype=object))
    assert encoded.vocabulary == ("1",)
    np.testing.assert_array_equal(encoded.codes, [[0], [0], [-1]])


def test_many_cells_of_few_labels_each_get_the_code_of_their_label(cells):
    rng = np.random.default_rng(0)
    names = np.array(["ctrl", "A", "B", "B+A"])
    chosen = rng.integers(4, size=1000)
    expected = np.array([[-1, -1], [0, -1], [1, -1], [0, 1]])[chosen]
    np.testing.assert_array_equal(encode(cells(names[chosen])).codes, expected)


def test_no_cells_give_no_codes(cells):
    encoded = encode(cells([], dtype=object), vocabulary=["A"])
    assert encoded.codes.shape == (0, 1)


# Controls


def test_one_control_label_or_several():
    assert control_names("ctrl") == ("ctrl",)
    assert control_names(["NT1", "NT2"]) == ("NT1", "NT2")


def test_guide_pairs_with_several_non_targeting_guides(cells):
    labels = cells(["KLF1_MAP2K6", "NT1", "NT2", "KLF1_NT1", "NT2_MAP2K6", "NT1_NT2", "NT2_NT2"])
    encoded = encode(labels, control=("NT1", "NT2"), delimiter="_")
    assert encoded.vocabulary == ("KLF1", "MAP2K6")
    np.testing.assert_array_equal(
        encoded.codes, [[0, 1], [-1, -1], [-1, -1], [0, -1], [1, -1], [-1, -1], [-1, -1]]
    )


def test_a_control_inside_a_combination_stands_for_nothing(cells):
    encoded = encode(cells(["A+ctrl", "ctrl+A", "ctrl+ctrl", "ctrl", "A"]))
    np.testing.assert_array_equal(encoded.codes, [[0], [0], [-1], [-1], [0]])
    np.testing.assert_array_equal(encoded.doses, [[1], [1], [0], [0], [1]])


def test_a_control_label_may_hold_the_delimiter(cells):
    labels = cells(["non_targeting", "KLF1", "KLF1_MAP2K6", "safe_harbor_1"])
    encoded = encode(labels, control=("non_targeting", "safe_harbor_1"), delimiter="_")
    assert encoded.vocabulary == ("KLF1", "MAP2K6")
    np.testing.assert_array_equal(encoded.codes, [[-1, -1], [0, -1], [0, 1], [-1, -1]])


@pytest.mark.parametrize("label", ["KLF1_non_targeting", "non_targeting_KLF1"])
def test_a_control_that_holds_the_delimiter_stands_for_nothing_in_a_combination(cells, label):
    encoded = encode(cells(["non_targeting", label]), control=("non_targeting",), delimiter="_")
    assert encoded.vocabulary == ("KLF1",)
    np.testing.assert_array_equal(encoded.codes, [[-1], [0]])


def test_spaces_around_a_control_label_play_no_part(cells):
    encoded = encode(cells(["ctrl ", "A"]), control=("ctrl ",))
    np.testing.assert_array_equal(encoded.codes, [[-1], [0]])


def test_names_that_only_contain_a_control_label_are_perturbations(cells):
    encoded = encode(cells(["ctrl", "ctrl2", "xctrl", "c"]))
    assert encoded.vocabulary == ("c", "ctrl2", "xctrl")


def test_a_single_control_label_is_not_taken_apart_into_letters(cells):
    encoded = encode(cells(["ctrl", "c"]), control="ctrl")
    assert encoded.vocabulary == ("c",)
    assert canonical_label("c", control="ctrl") == "c"


# Labels that cannot be read


@pytest.mark.parametrize("label", ["", "   ", "A+", "+A", "A++B", "A+ +B", "+"])
def test_empty_names_are_refused_and_the_label_is_named(cells, label):
    with pytest.raises(InvalidPerturbationLabelError, match="empty") as error:
        encode(cells(["ctrl", label, "A"]))
    assert repr(label) in str(error.value)
    assert "delimiter" in str(error.value)


@pytest.mark.parametrize(("label", "name"), [("A+A", "A"), ("B+A+ B", "B"), ("B+ctrl+B", "B")])
def test_repeated_names_are_refused_and_label_and_name_are_named(cells, label, name):
    with pytest.raises(InvalidPerturbationLabelError, match="dosage") as error:
        encode(cells(["ctrl", label]))
    assert repr(label) in str(error.value)
    assert f"names {name} twice" in str(error.value)


@pytest.mark.parametrize("dtype", [object, "string", "category"])
@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_missing_labels_are_counted_and_their_cells_named(cells, dtype, missing):
    labels = cells(["ctrl", missing, "A", missing, missing], dtype=object).astype("category")
    with pytest.raises(InvalidPerturbationLabelError, match="3 of 5 cells") as error:
        encode(labels if dtype == "category" else labels.astype(dtype))
    assert "'c1', 'c3', 'c4'" in str(error.value)


def test_missing_integer_labels_are_refused(cells):
    with pytest.raises(InvalidPerturbationLabelError, match="1 of 3 cells"):
        encode(cells([0, 1, None], dtype="Int64"), control=("0",))


def test_a_long_list_of_missing_cells_is_cut_short(cells):
    with pytest.raises(InvalidPerturbationLabelError, match="and 15 more"):
        encode(cells([None] * 20 + ["ctrl"], dtype=object))


def test_a_list_of_names_as_label_is_refused_as_a_label(cells):
    with pytest.raises(InvalidPerturbationLabelError):
        encode(cells([["A", "B"], ["ctrl"]]))


# A vocabulary that is already known


def test_codes_refer_to_the_given_vocabulary_and_stay_ascending(cells):
    encoded = encode(cells(["A+B", "C", "ctrl", "C+A"]), vocabulary=["C", "B", "A"])
    assert encoded.vocabulary == ("C", "B", "A")
    np.testing.assert_array_equal(encoded.codes, [[1, 2], [0, -1], [-1, -1], [0, 2]])


def test_new_and_wider_combinations_of_known_perturbations_are_encoded(cells):
    encoded = encode(cells(["A+C+B", "B+D"]), vocabulary=["A", "B", "C", "D"])
    np.testing.assert_array_equal(encoded.codes, [[0, 1, 2], [1, 3, -1]])


def test_an_unknown_perturbation_is_named_with_similar_known_ones(cells):
    with pytest.raises(UnknownPerturbationError) as error:
        encode(cells(["ctrl", "KLF1+MAP2K66"]), vocabulary=["CEBPA", "KLF1", "MAP2K3", "MAP2K6"])
    message = str(error.value)
    assert "Unknown perturbation: 'MAP2K66'" in message
    assert "did you mean 'MAP2K6', 'MAP2K3'" in message
    assert "`control`" in message
    assert "`delimiter`" in message


@pytest.mark.parametrize("name", ["map2k6", "Map2K6"])
def test_a_name_in_another_case_is_found(cells, name):
    with pytest.raises(UnknownPerturbationError, match=r"did you mean 'MAP2K6'\?"):
        encode(cells(["ctrl", name]), vocabulary=["CEBPA", "KLF1", "MAP2K6"])


def test_a_combination_with_another_delimiter_is_named_by_its_parts(cells):
    with pytest.raises(UnknownPerturbationError) as error:
        encode(cells(["ctrl", "KLF1_CEBPA"]), vocabulary=["CEBPA", "KLF1", "MAP2K6"])
    message = str(error.value)
    assert "combination of 'KLF1' and 'CEBPA', join them by the registered `delimiter`" in message
    assert "did you mean" not in message


def test_all_unknown_perturbations_are_named_once_and_known_ones_are_shown(cells):
    with pytest.raises(UnknownPerturbationError) as error:
        encode(cells(["Y9", "X8", "Y9+A", "ctrl"]), vocabulary=["A", "B"])
    message = str(error.value)
    assert "Unknown perturbations: 'X8', 'Y9'." in message
    assert "2 perturbations are known, such as 'A', 'B'" in message


def test_the_wrong_delimiter_shows_as_an_unknown_perturbation(cells):
    with pytest.raises(UnknownPerturbationError, match="'A_B'"):
        encode(cells(["A_B", "ctrl"]), vocabulary=["A", "B"])


# One spelling of a label


@pytest.mark.parametrize(
    ("label", "spelling"),
    [
        ("B+A", "A+B"),
        ("A+B", "A+B"),
        (" C + A+B ", "A+B+C"),
        ("A+control", "A"),
        ("control+control", "control"),
        ("control", "control"),
        (7, "7"),
    ],
)
def test_canonical_label_does_not_depend_on_who_wrote_it(label, spelling):
    assert canonical_label(label) == spelling


def test_canonical_label_calls_every_control_by_the_first():
    arguments = {"delimiter": "_", "control": ("non_targeting", "NT2")}
    assert canonical_label("NT2", **arguments) == "non_targeting"
    assert canonical_label("MAP2K6_KLF1", **arguments) == "KLF1_MAP2K6"
    assert canonical_label("A+B", delimiter=None) == "A+B"


@pytest.mark.parametrize("label", ["A++B", "A+A", ""])
def test_canonical_label_refuses_what_encoding_refuses(label):
    with pytest.raises(InvalidPerturbationLabelError):
        canonical_label(label)
