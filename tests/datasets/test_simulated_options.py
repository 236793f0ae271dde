"""What a screen may have beyond the model of SAMS-VAE: own genes, nulls, guides, types, escape."""

import hashlib

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import nbinom

from scvi_sams.datasets import (
    simulate_screen,
    simulated_ate,
    simulated_log_likelihood,
    simulated_rates,
)
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

SMALL = {
    "n_genes": 40,
    "n_controls": 30,
    "n_perturbations": 6,
    "cells_per_perturbation": 10,
    "n_combinations": 5,
    "cells_per_combination": 8,
    "n_latent": 7,
    "n_hidden": 16,
}
EVERYTHING = {
    "knockdown": (0.7, 0.95),
    "n_null_perturbations": 2,
    "guides_per_perturbation": 3,
    "guide_efficacy": (0.2, 0.9),
    "n_cell_types": 3,
    "cell_type_specific_share": 0.5,
    "escape_rate": 0.25,
}
# Nothing but the own genes changes, and little noise hides it.
OWN_GENES_ONLY = {
    "n_genes": 60,
    "n_controls": 3000,
    "n_perturbations": 8,
    "cells_per_perturbation": 1500,
    "n_combinations": 0,
    "n_latent": 3,
    "effect_scale": 0.0,
    "inverse_dispersion": 50.0,
    "library_size": 3000.0,
    "knockdown": (0.7, 0.95),
}


def digest(adata):
    """Counts, labels and masks: whole numbers and text, the same on every machine."""
    parts = [
        adata.X.toarray().astype("<i8"),
        np.packbits(adata.uns["simulation"]["true_masks"]),
    ]
    text = "|".join([*adata.obs["perturbation"].astype(str), *adata.obs.columns])
    return hashlib.sha256(b"".join(p.tobytes() for p in parts) + text.encode()).hexdigest()[:16]


def acting_effects(adata):
    simulation = adata.uns["simulation"]
    return simulation["true_masks"] * simulation["true_effects"]


def shift(adata):
    return adata.obsm["true_latent"] - adata.obsm["true_basal"]


def odds_of_own_gene(adata, cells, gene):
    """Counts of a gene per count of the others."""
    x = adata.X[cells]
    own = x[:, adata.var_names.get_loc(gene)].sum()
    return own / (x.sum() - own)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seed": 3}, "00cf63405ab1a08e"),
        ({"seed": 1, "dosages": [0.5, 1.0, 2.25], "combination_size": 3}, "b506548fa0432c0d"),
        ({"seed": 0, "mask_probability": 0.4, "library_size": 300.0}, "290aadbc6c038a23"),
    ],
)
def test_screens_without_options_are_those_of_earlier_versions(settings, expected):
    adata = simulate_screen(**SMALL, **settings)
    assert digest(adata) == expected
    assert list(adata.obsm) == ["true_basal", "true_latent"]


def test_options_change_nothing_else():
    plain = simulate_screen(**SMALL, seed=4)
    full = simulate_screen(**SMALL, **EVERYTHING, seed=4)
    assert list(full.obs) == [
        "perturbation", "n_perturbations", "guide", "cell_type", "true_escaped", "library_size"
    ]  # fmt: skip
    np.testing.assert_array_equal(full.obsm["true_basal"], plain.obsm["true_basal"])
    np.testing.assert_array_equal(full.obs["library_size"], plain.obs["library_size"])
    ours, theirs = full.uns["simulation"], plain.uns["simulation"]
    np.testing.assert_array_equal(ours["true_effects"], theirs["true_effects"])
    kept = ours["true_masks"].any(axis=1)
    assert kept.sum() == 4
    np.testing.assert_array_equal(ours["true_masks"][kept], theirs["true_masks"][kept])
    for name, weights in theirs["decoder"].items():
        np.testing.assert_array_equal(ours["decoder"][name], weights)


@pytest.mark.parametrize("option", ["escape_rate", "guides_per_perturbation", "n_cell_types"])
def test_options_do_not_depend_on_each_other(option):
    alone = simulate_screen(**SMALL, **{option: EVERYTHING[option]})
    together = simulate_screen(**SMALL, **{k: v for k, v in EVERYTHING.items() if k != "knockdown"})
    column = {"escape_rate": "true_escaped", "n_cell_types": "cell_type"}.get(option, "guide")
    assert (alone.obs[column] == together.obs[column]).all()


def test_own_genes_go_down_by_the_share_asked_for():
    adata = simulate_screen(**OWN_GENES_ONLY)
    simulation = adata.uns["simulation"]
    targets = simulation["perturbations"]
    assert set(targets) <= set(adata.var_names)
    assert list(targets) == sorted(set(targets))
    left = np.exp(simulation["true_own_gene_effects"])
    assert ((left >= 0.05) & (left <= 0.3)).all()
    assert np.ptp(left) > 0.05  # each its own
    labels = adata.obs["perturbation"].to_numpy()
    control = labels == "control"
    for target, expected in zip(targets, left, strict=True):
        treated, untreated = (
            odds_of_own_gene(adata, cells, target) for cells in (labels == target, control)
        )
        assert treated / untreated == pytest.approx(expected, rel=0.12)
    # Of another gene nothing is removed.
    other = next(gene for gene in adata.var_names if gene not in targets)
    ratios = [odds_of_own_gene(adata, labels == target, other) for target in targets]
    np.testing.assert_allclose(ratios / odds_of_own_gene(adata, control, other), 1, atol=0.15)


def test_own_genes_follow_the_dose():
    adata = simulate_screen(**OWN_GENES_ONLY, dosages=[0.5, 2.0])
    target = adata.uns["simulation"]["perturbations"][0]
    effect = adata.uns["simulation"]["true_own_gene_effects"][0]
    rates = simulated_rates(adata)[:, adata.var_names.get_loc(target)]
    at_zero = simulated_rates(adata, adata.obsm["true_latent"])[:, adata.var_names.get_loc(target)]
    change = np.log(rates / (1 - rates)) - np.log(at_zero / (1 - at_zero))
    carries = (adata.obs["perturbation"] == target).to_numpy()
    dose = adata.obs["dosage"].astype(float).to_numpy()
    np.testing.assert_allclose(change[carries], dose[carries] * effect, atol=1e-9)
    assert set(dose[carries]) == {0.5, 2.0}


def test_null_perturbations_do_nothing():
    adata = simulate_screen(**SMALL, n_null_perturbations=2, knockdown=(0.7, 0.9))
    simulation = adata.uns["simulation"]
    is_null = ~simulation["true_masks"].any(axis=1)
    assert is_null.sum() == 2
    np.testing.assert_array_equal(simulation["true_own_gene_effects"] == 0, is_null)
    truth = simulated_ate(adata, list(simulation["perturbations"]), n_samples=200)
    np.testing.assert_array_equal(truth.X[is_null], 0)
    assert (np.abs(truth.X[~is_null]).max(axis=1) > 0.5).all()
    nulls = adata.obs["perturbation"].isin(simulation["perturbations"][is_null])
    np.testing.assert_array_equal(shift(adata)[nulls.to_numpy()], 0)


def test_all_perturbations_may_be_null():
    adata = simulate_screen(**SMALL, n_null_perturbations=6)
    np.testing.assert_array_equal(shift(adata), 0)


def test_cells_escape_at_the_rate_asked_for():
    adata = simulate_screen(
        **{**SMALL, "cells_per_perturbation": 500, "n_controls": 500},
        escape_rate=0.3,
        knockdown=(0.8, 0.9),
    )
    escaped = adata.obs["true_escaped"].to_numpy()
    carries = (adata.obs["n_perturbations"] > 0).to_numpy()
    assert not escaped[~carries].any()
    n = carries.sum()
    assert escaped[carries].mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / n))
    np.testing.assert_array_equal(shift(adata)[escaped], 0)
    assert (np.abs(shift(adata)[carries & ~escaped]).max(axis=1) > 1e-3).all()
    acting = adata.obsm["true_dosage"]
    np.testing.assert_array_equal(
        np.asarray(acting.sum(axis=1)).ravel(), adata.obs["n_perturbations"] * ~escaped
    )
    at_rest = simulated_rates(adata, adata.obsm["true_latent"])
    np.testing.assert_allclose(simulated_rates(adata)[escaped], at_rest[escaped], rtol=1e-12)


def test_guides_have_efficacies_of_their_own():
    adata = simulate_screen(
        **{**SMALL, "cells_per_perturbation": 300},
        guides_per_perturbation=3,
        guide_efficacy=(0.2, 0.9),
    )
    simulation = adata.uns["simulation"]
    efficacy = simulation["true_guide_efficacy"]
    assert efficacy.shape == simulation["guides"].shape == (6, 3)
    assert 0.2 <= efficacy.min() < 0.4
    assert 0.7 < efficacy.max() <= 0.9
    of_guide = dict(zip(simulation["guides"].ravel(), efficacy.ravel(), strict=True))
    effect_of = dict(zip(simulation["perturbations"], acting_effects(adata), strict=True))
    expected = np.zeros_like(shift(adata))
    labels_and_guides = adata.obs[["perturbation", "guide"]].to_numpy()
    for i, (label, guides) in enumerate(labels_and_guides):
        if label == "control":
            assert guides == "control"
            continue
        for name, guide in zip(label.split("+"), guides.split("+"), strict=True):
            assert guide.startswith(f"{name}g")
            expected[i] += of_guide[guide] * effect_of[name]
    np.testing.assert_allclose(shift(adata), expected, atol=1e-5)
    singles = adata.obs[adata.obs["n_perturbations"] == 1]
    used = singles["guide"].value_counts()
    assert (used[used > 0] > 60).all()  # a third of 300 each
    assert (used > 0).sum() == 18


def test_guides_alone_change_no_effect():
    plain = simulate_screen(**SMALL)
    adata = simulate_screen(**SMALL, guides_per_perturbation=2)
    assert (adata.uns["simulation"]["true_guide_efficacy"] == 1).all()
    assert (adata.X != plain.X).nnz == 0


def test_specific_effects_exist_in_their_cell_type_only():
    adata = simulate_screen(
        **{**SMALL, "n_perturbations": 10, "cells_per_perturbation": 60},
        n_cell_types=3,
        cell_type_specific_share=0.4,
        knockdown=(0.7, 0.95),
    )
    simulation = adata.uns["simulation"]
    response, names = simulation["true_response"], list(simulation["perturbations"])
    assert sorted(response.sum(axis=1)) == [1] * 4 + [3] * 6
    types = list(simulation["cell_types"])
    assert types == ["type_1", "type_2", "type_3"]
    moved = np.abs(shift(adata)).max(axis=1) > 0
    single = adata.obs["n_perturbations"] == 1
    for t, name in enumerate(names):
        for code, cell_type in enumerate(types):
            cells = single & (adata.obs["perturbation"] == name)
            cells &= adata.obs["cell_type"] == cell_type
            assert cells.sum() > 5
            assert (moved[cells.to_numpy()] == response[t, code]).all()
    by_type = [simulated_ate(adata, names, n_samples=100, cell_type=c).X for c in types]
    np.testing.assert_array_equal(np.abs(by_type).max(axis=2).T > 0, response)
    overall = simulated_ate(adata, names, n_samples=100)
    np.testing.assert_allclose(overall.X, np.mean(by_type, axis=0), atol=1e-12)


def test_cell_types_differ_in_expression():
    adata = simulate_screen(
        **{**SMALL, "n_genes": 5000}, n_cell_types=2, cell_type_log_sd=0.3, n_null_perturbations=6
    )
    bias = adata.uns["simulation"]["decoder"]["cell_type_bias"]
    assert bias.shape == (2, 5000)
    assert bias.std() == pytest.approx(0.3, rel=0.05)
    rates = simulated_rates(adata)
    at_zero = simulated_rates(adata, adata.obsm["true_latent"])
    change = np.log(rates / at_zero)
    of_type = adata.obs["cell_type"].cat.codes.to_numpy()
    # But for the normalisation of a cell, its type's bias.
    rest = change - bias[of_type]
    np.testing.assert_allclose(rest - rest.mean(axis=1, keepdims=True), 0, atol=1e-9)


def test_rates_and_likelihood_by_hand():
    adata = simulate_screen(**SMALL, **EVERYTHING)
    simulation = adata.uns["simulation"]
    decoder, theta = simulation["decoder"], adata.var["true_inverse_dispersion"].to_numpy()
    genes, names = list(adata.var_names), list(simulation["perturbations"])
    likelihood = simulated_log_likelihood(adata)
    for i in np.flatnonzero(adata.obs["n_perturbations"] > 0)[::7]:
        hidden = decoder["hidden_weight"] @ adata.obsm["true_latent"][i].astype(float)
        logits = decoder["gene_weight"] @ np.where(hidden > 0, hidden, 0.2 * hidden)
        cell = adata.obs.iloc[i]
        code = list(simulation["cell_types"]).index(cell["cell_type"])
        logits += decoder["gene_bias"] + decoder["cell_type_bias"][code]
        for name, guide in zip(
            cell["perturbation"].split("+"), cell["guide"].split("+"), strict=True
        ):
            t = names.index(name)
            dose = simulation["true_guide_efficacy"][t, list(simulation["guides"][t]).index(guide)]
            dose *= simulation["true_response"][t, code] * (not cell["true_escaped"])
            logits[genes.index(name)] += dose * simulation["true_own_gene_effects"][t]
        rates = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(simulated_rates(adata[i]).ravel(), rates, rtol=1e-9)
        x = adata.X[i].toarray().ravel().astype(float)
        expected = nbinom.logpmf(x, theta, theta / (theta + x.sum() * rates)).sum()
        assert likelihood[i] == pytest.approx(expected, rel=1e-9)


def test_genes_of_targets_may_be_left_out():
    adata = simulate_screen(**SMALL, knockdown=(0.7, 0.95))
    targets = adata.uns["simulation"]["perturbations"]
    measured = adata[:, ~adata.var_names.isin(targets[:3])]
    expected = simulated_rates(adata)[:, adata.var_names.get_indexer(measured.var_names)]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(simulated_rates(measured), expected, rtol=1e-9)


def test_true_effects_are_those_of_the_cells():
    adata = simulate_screen(
        n_genes=30,
        n_controls=6000,
        n_perturbations=4,
        cells_per_perturbation=6000,
        n_combinations=1,
        cells_per_combination=6000,
        n_latent=6,
        n_hidden=16,
        library_size=1e4,
        library_log_sd=0.0,
        knockdown=(0.7, 0.95),
        n_cell_types=2,
        cell_type_specific_share=0.5,
    )
    labels = [x for x in adata.obs["perturbation"].cat.categories if x != "control"]
    x = adata.X.toarray().astype(np.float64)
    values = np.log2(1 + 1e4 * x / x.sum(axis=1, keepdims=True))
    for cell_type in (None, "type_1", "type_2"):
        truth = simulated_ate(adata, labels, n_samples=6000, cell_type=cell_type)
        of_type = cell_type is None or adata.obs["cell_type"] == cell_type
        control = values[(of_type & (adata.obs["perturbation"] == "control")).to_numpy()]
        for row, label in enumerate(labels):
            treated = values[(of_type & (adata.obs["perturbation"] == label)).to_numpy()]
            observed = treated.mean(axis=0) - control.mean(axis=0)
            variance = treated.var(axis=0) / len(treated) + control.var(axis=0) / len(control)
            error = np.sqrt(variance + truth.layers["standard_error"][row] ** 2)
            assert np.abs((observed - truth.X[row]) / error).max() < 4.5
    own = truth.var_names.get_indexer(adata.uns["simulation"]["perturbations"])
    singles = truth[list(adata.uns["simulation"]["perturbations"])]
    acts = adata.uns["simulation"]["true_response"][:, 1]
    assert (singles.X[np.arange(4), own][acts] < -1).all()  # 70 % are 1.7 units of log2


def test_h5ad_round_trip(tmp_path):
    adata = simulate_screen(**SMALL, **EVERYTHING)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = anndata.read_h5ad(tmp_path / "screen.h5ad")
    assert isinstance(back.obsm["true_dosage"], csr_matrix)
    np.testing.assert_allclose(simulated_rates(back), simulated_rates(adata), rtol=1e-12)
    names = list(adata.uns["simulation"]["perturbations"])
    for cell_type in (None, "type_2"):
        settings = {"n_samples": 50, "cell_type": cell_type}
        np.testing.assert_array_equal(
            simulated_ate(back, names, **settings).X, simulated_ate(adata, names, **settings).X
        )
    again = simulate_screen(**back.uns["simulation"]["settings"])
    assert (again.X != adata.X).nnz == 0
    assert (again.obs["guide"].astype(str) == back.obs["guide"].astype(str)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knockdown": 0.8}, r"`knockdown` must be a smallest and a largest fraction"),
        ({"knockdown": (0.9, 0.7)}, "`knockdown`"),
        ({"knockdown": (0.7, 1.0)}, r"`knockdown`.* below 1, not 1\.0"),
        ({"knockdown": "most"}, "`knockdown`"),
        ({"knockdown": (0.7, 0.9), "n_genes": 5}, "6 perturbations and 5 genes"),
        ({"n_null_perturbations": 7}, "7, more than 6"),
        ({"n_null_perturbations": -1}, "`n_null_perturbations`"),
        ({"guides_per_perturbation": 0}, "`guides_per_perturbation`"),
        ({"guide_efficacy": (0.5, 1.0)}, "`guides_per_perturbation`"),
        ({"guides_per_perturbation": 2, "guide_efficacy": (-0.5, 1.0)}, "`guide_efficacy`"),
        ({"n_cell_types": 0}, "`n_cell_types`"),
        ({"n_cell_types": 2, "cell_type_log_sd": -1.0}, "`cell_type_log_sd`"),
        ({"n_cell_types": 2, "cell_type_specific_share": 1.5}, "`cell_type_specific_share`"),
        ({"cell_type_specific_share": 0.5}, "raise `n_cell_types`"),
        ({"escape_rate": 1.0}, "`escape_rate`"),
    ],
)
def test_options_that_make_no_sense(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        simulate_screen(**{**SMALL, **settings})


def test_cell_types_that_are_not_there():
    with pytest.raises(SAMSError, match="this screen has no types"):
        simulated_ate(simulate_screen(**SMALL), ["P001"], cell_type="type_1")
    adata = simulate_screen(**SMALL, n_cell_types=2)
    with pytest.raises(SAMSError, match=r"`cell_type` must be one of .*'type_2'"):
        simulated_ate(adata, ["P001"], cell_type="neuron")


@pytest.mark.parametrize("of_truth", [simulated_rates, simulated_log_likelihood])
def test_truth_that_was_lost_is_missed(of_truth):
    adata = simulate_screen(**SMALL, **EVERYTHING)
    of_cells = adata.copy()
    del of_cells.obsm["true_dosage"]
    with pytest.raises(MissingKeyError, match="'true_dosage'"):
        of_truth(of_cells)
    renamed = adata.copy()
    renamed.obs["cell_type"] = renamed.obs["cell_type"].cat.rename_categories({"type_2": "T cell"})
    with pytest.raises(MissingKeyError, match="'type_2'"):
        of_truth(renamed)
    del renamed.obs["cell_type"]
    with pytest.raises(MissingKeyError, match="'cell_type'"):
        of_truth(renamed)


def test_cells_escape_as_often_as_those_of_their_perturbation():
    adata = simulate_screen(
        n_genes=20, n_perturbations=4, cells_per_perturbation=4000, n_combinations=0,
        escape_rate=(0.1, 0.8), seed=3,
    )  # fmt: skip
    rates = adata.uns["simulation"]["true_escape_rate"]
    assert rates.min() >= 0.1
    assert rates.max() <= 0.8
    assert np.ptp(rates) > 0.1
    escaped = adata.obs.groupby("perturbation", observed=True)["true_escaped"].mean()
    names = adata.uns["simulation"]["perturbations"]
    np.testing.assert_allclose(escaped[names], rates, atol=4 * 0.5 / np.sqrt(4000))
    assert escaped["control"] == 0


def test_guides_of_a_perturbation_let_cells_escape_at_rates_of_their_own():
    adata = simulate_screen(
        n_genes=20, n_perturbations=3, cells_per_perturbation=6000, n_combinations=1,
        cells_per_combination=6000, guides_per_perturbation=2, escape_rate=(0.0, 0.9), seed=1,
    )  # fmt: skip
    simulation = adata.uns["simulation"]
    rates = pd.Series(simulation["true_escape_rate"].ravel(), index=simulation["guides"].ravel())
    escaped = adata.obs.groupby("guide", observed=True)["true_escaped"].mean()
    several = escaped.index.str.contains("+", regex=False)
    for guide in escaped.index[~several].drop("control"):
        assert escaped[guide] == pytest.approx(rates[guide], abs=4 * 0.5 / np.sqrt(3000))
    for pair in escaped.index[several]:
        expected = rates[pair.split("+")].mean()
        assert escaped[pair] == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(1500))


@pytest.mark.parametrize("rate", [(0.5, 0.2), (0.1, 1.0), (0.1, 0.2, 0.3)])
def test_ranges_of_escape_rates_are_checked(rate):
    with pytest.raises(InvalidArgumentError, match="escape_rate"):
        simulate_screen(n_genes=20, n_perturbations=3, escape_rate=rate)
