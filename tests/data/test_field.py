"""The AnnData field: what it writes, what it remembers, and how it encodes other data."""

import io
import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from rich.console import Console
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams import SAMSVAE
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._field import PerturbationField, registered_labels, unpack_perturbations
from scvi_sams.exceptions import (
    InvalidDosageError,
    InvalidPerturbationLabelError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

SLOT = "_scvi_perturbations"
LABELS = ["control", "B+A", "A", "C", "control", "A+B"]


def register(adata, **arguments):
    """Register only the perturbations."""
    arguments = {
        "perturbation_key": "perturbation",
        "control": ("control",),
        "delimiter": "+",
    } | arguments
    manager = AnnDataManager(
        fields=[PerturbationField(**arguments)],
        setup_method_args={"model_name": "test", "setup_args": {}},
    )
    manager.register_fields(adata)
    return manager


def state_of(manager):
    return manager.get_state_registry(REGISTRY_KEYS.PERTURBATIONS)


def with_matrix(make_screen, matrix, **uns):
    adata = make_screen(["unused"] * matrix.shape[0])
    adata.obsm["dosage"] = (
        matrix.set_axis(adata.obs_names) if isinstance(matrix, pd.DataFrame) else matrix
    )
    adata.uns.update(uns)
    return adata


def test_obsm_holds_codes_then_doses_in_float32(make_screen):
    adata = make_screen(LABELS, dose=["0", "0.5+2", "3", "4", "0", "1"])
    register(adata, dosage_key="dose")
    assert adata.obsm[SLOT].dtype == np.float32
    np.testing.assert_array_equal(
        adata.obsm[SLOT],
        [
            [-1, -1, 0, 0],
            [0, 1, 2, 0.5],
            [0, -1, 3, 0],
            [2, -1, 4, 0],
            [-1, -1, 0, 0],
            [0, 1, 1, 1],
        ],
    )


def test_codes_come_back_as_integers(make_screen):
    manager = register(make_screen(LABELS))
    labels = registered_labels(manager)
    codes, doses = labels.codes, labels.doses
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes, [[-1, -1], [0, 1], [0, -1], [2, -1], [-1, -1], [0, 1]])
    np.testing.assert_array_equal(doses, [[0, 0], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1]])


def test_the_registry_remembers_names_and_numbers(make_screen):
    manager = register(make_screen([*LABELS, "C+A+control", "A+C", "control+control"]))
    state = state_of(manager)
    assert list(state["vocabulary"]) == ["A", "B", "C"]
    assert state["n_control_cells"] == 3
    assert state["n_combinations"] == 2
    np.testing.assert_array_equal(state["cells_per_perturbation"], [5, 2, 3])
    assert manager.summary_stats.n_perturbations == 3


def test_a_perturbation_of_dose_zero_is_not_counted(make_screen):
    adata = make_screen(["control", "A+B", "A+B", "B"], dose=["0", "1+0", "1+1", "0"])
    state = state_of(register(adata, dosage_key="dose"))
    assert state["n_control_cells"] == 2
    assert state["n_combinations"] == 1
    np.testing.assert_array_equal(state["cells_per_perturbation"], [2, 1])


def test_what_is_left_of_a_combination_is_counted_by_its_names(make_screen):
    adata = make_screen(["control", "A+B+C", "B+C", "C+B"], dose=["0", "0+1+1", "1", "2"])
    assert state_of(register(adata, dosage_key="dose"))["n_combinations"] == 1


def test_the_table_of_the_registry_names_controls_counts_and_codes(make_screen):
    field = PerturbationField(
        perturbation_key="perturbation", control=("control", "NT"), delimiter="+"
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(field.view_state_registry(field.register_field(make_screen([*LABELS, "NT"]))))
    lines = [line.strip("│ ").split() for line in console.export_text().splitlines()]
    rows = [[word for word in line if word != "│"] for line in lines]
    assert ["control", "or", "NT", "3", "none"] in rows
    assert ["A", "3", "0"] in rows
    assert ["B", "2", "1"] in rows
    assert ["C", "1", "2"] in rows


# Other data


def test_other_data_are_encoded_by_name(make_screen):
    manager = register(make_screen(LABELS))
    other = make_screen(["C", "C+B", "control", "C+B+A"])
    transferred = manager.transfer_fields(other)
    codes = registered_labels(transferred).codes
    np.testing.assert_array_equal(codes, [[2, -1, -1], [1, 2, -1], [-1, -1, -1], [0, 1, 2]])
    assert list(state_of(transferred)["vocabulary"]) == ["A", "B", "C"]
    np.testing.assert_array_equal(state_of(transferred)["cells_per_perturbation"], [1, 2, 3])


def test_other_data_may_lack_controls_and_combinations(make_screen):
    manager = register(make_screen(LABELS))
    other = make_screen(["B", "A"])
    codes = registered_labels(manager.transfer_fields(other)).codes
    np.testing.assert_array_equal(codes, [[1], [0]])


def test_other_data_use_control_and_delimiter_of_the_registration(make_screen):
    manager = register(make_screen(["NT1", "A_B", "NT2"]), control=("NT1", "NT2"), delimiter="_")
    codes = registered_labels(manager.transfer_fields(make_screen(["B_NT2", "NT1_NT1"]))).codes
    np.testing.assert_array_equal(codes, [[1], [-1]])


def test_an_unknown_perturbation_in_other_data_is_named(make_screen):
    manager = register(make_screen(LABELS))
    with pytest.raises(UnknownPerturbationError, match="'Q'"):
        manager.transfer_fields(make_screen(["A+Q"]))


def test_encoding_other_data_leaves_the_registration_as_it_was(make_screen):
    adata = make_screen(LABELS)
    manager = register(adata)
    before = adata.obsm[SLOT].copy()
    manager.transfer_fields(make_screen(["C+B+A", "B"]))
    np.testing.assert_array_equal(adata.obsm[SLOT], before)
    assert state_of(manager)["n_combinations"] == 1
    np.testing.assert_array_equal(state_of(manager)["cells_per_perturbation"], [3, 2, 1])


def test_perturbations_that_other_data_lack_count_no_cells(make_screen):
    transferred = register(make_screen(LABELS)).transfer_fields(make_screen(["A", "A"]))
    np.testing.assert_array_equal(state_of(transferred)["cells_per_perturbation"], [2, 0, 0])


@pytest.mark.parametrize("way", ["copy", "h5ad", "view"])
def test_a_registration_survives(make_screen, tmp_path, way):
    adata = make_screen(LABELS, dose=["0", "0.5+2", "3", "4", "0", "1"])
    manager = register(adata, dosage_key="dose")
    if way == "copy":
        again = adata.copy()
    elif way == "view":
        again = adata[:].copy()
    else:
        adata.write_h5ad(tmp_path / "screen.h5ad")
        again = anndata.read_h5ad(tmp_path / "screen.h5ad")
    np.testing.assert_array_equal(again.obsm[SLOT], adata.obsm[SLOT])
    del again.obsm[SLOT]
    manager.transfer_fields(again)
    np.testing.assert_array_equal(again.obsm[SLOT], adata.obsm[SLOT])


# Dosage matrices

MATRIX = np.array([[0, 0, 0], [0.5, 0, 0], [0, 2, 0.25], [0, 0, 0]], dtype=np.float32)
NAMES = ["A", "B", "C"]
PACKED = [[-1, -1, 0, 0], [0, -1, 0.5, 0], [1, 2, 2, 0.25], [-1, -1, 0, 0]]


@pytest.mark.parametrize(
    ("form", "names", "uns"),
    [
        (np.asarray, NAMES, {}),
        (np.asarray, np.array(NAMES), {}),
        (np.asarray, pd.Index(NAMES), {}),
        (sparse.csr_matrix, tuple(NAMES), {}),
        (sparse.csr_matrix, "names", {"names": NAMES}),
        (sparse.csr_matrix, "names", {"names": np.array(NAMES)}),
        (lambda values: pd.DataFrame(values, columns=NAMES), None, {}),
    ],
    ids=["list", "array", "index", "csr", "uns list", "uns array", "DataFrame"],
)
def test_names_come_from_the_argument_uns_or_columns(make_screen, form, names, uns):
    adata = with_matrix(make_screen, form(MATRIX), **uns)
    manager = register(adata, dosage_obsm_key="dosage", perturbation_names=names)
    np.testing.assert_array_equal(adata.obsm[SLOT], PACKED)
    assert list(state_of(manager)["vocabulary"]) == NAMES
    assert state_of(manager)["n_control_cells"] == 2


def test_names_beside_a_table_may_repeat_its_columns(make_screen):
    adata = with_matrix(make_screen, pd.DataFrame(MATRIX, columns=NAMES))
    register(adata, dosage_obsm_key="dosage", perturbation_names=tuple(NAMES))
    np.testing.assert_array_equal(adata.obsm[SLOT], PACKED)


def test_permuted_columns_of_a_table_in_other_data_are_encoded_by_name(make_screen):
    table = pd.DataFrame(MATRIX, columns=NAMES)
    manager = register(with_matrix(make_screen, table), dosage_obsm_key="dosage")
    other = with_matrix(make_screen, table[["C", "A", "B"]])
    manager.transfer_fields(other)
    np.testing.assert_array_equal(other.obsm[SLOT], PACKED)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_permuted_columns_named_in_uns_of_other_data_are_encoded_by_name(make_screen, form):
    adata = with_matrix(make_screen, form(MATRIX), names=NAMES)
    manager = register(adata, dosage_obsm_key="dosage", perturbation_names="names")
    other = with_matrix(make_screen, form(MATRIX[:, [2, 0, 1]]), names=["C", "A", "B"])
    manager.transfer_fields(other)
    np.testing.assert_array_equal(other.obsm[SLOT], PACKED)


def test_other_data_may_hold_another_form_and_only_some_columns(make_screen):
    adata = with_matrix(make_screen, sparse.csr_matrix(MATRIX))
    manager = register(adata, dosage_obsm_key="dosage", perturbation_names=NAMES)
    other = with_matrix(make_screen, pd.DataFrame({"C": [0.0, 7]}))
    manager.transfer_fields(other)
    np.testing.assert_array_equal(other.obsm[SLOT], [[-1, 0], [2, 7]])


def test_an_unnamed_matrix_of_another_width_is_refused_in_other_data(make_screen):
    adata = with_matrix(make_screen, MATRIX)
    manager = register(adata, dosage_obsm_key="dosage", perturbation_names=NAMES)
    with pytest.raises(InvalidDosageError, match=r"3 perturbation names.* 2 columns"):
        manager.transfer_fields(with_matrix(make_screen, MATRIX[:, :2]))


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_dosage_matrix_survives_h5ad(make_screen, tmp_path, form):
    adata = with_matrix(make_screen, form(MATRIX), names=np.array(NAMES))
    manager = register(adata, dosage_obsm_key="dosage", perturbation_names="names")
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again = anndata.read_h5ad(tmp_path / "screen.h5ad")
    del again.obsm[SLOT]
    manager.transfer_fields(again)
    np.testing.assert_array_equal(again.obsm[SLOT], PACKED)


def test_explicit_zeros_of_the_user_stay_stored(make_screen):
    matrix = sparse.csr_matrix((np.float32([0, 1]), [0, 1], [0, 1, 2]), shape=(2, 2))
    adata = with_matrix(make_screen, matrix)
    register(adata, dosage_obsm_key="dosage", perturbation_names=["A", "B"])
    np.testing.assert_array_equal(adata.obsm["dosage"].data, [0, 1])
    np.testing.assert_array_equal(adata.obsm["dosage"].indptr, [0, 1, 2])


def test_a_column_of_a_control_label_stands_for_nothing(make_screen):
    table = pd.DataFrame({"A": [0.0, 1, 1], "control": [1.0, 0, 1]})
    adata = with_matrix(make_screen, table)
    manager = register(adata, dosage_obsm_key="dosage")
    assert list(state_of(manager)["vocabulary"]) == ["A"]
    np.testing.assert_array_equal(adata.obsm[SLOT], [[-1, 0], [0, 1], [0, 1]])


def test_a_matrix_without_controls_is_told_what_a_control_cell_is(make_screen):
    adata = with_matrix(make_screen, MATRIX[1:3])
    with pytest.raises(MissingControlError, match="zero"):
        register(adata, dosage_obsm_key="dosage", perturbation_names=NAMES)


def test_a_matrix_without_names_says_how_to_name_its_columns(make_screen):
    with pytest.raises(InvalidDosageError, match="`perturbation_names`"):
        register(with_matrix(make_screen, MATRIX), dosage_obsm_key="dosage")


# Registrations that are refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"perturbation_key": "guide"}, r"'guide'.*'perturbation'"),
        ({"dosage_key": "dose"}, r"'dose'.*'perturbation'"),
        ({"dosage_obsm_key": "dosage"}, "'dosage'"),
    ],
)
def test_missing_slots_are_named_beside_what_there_is(make_screen, arguments, named):
    with pytest.raises(MissingKeyError, match=named):
        register(make_screen(LABELS), **arguments)


def test_missing_names_in_uns_are_named(make_screen):
    with pytest.raises(MissingKeyError, match="'names'"):
        register(
            with_matrix(make_screen, MATRIX), dosage_obsm_key="dosage", perturbation_names="names"
        )


def test_neither_labels_nor_matrix_is_an_error_that_says_so(make_screen):
    with pytest.raises(SAMSError):
        register(make_screen(LABELS), perturbation_key=None)


def test_missing_controls_are_named_beside_the_labels_there_are(make_screen):
    with pytest.raises(MissingControlError) as error:
        register(make_screen(["A", "B"]), control=("control", "ctrl"))
    message = str(error.value)
    assert "'control' or 'ctrl'" in message
    assert "Labels name 'A', 'B'." in message
    assert "`control`" in message


@pytest.mark.parametrize("label", ["non-targeting", "NT", "neg_ctrl", "DMSO"])
def test_labels_that_look_like_controls_are_shown_first(make_screen, label):
    genes = ["ANTXR1", "BRCA1", "CNTN1", "EGFR", "FOXP3", "GATA1", "WNT5A"]
    with pytest.raises(MissingControlError, match=f"Labels name '{label}'"):
        register(make_screen([*genes, label]))


def test_controls_only_are_refused(make_screen):
    with pytest.raises(InvalidPerturbationLabelError, match="no perturbation to learn about"):
        register(make_screen(["control", "control+control"]))


def test_perturbations_that_are_all_of_dose_zero_are_refused(make_screen):
    with pytest.raises(SAMSError):
        register(make_screen(["control", "A"], dose=[0, 0]), dosage_key="dose")


# Size


def scvi_bytes(adata):
    in_obsm = sum(adata.obsm[key].nbytes for key in adata.obsm if key.startswith("_scvi"))
    in_obs = adata.obs.filter(like="_scvi").memory_usage(index=False, deep=True).sum()
    return in_obsm + in_obs


def test_ten_thousand_perturbations_take_the_memory_of_codes(make_screen):
    n_cells, n_perturbations = 20_000, 10_000
    names = np.char.add("P", np.arange(n_perturbations).astype(str))
    labels = np.concatenate([names, np.char.add(np.char.add(names, "+"), names[::-1])])
    labels[:100] = "control"
    adata = AnnData(
        sparse.csr_matrix(np.ones((n_cells, 2), np.float32)),
        obs=pd.DataFrame({"perturbation": labels}, index=np.arange(n_cells).astype(str)),
    )
    tracemalloc.start()
    SAMSVAE.setup_anndata(adata)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert adata.obsm[SLOT].shape == (n_cells, 4)
    assert adata.obsm[SLOT].nbytes == n_cells * 4 * 4
    assert scvi_bytes(adata) <= n_cells * (4 * 4 + 8)
    # A dense cells x perturbations matrix of bytes alone would take 200 MB.
    assert peak < 50e6
    codes, _ = unpack_perturbations(adata.obsm[SLOT])
    vocabulary = np.sort(names)
    np.testing.assert_array_equal(vocabulary[codes[150:160, 0]], names[150:160])


def test_the_width_is_that_of_the_largest_combination(make_screen):
    for labels, n_slots in ((["A", "B"], 1), (["A+B", "C"], 2), (["A+B+C+D", "E"], 4)):
        adata = make_screen(["control", *labels])
        register(adata)
        assert adata.obsm[SLOT].shape == (3, 2 * n_slots)
