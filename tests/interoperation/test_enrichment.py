"""Programs handed over to gseapy and decoupler: a planted gene set comes out first."""

import numpy as np
import pandas as pd
import pytest

from interpretation.builders import SETS, planted_programs
from scvi_sams.interpretation import gene_ranking


@pytest.fixture
def programs():
    return planted_programs()[["latent_0", "latent_1"]]


@pytest.mark.parametrize(("latent", "sign"), [("latent_0", 1), ("latent_1", -1)])
def test_gseapy_takes_the_ranking_of_a_program(programs, latent, sign):
    gseapy = pytest.importorskip("gseapy")
    found = gseapy.prerank(
        rnk=gene_ranking(programs, latent),
        gene_sets=SETS,
        min_size=5,
        permutation_num=100,
        outdir=None,
        seed=0,
        threads=1,
    ).res2d.set_index("Term")
    scores = found["NES"].astype(float)
    assert scores.abs().idxmax() == "planted"
    assert np.sign(scores["planted"]) == sign
    assert float(found.loc["planted", "FDR q-val"]) < 0.05


def test_decoupler_takes_programs(programs):
    decoupler = pytest.importorskip("decoupler")
    net = pd.DataFrame(
        [(name, gene, 1.0) for name, genes in SETS.items() for gene in genes],
        columns=["source", "target", "weight"],
    )
    scores, p_values = decoupler.mt.ulm(programs.T, net)
    assert scores.index.tolist() == ["latent_0", "latent_1"]
    assert scores.abs().idxmax(axis=1).tolist() == ["planted", "planted"]
    assert scores["planted"].gt(0).tolist() == [True, False]
    assert p_values["planted"].max() < 1e-6
