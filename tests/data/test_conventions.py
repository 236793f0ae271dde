"""What names often mean: controls, missing assignments, guides, combinations."""

import pytest

from scvi_sams.labels._conventions import (
    guides_of_genes,
    likely_delimiter,
    looks_like_control,
    looks_unassigned,
)

CONTROLS = (
    "NT NT_1 nt-3 NTg1 NTC NTC_2 non-targeting Non_Targeting nonTargeting12 safe-targeting "
    "safe_targeting_3 AAVS1 AAVS1_2 LacZ lacZ-1 PBS DMSO DMSO_TF ctrl ctrl1 control Control_3 "
    "neg_ctrl scramble mock Vehicle untreated"
)
UNASSIGNED = (
    "unassigned Multiple doublet multiplet nan NaN none NA N/A <NA> null unknown no_guide ambiguous"
)
GENES = (
    "NTS NT5C NT5E NTN1 NTM NTHL1 NEGR1 CTRB1 CTRC SAFB GFPT1 WT1 NANS NANOG NAA10 NONO MULT1 "
    "MOCS1 PBSN SCRIB VHL KRTAP5-1 HLA-A"
)


@pytest.mark.parametrize("name", CONTROLS.split())
def test_names_of_controls(name):
    assert looks_like_control(name)
    assert not looks_unassigned(name)


@pytest.mark.parametrize("name", UNASSIGNED.split())
def test_words_for_no_assignment(name):
    assert looks_unassigned(name)
    assert not looks_like_control(name)


@pytest.mark.parametrize("name", GENES.split())
def test_genes_are_neither(name):
    assert not looks_like_control(name)
    assert not looks_unassigned(name)


@pytest.mark.parametrize(
    "mark", ["_", "|", ",", ";", "&", ":", "/", "-", "+", " + ", " & ", "__", "::", "."]
)
def test_the_delimiter_joins_names_that_occur_alone(mark):
    names = ["A", "B", "C", f"A{mark}B", f"C{mark}A", "D", f"D{mark}other"]
    assert likely_delimiter(names, ["control"]) == (mark, [f"A{mark}B", f"C{mark}A"])


def test_names_that_occur_only_with_a_control_count_as_names():
    names = ["A_ctrl", "ctrl_B", "A_B"]
    assert likely_delimiter(names, ["ctrl"]) == ("_", names)
    assert likely_delimiter(["A_NT", "NT_B", "A_B"], ["control"]) is not None


@pytest.mark.parametrize(
    "names", [["HLA-A", "HLA-B", "A"], ["A", "B", "A_B"], ["A_1", "A_2", "B_1"], [], ["NT_NT"]]
)
def test_few_or_unknown_parts_are_no_combinations(names):
    assert likely_delimiter(names, ["control"]) is None


@pytest.mark.parametrize(
    "guides",
    [
        ["STAT1_g1", "STAT1_g2"],
        ["STAT1g1", "STAT1g2"],
        ["sgSTAT1_1", "sgSTAT1_12"],
        ["STAT1_sg1", "STAT1_sg2"],
        ["STAT1-guide1", "STAT1.g2"],
        ["STAT1_1", "STAT1_2"],
    ],
)
def test_guides_of_one_gene(guides):
    assert guides_of_genes([*guides, "B", "C"]) == {"STAT1": guides}


@pytest.mark.parametrize(
    "names",
    [
        ["KRTAP5-1", "KRTAP5-2", "NKX2-1", "NKX2-5"],
        ["IFNGR1", "IFNGR2", "P001", "P002"],
        ["Reg1", "Reg2", "Cyp2g1"],
        ["NT_1", "NT_2"],
        ["STAT1g1", "JAK1g1"],
        ["LPS_1", "LPS_2", *"ABCDEFGHIJ"],
    ],
)
def test_genes_and_controls_with_numbers_are_no_guides(names):
    assert guides_of_genes(names) == {}
