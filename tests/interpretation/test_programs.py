"""Tables of gene programs: by hand."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.interpretation import gene_ranking, latent_perturbations, top_genes

PROGRAMS = pd.DataFrame(
    {"latent_0": [0.5, -2.0, 1.0, 0.0], "latent_1": [0.0, 0.0, 0.0, 0.0]},
    index=["A", "B", "C", "D"],
)
MASKS = pd.DataFrame(
    {"latent_0": [0.99, 0.999, 0.0], "latent_1": [0.02, 1.0, 0.01], "latent_2": [0.0, 0.1, 0.2]},
    index=["P1", "P2", "P3"],
)


@pytest.mark.parametrize(
    ("direction", "genes", "changes"),
    [
        ("both", ["B", "C", "A"], [-2.0, 1.0, 0.5]),
        ("up", ["C", "A"], [1.0, 0.5]),
        ("down", ["B"], [-2.0]),
    ],
)
def test_top_genes_by_hand(direction, genes, changes):
    found = top_genes(PROGRAMS, 3, direction=direction)
    assert list(found["gene"]) == genes
    assert list(found["change"]) == changes
    assert list(found["rank"]) == list(range(1, len(genes) + 1))
    assert set(found["latent"]) == {"latent_0"}  # a dimension without a program has no genes


def test_top_genes_are_as_many_as_asked_for_and_in_the_order_of_the_latents():
    wide = pd.DataFrame(
        np.random.default_rng(0).normal(size=(30, 12)),
        columns=[f"latent_{i}" for i in range(12)],
    )
    found = top_genes(wide, 4)
    assert list(found["latent"].unique()) == list(wide.columns)
    assert (found.groupby("latent")["rank"].max() == 4).all()
    for latent, genes in found.groupby("latent"):
        assert set(genes["gene"]) == set(wide[latent].abs().nlargest(4).index)


def test_genes_that_share_a_name_are_told_apart_by_place():
    doubled = PROGRAMS.set_axis(["A", "B", "B", "D"])
    assert list(top_genes(doubled, 2)["change"]) == [-2.0, 1.0]
    assert gene_ranking(doubled, "latent_0").to_dict() == {"A": 0.5, "D": 0.0, "B": -2.0}


def test_perturbations_that_share_a_latent_by_hand():
    found = latent_perturbations(MASKS, fdr=0.05)
    assert list(zip(found["latent"], found["perturbation"], strict=True)) == [
        ("latent_0", "P2"),
        ("latent_0", "P1"),
        ("latent_1", "P2"),
    ]
    assert list(found["n_perturbations"]) == [2, 2, 1]
    assert list(found["inclusion_probability"]) == [0.999, 0.99, 1.0]


def test_the_strongest_effect_comes_first_whatever_the_order_of_the_tables():
    effects = pd.DataFrame(
        {"latent_2": 0.0, "latent_1": 1.0, "latent_0": [-3.0, 2.0, 0.0]}, index=["P1", "P2", "P3"]
    )
    found = latent_perturbations(MASKS, effects=effects.iloc[::-1])
    assert list(found["perturbation"]) == ["P1", "P2", "P2"]
    assert list(found["effect"]) == [-3.0, 2.0, 1.0]


def test_nothing_active_is_an_empty_table():
    found = latent_perturbations(0.1 * MASKS)
    assert found.empty
    assert list(found.columns)[:3] == ["latent", "perturbation", "inclusion_probability"]


def test_the_ranking_holds_every_gene_once_largest_first():
    ranking = gene_ranking(PROGRAMS, "latent_0")
    assert ranking.to_dict() == {"C": 1.0, "A": 0.5, "D": 0.0, "B": -2.0}
    assert list(ranking.index) == ["C", "A", "D", "B"]
    assert ranking.name == "latent_0"


def test_wrong_input_is_refused():
    with pytest.raises(SAMSError, match="'sideways'"):
        top_genes(PROGRAMS, direction="sideways")
    with pytest.raises(SAMSError, match="such as 'B'"):
        top_genes(PROGRAMS.replace(-2.0, np.nan))
    with pytest.raises(MissingKeyError, match="'latent_9'"):
        gene_ranking(PROGRAMS, "latent_9")
    with pytest.raises(MissingKeyError, match="'latent_2'"):
        latent_perturbations(MASKS, effects=MASKS[["latent_0", "latent_1"]])
    with pytest.raises(SAMSError, match="probabilities"):
        latent_perturbations(MASKS - 1)


def test_entries_that_were_called_count_as_they_are():
    called = pd.DataFrame({"latent_0": [True, False], "latent_1": [True, True]}, index=["A", "B"])
    table = latent_perturbations(called)
    assert list(zip(table["latent"], table["perturbation"], strict=True)) == [
        ("latent_0", "A"),
        ("latent_1", "A"),
        ("latent_1", "B"),
    ]
