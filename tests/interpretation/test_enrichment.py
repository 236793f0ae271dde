"""Enrichment of gene sets: statistics by hand, planted sets, and the ways in."""

import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from interpretation.builders import GENES, SETS, planted_programs
from model.builders import N_LATENT, VARIANTS, set_effects, small_screen, train_small
from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingKeyError,
    MissingPackageError,
    SAMSError,
    UnknownPerturbationError,
    UnreadableDataError,
)
from scvi_sams.interpretation import enrichment


@pytest.fixture
def programs():
    return planted_programs()


@pytest.fixture
def gmt(tmp_path):
    lines = [chr(9).join([name, "described", *genes]) for name, genes in SETS.items()]
    path = tmp_path / "sets.gmt"
    path.write_text(chr(10).join(lines))
    return path


@pytest.fixture(scope="module")
def model():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    set_effects(model, np.random.default_rng(5).normal(size=(4, N_LATENT)))
    return model


def test_scores_are_those_of_a_regression_on_membership(programs):
    pytest.importorskip("decoupler")
    found = enrichment(programs, SETS)
    assert found["latent"].unique().tolist() == ["latent_0", "latent_1"]
    assert len(found) == 2 * len(SETS)
    for row in found.itertuples():
        membership = np.isin(GENES, SETS[row.gene_set]).astype(float)
        fit = stats.linregress(membership, programs[row.latent])
        assert row.score == pytest.approx(fit.slope / fit.stderr, rel=1e-4)
        assert row.p_value == pytest.approx(fit.pvalue, rel=1e-3)
    expected = stats.false_discovery_control(found["p_value"])
    np.testing.assert_allclose(found["q_value"], expected)


@pytest.mark.parametrize("method", ["ulm", "gsea"])
def test_a_planted_set_leads_with_its_sign_and_its_genes(programs, method):
    pytest.importorskip({"ulm": "decoupler", "gsea": "gseapy"}[method])
    found = enrichment(programs, SETS, method=method, n_permutations=1000)
    for latent, sign in (("latent_0", 1), ("latent_1", -1)):
        first = found[found["latent"] == latent].iloc[0]
        assert first["gene_set"] == "planted"
        assert np.sign(first["score"]) == sign
        assert first["q_value"] < 0.05
        assert first["n_genes"] == 20
        leading = (sign * programs.loc[GENES[:20], latent]).nlargest(10).index
        assert first["leading_genes"] == ", ".join(leading)


def test_a_file_of_gene_sets_is_as_good_as_a_dict(programs, gmt):
    pytest.importorskip("decoupler")
    pd.testing.assert_frame_equal(enrichment(programs, gmt), enrichment(programs, SETS))


def test_only_measured_genes_count(programs):
    pytest.importorskip("decoupler")
    sets = SETS | {
        "elsewhere": ["X1", "X2", "X3", "X4", "X5", *GENES[:4]],
        "padded": [*GENES[:20], *GENES[:3], "X1"],
        "large": GENES,
    }
    found = enrichment(programs, sets, names="latent_0", max_genes=100)
    assert set(found["gene_set"]) == {*SETS, "padded"}
    rows = found.set_index("gene_set")
    assert rows.loc["padded", "n_genes"] == 20
    assert rows.loc["padded", "score"] == pytest.approx(rows.loc["planted", "score"])


def test_a_model_and_the_screen_in_which_it_wrote(model, tmp_path):
    pytest.importorskip("decoupler")
    genes = model.adata.var_names
    sets = {"first": genes[:8], "second": genes[8:16], "third": genes[16:]}
    table = model.get_latent_programs()
    expected = enrichment(table, sets)
    pd.testing.assert_frame_equal(enrichment(model, sets), expected)
    ate = model.predict_ate(["P001", "P002+P003"], method="lograte")
    of_ate = enrichment(ate, sets, of="perturbations")
    model.adata.write_h5ad(tmp_path / "results.h5ad")
    stored = ad.read_h5ad(tmp_path / "results.h5ad")
    pd.testing.assert_frame_equal(enrichment(stored, sets), expected, check_exact=False)
    pd.testing.assert_frame_equal(
        enrichment(stored, sets, of="perturbations"), of_ate, check_exact=False
    )
    assert of_ate["perturbation"].unique().tolist() == ["P001", "P002+P003"]


def test_combinations_are_asked_for_in_any_order(model):
    pytest.importorskip("decoupler")
    sets = {"first": model.adata.var_names[:8], "second": model.adata.var_names[8:16]}
    found = enrichment(model, sets, of="perturbations", names=["P003+P001"])
    assert found["perturbation"].unique().tolist() == ["P001+P003"]
    effect = model.predict_ate(["P001+P003"], method="lograte", key_added=None).to_df().T
    membership = np.isin(effect.index, sets["first"]).astype(float)
    fit = stats.linregress(membership, effect["P001+P003"])
    score = found.set_index("gene_set").loc["first", "score"]
    assert score == pytest.approx(fit.slope / fit.stderr, abs=0.3)  # other samples


def test_what_is_not_there_is_named(programs, model, tmp_path):
    pytest.importorskip("decoupler")
    with pytest.raises(MissingKeyError, match="'latent_9'"):
        enrichment(programs, SETS, names="latent_9")
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        enrichment(model, SETS, of="perturbations", names="P9")
    with pytest.raises(MissingKeyError, match=r"model\.get_latent_programs"):
        enrichment(small_screen(), SETS)
    with pytest.raises(UnreadableDataError, match=r"none\.gmt"):
        enrichment(programs, tmp_path / "none.gmt")
    with pytest.raises(InvalidArgumentError, match="the largest has 0"):
        enrichment(programs, {"mouse": ["Stat1", "Irf1"]})
    with pytest.raises(InvalidArgumentError, match="predict_ate"):
        enrichment(programs, SETS, of="perturbations")
    with pytest.raises(SAMSError, match="No gene changes"):
        enrichment(programs, SETS, names=["latent_2"])


@pytest.mark.parametrize(("method", "name"), [("ulm", "decoupler"), ("gsea", "gseapy")])
def test_a_package_that_is_missing_is_named(programs, monkeypatch, method, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"{name}.*scvi-sams\[enrichment\]"):
        enrichment(programs, SETS, method=method)


@pytest.mark.parametrize(
    "wrong",
    [{"of": "cells"}, {"method": "ora"}, {"min_genes": 0}, {"max_genes": 2}, {"seed": -1}],
    ids=str,
)
def test_invalid_arguments_raise(programs, wrong):
    with pytest.raises(InvalidArgumentError):
        enrichment(programs, SETS, **wrong)
