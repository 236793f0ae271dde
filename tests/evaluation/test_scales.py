"""Results say on what scale and of what doses they are, and two scales are not compared."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from model.builders import SHIFTS_ONLY, small_screen, train_small
from scvi_sams import SAMSVAE, pl, tl
from scvi_sams.evaluation import (
    ModelMethod,
    TrainingMean,
    additive_ate,
    align_ate,
    benchmark,
    compare_ate,
    learning_curve,
    observed_ate,
    random_cells,
    score_predictions,
    split_half,
)
from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidDosageError,
    SAMSError,
    ScaleMismatchError,
)
from scvi_sams.metrics._observed import normalised_expression

FEW = {"n_samples": 40, "n_posterior_samples": 20}
PAIR = "P001+P002"


@pytest.fixture(scope="module")
def sized():
    """Registered with a size factor."""
    return train_small(small_screen(), {"size_factor_key": "transcriptome"})


@pytest.fixture(scope="module")
def summed():
    """Sizes are sums of counts."""
    return train_small(small_screen())


@pytest.fixture(scope="module")
def dosed():
    """P001 at 0.1 and 0.2, and 20 of its cells at 0; the others at 0.2."""
    return train_small(dosed_screen(), {"dosage_key": "uM"}, **SHIFTS_ONLY)


def dosed_screen():
    adata = small_screen(n_combinations=0, cells_per_perturbation=60)
    of_first = np.flatnonzero(adata.obs["perturbation"] == "P001")
    doses = np.where(adata.obs["perturbation"] == "control", 0.0, 0.2)
    doses[of_first[:20]], doses[of_first[20:40]] = 0.0, 0.1
    adata.obs["uM"] = doses
    return adata


def normalised(adata, target_sum):
    adata = adata.copy()
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    return adata


# Size factors, methods and target sums


def test_tables_of_two_size_factors_are_not_compared(sized, summed):
    adata = sized.adata
    predicted = sized.predict_ate(["P001"], **FEW)
    of_sums = observed_ate(adata)
    of_sizes = observed_ate(adata, size_factor_key="transcriptome")
    assert predicted.uns["ate"]["size_factor_key"] == "transcriptome"
    assert compare_ate(predicted, of_sizes).loc["P001", "missing"] == 0
    words = r"size_factor_key is 'transcriptome' in the predicted and 'none' in the observed"
    for compare in (compare_ate, align_ate, pl.ate_scatter):
        with pytest.raises(ScaleMismatchError, match=words):
            compare(predicted, of_sums)
    with pytest.raises(ScaleMismatchError, match="size_factor_key"):
        compare_ate(summed.predict_ate(["P001"], **FEW), of_sizes)
    with pytest.raises(ScaleMismatchError, match="size_factor_key"):
        compare_ate(additive_ate(of_sums, [PAIR]), of_sizes)


def test_a_table_that_does_not_say_its_size_factor_is_compared(sized):
    predicted = sized.predict_ate(["P001"], **FEW)
    older = observed_ate(sized.adata)
    del older.uns["ate"]["size_factor_key"]
    del older.obs["dosage"]
    assert compare_ate(predicted, older).loc["P001", "missing"] == 0


def test_interactions_of_two_scales_are_not_compared(sized):
    pair = [label for label in sized.adata.obs["perturbation"].unique() if "+" in label][:1]
    predicted = sized.predict_interactions(pair, method="lognorm", **FEW)
    assert predicted.uns["interaction"]["size_factor_key"] == "transcriptome"
    found = tl.observed_interactions(
        sized.adata, pair, direction=predicted, size_factor_key="transcriptome"
    )
    assert np.isfinite(found.obs["score"]).all()
    with pytest.raises(ScaleMismatchError, match="size_factor_key"):
        tl.observed_interactions(sized.adata, pair, direction=predicted)
    by_rate = sized.predict_interactions(pair, method="lograte", **FEW)
    with pytest.raises(ScaleMismatchError, match="'lograte' in the direction and 'lognorm'"):
        tl.observed_interactions(
            sized.adata, pair, direction=by_rate, size_factor_key="transcriptome"
        )


def test_predicted_cells_are_scored_against_cells_of_their_target_sum(summed):
    cells = summed.predict(["P001", "P002"])

    def score(predicted, observed):
        return score_predictions(predicted, observed, modes=["sams"])

    assert "ok" in set(score(cells, normalised(summed.adata, 1e4))["status"])
    for target_sum in (None, 1e6):
        with pytest.raises(ScaleMismatchError, match="target_sum is 10000 in the predicted"):
            score(cells, normalised(summed.adata, target_sum))
    per_thousand = summed.predict(["P001", "P002"], target_sum=1e3)
    with pytest.raises(ScaleMismatchError, match="1000 in the predicted and 10000"):
        score(per_thousand, normalised(summed.adata, 1e4))
    with pytest.raises(ScaleMismatchError, match="output='rate'"):
        score(summed.predict(["P001"], output="rate"), normalised(summed.adata, 1e4))
    counts = summed.predict(["P001"], output="counts")
    score(normalised(counts, 1e4), normalised(summed.adata, 1e4))
    with pytest.raises(ScaleMismatchError, match="1000 in the predicted and 10000"):
        score(normalised(counts, 1e3), normalised(summed.adata, 1e4))
    base_two = summed.adata.copy()
    sc.pp.normalize_total(base_two, target_sum=1e4)
    sc.pp.log1p(base_two, base=2)
    with pytest.raises(ScaleMismatchError, match="base 2"):
        score(cells, base_two)


def test_cells_of_fewer_genes_and_cells_without_a_record_are_scored(summed):
    cells = summed.predict(["P001", "P002"])
    some_genes = normalised(summed.adata, 1e4)[:, :12].copy()
    score_predictions(cells, some_genes, modes=["sams"])
    del cells.uns["prediction"]
    score_predictions(cells, normalised(summed.adata, 1e6), modes=["sams"])


def test_predicted_cells_of_a_panel_are_not_scored_against_cells_normalised_to_their_sum(sized):
    cells = sized.predict(["P001", "P002"])
    observed = sized.adata.copy()
    with pytest.raises(ScaleMismatchError, match=r"'transcriptome'.*the sum of its counts"):
        score_predictions(cells, normalised(observed, 1e4), modes=["sams"])
    observed.X = normalised_expression(observed, "lognorm", None, "transcriptome", 1e4) * np.log(2)
    assert "ok" in set(score_predictions(cells, observed, modes=["sams"])["status"])


# What are counts


@pytest.mark.parametrize("method", ["lognorm", "mean"])
def test_normalised_values_are_no_counts_for_observations_either(method):
    adata = normalised(small_screen(), 1e4)
    for observe in (observed_ate, tl.observed_interactions):
        with pytest.raises(InvalidCountsError, match=r"adata\.X contains fractional .*`layer`"):
            observe(adata, method=method)
    with pytest.raises(InvalidCountsError, match=r"adata\.layers\['normalised'\] contains"):
        observed_ate(small_screen(), method=method, layer="normalised")


# Doses


def test_observed_effects_are_of_the_registered_doses(dosed):
    adata = dosed.adata
    table = observed_ate(adata)
    assert table.obs_names.tolist() == ["P001@0.1", "P001@0.2", "P002", "P003", "P004"]
    assert table.obs["perturbation"].tolist() == ["P001", "P001", "P002", "P003", "P004"]
    assert table.obs["dosage"].tolist() == [0.1, 0.2, 0.2, 0.2, 0.2]
    assert table.obs["n_cells"].tolist() == [20, 20, 60, 60, 60]
    # Cells of dose 0 are control cells, as they are for the model.
    by_hand = adata.copy()
    is_zero = (by_hand.obs["uM"] == 0).to_numpy()
    labels = np.where(is_zero, "control", by_hand.obs["perturbation"].astype(str))
    del by_hand.uns["_scvi_doses"]
    by_hand.obs["label"] = labels
    by_hand = by_hand[(by_hand.obs["uM"] != 0.1).to_numpy()]
    expected = observed_ate(by_hand, perturbation_key="label")
    np.testing.assert_allclose(table[1:].X, expected.X)
    np.testing.assert_allclose(observed_ate(adata[by_hand.obs_names]).X, expected.X)


def test_doses_are_read_from_a_column_that_is_named_or_a_matrix_that_is_registered(dosed):
    expected = observed_ate(dosed.adata)
    unregistered = dosed_screen()
    pooled = observed_ate(unregistered)
    assert pooled.obs["n_cells"].tolist() == [60] * 4
    np.testing.assert_array_equal(observed_ate(unregistered, dosage_key="uM").X, expected.X)
    names = ["P004", "P003", "P002", "P001"]
    given = unregistered.obs["perturbation"].astype(str).to_numpy()[:, None] == names
    unregistered.obsm["doses"] = given * unregistered.obs["uM"].to_numpy()[:, None]
    SAMSVAE.setup_anndata(unregistered, dosage_obsm_key="doses", perturbation_names=names)
    table = observed_ate(unregistered)
    np.testing.assert_array_equal(table.obs["dosage"], expected.obs["dosage"])
    np.testing.assert_allclose(table.X, expected.X)


def test_effects_of_two_doses_are_not_compared_and_those_of_one_are(dosed, caplog):
    observed = observed_ate(dosed.adata)
    with caplog.at_level("WARNING", logger="scvi.sams"):
        at_one = dosed.predict_ate(**FEW)
    assert "P001 at 1 (measured: up to 0.2)" in caplog.text
    with pytest.raises(ScaleMismatchError, match=r"'P001' is 1 in the predicted and 0\.1"):
        compare_ate(at_one, observed)
    caplog.clear()
    with caplog.at_level("WARNING", logger="scvi.sams"):
        predicted = dosed.predict_ate(
            observed.obs["perturbation"], dosages=observed.obs["dosage"], **FEW
        )
    assert "measured" not in caplog.text
    scores = compare_ate(predicted[::-1], observed)
    assert scores["missing"].sum() == 0
    assert scores.index.tolist() == [*observed.obs_names, "all"]
    x, y, _ = align_ate(predicted[::-1], observed)
    np.testing.assert_allclose(x, predicted.X)
    np.testing.assert_allclose(y, observed.X)


def test_predicted_cells_are_scored_against_cells_of_their_doses(dosed):
    observed = normalised(dosed.adata, 1e4)
    with pytest.raises(ScaleMismatchError, match=r"'P001' is 0\.2 .* 0\.1, 0\.2 in the observed"):
        score_predictions(
            dosed.predict(["P001", "P002"], dosages=[0.2, 0.2]), observed, modes=["sams"]
        )
    at_one_dose = observed[(observed.obs["uM"] != 0.1).to_numpy()].copy()
    predicted = dosed.predict(["P001", "P002"], dosages=[0.2, 0.2])
    scores = score_predictions(predicted, at_one_dose, modes=["sams"])
    assert scores.set_index("perturbation")["n_cells"]["P001"].unique().tolist() == [20]


def test_the_dosage_of_every_prediction_is_in_the_result(dosed):
    cells = dosed.predict(["P001", "P001"], dosages=[0.1, 0.2], indices=[0, 1])
    assert cells.obs["perturbation"].tolist() == ["P001"] * 4
    assert cells.obs["dosage"].tolist() == [0.1, 0.1, 0.2, 0.2]
    assert cells.obs_names.is_unique
    ate = dosed.predict_ate(["P001", "P001", "control"], dosages=[0.1, 0.2, 5.0], **FEW)
    assert ate.obs_names.tolist() == ["P001@0.1", "P001@0.2", "control"]
    assert ate.obs["dosage"].tolist() == [0.1, 0.2, 0.0]
    assert dosed.adata.uns["sams_ate"]["dosages"].tolist() == [0.1, 0.2, 0.0]
    assert dosed.adata.uns["sams_ate"]["perturbations"].tolist() == ["P001", "P001", "control"]
    curve = dosed.predict_dose_response(["P002+control"], [0.0, 0.1], n_samples=40)
    assert curve.obs["dosage"].tolist() == [0.0, 0.1]
    assert curve.obs["perturbation"].tolist() == ["P002"] * 2


def test_doses_of_a_combination_are_in_the_order_of_its_canonical_label(tmp_path):
    adata = small_screen(dosages=[0.5, 1.0])
    model = train_small(adata, {"dosage_key": "dosage"})
    ate = model.predict_ate(["P002+control+P001", "P003"], dosages=["0.5+9+1", 1], **FEW)
    assert ate.obs_names.tolist() == [PAIR, "P003"]
    assert ate.obs["dosage"].tolist() == ["1+0.5", "1"]
    ate.write_h5ad(tmp_path / "ate.h5ad")
    assert ad.read_h5ad(tmp_path / "ate.h5ad").obs["dosage"].tolist() == ["1+0.5", "1"]
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    observed = observed_ate(adata)
    asked = (observed.obs["perturbation"].tolist(), observed.obs["dosage"].tolist())
    predicted = model.predict_ate(asked[0], dosages=asked[1], **FEW)
    assert predicted.obs_names.tolist() == observed.obs_names.tolist()
    assert compare_ate(predicted, observed)["missing"].sum() == 0


def test_hits_and_targets_are_at_the_largest_dose_that_was_measured(dosed):
    hits = tl.perturbation_hits(dosed, **FEW, key_added=None)
    assert hits["dosage"].tolist() == [0.2] * 4
    assert hits.attrs["ate"]["size_factor_key"] == "none"
    names, genes = dosed.perturbations, dosed.get_var_names()
    targets = tl.target_knockdown(dosed, target_genes=dict(zip(names, genes, strict=False)), **FEW)
    assert targets["dosage"].tolist() == [0.2] * 4
    assert targets.loc["P001", "n_cells"] == 20
    assert targets.loc["P002", "n_cells"] == 60


def test_a_loaded_model_knows_the_measured_doses_without_its_data(dosed, tmp_path, caplog):
    dosed.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    with caplog.at_level("WARNING", logger="scvi.sams"):
        loaded.predict_ate(["P002"], dosages=[0.3], **FEW)
    assert "P002 at 0.3 (measured: up to 0.2)" in caplog.text
    targets = dict(zip(loaded.perturbations, loaded.get_var_names(), strict=False))
    table = tl.target_knockdown(loaded, target_genes=targets, **FEW)
    assert table["dosage"].tolist() == [0.2] * 4


def test_interactions_need_one_dose_of_each_perturbation():
    adata = small_screen(dosages=[0.5, 1.0])
    with pytest.raises(InvalidDosageError, match=r"'P00\d' has the doses 0\.5, 1.*`indices`"):
        tl.observed_interactions(adata, dosage_key="dosage")
    adata.obs["dosage"] = ["0" if p == "control" else "0.5" for p in adata.obs["perturbation"]]
    table = tl.observed_interactions(adata, dosage_key="dosage")
    np.testing.assert_allclose(table.X, tl.observed_interactions(adata).X)
    assert set(table.obs["dosage"]) == {0.5}


# Names


def test_labels_with_controls_inside_are_found_by_their_canonical_names():
    adata = small_screen()
    adata.obs["condition"] = [
        "ctrl" if label == "control" else label if "+" in label else f"{label}+ctrl"
        for label in adata.obs["perturbation"]
    ]
    model = train_small(adata, {"perturbation_key": "condition", "control": "ctrl"})
    asked = [label for label in adata.obs["condition"].unique() if label != "ctrl"]
    observed = observed_ate(adata, perturbation_key="condition", control="ctrl")
    predicted = model.predict_ate(asked, **FEW)
    assert set(predicted.obs_names) == set(observed.obs_names)
    assert compare_ate(predicted, observed)["missing"].sum() == 0
    assert additive_ate(predicted, ["P002+P001"]).obs_names.tolist() == [PAIR]
    some = observed_ate(
        adata, perturbation_key="condition", control="ctrl", perturbations=["ctrl+P001"]
    )
    assert some.obs_names.tolist() == ["P001"]
    cells = model.predict(["P002+P001", "P003+ctrl", "ctrl"], indices=[0])
    assert cells.obs["perturbation"].tolist() == [PAIR, "P003", "ctrl"]
    interactions = model.predict_interactions(["P002+P001"], **FEW)
    assert interactions.obs_names.tolist() == [PAIR]
    genes = model.differential_expression(group1="ctrl+P001", n_samples=20)
    assert set(genes["comparison"]) == {"P001 vs ctrl"}


def test_rows_of_other_origin_are_matched_by_how_labels_are_written():
    effect = np.arange(6.0).reshape(2, 3)
    table = ad.AnnData(
        effect, obs=pd.DataFrame(index=["A+ctrl", "B"]), uns={"ate": {"method": "mean"}}
    )
    named = table.copy()
    named.obs_names = ["A", "ctrl+B"]
    assert compare_ate(table, named, control="ctrl")["missing"].sum() == 0
    assert compare_ate(table, named)["missing"].sum() > 0


# Batches and covariates


@pytest.fixture(scope="module")
def in_lanes():
    """Control cells of two lanes and two donors; the model knows both."""
    adata = small_screen()
    adata.obs["lane"] = np.where(np.arange(adata.n_obs) % 2, "L1", "L2")
    adata.obs["donor"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 3, "p", "q"))
    setup = {"batch_key": "lane", "categorical_covariate_keys": ["donor"]}
    return train_small(adata, setup)


def test_tables_say_the_levels_of_their_control_cells(in_lanes):
    adata = in_lanes.adata
    everywhere = ["lane=L1", "lane=L2", "donor=p", "donor=q"]
    predicted = in_lanes.predict_ate(["P001"], **FEW)
    assert predicted.uns["ate"]["levels"].tolist() == everywhere
    assert adata.uns["sams_ate"]["levels"].tolist() == everywhere
    first = (adata.obs["lane"] == "L1").to_numpy()
    in_first = observed_ate(adata, indices=first)
    assert in_first.uns["ate"]["levels"].tolist() == ["lane=L1", "donor=p", "donor=q"]
    cells = in_lanes.predict(["P001"], indices=np.flatnonzero(first)[:3])
    assert "lane=L2" not in cells.uns["prediction"]["levels"]
    assert "levels" not in observed_ate(small_screen()).uns["ate"]


def test_tables_of_other_levels_are_compared_with_a_warning(in_lanes, caplog):
    adata = in_lanes.adata
    caplog.set_level("WARNING", logger="scvi.sams")
    predicted = in_lanes.predict_ate(["P001"], **FEW)
    compare_ate(predicted, observed_ate(adata))
    assert "different batches" not in caplog.text
    in_first = observed_ate(adata, indices=(adata.obs["lane"] == "L1").to_numpy())
    compare_ate(predicted, in_first)
    assert "only the predicted effects are from lane=L2." in caplog.text
    caplog.clear()
    score_predictions(
        in_lanes.predict(["P001"], indices=(adata.obs["donor"] == "q").to_numpy()),
        normalised(adata, 1e4),
        modes=["sams"],
    )
    assert "only the observed effects are from donor=p." in caplog.text
    caplog.clear()
    tl.genetic_interactions(
        in_lanes, indices=(adata.obs["lane"] == "L2").to_numpy(), key_added=None, **FEW
    )
    assert "effects are from lane=L1." in caplog.text


# Marked control cells


def test_a_column_of_booleans_names_control_cells_for_every_function():
    adata = small_screen()
    adata.obs["is_control"] = adata.obs["perturbation"] == "control"
    expected, marked = observed_ate(adata), observed_ate(adata, control="is_control")
    np.testing.assert_array_equal(marked.X, expected.X)
    some = np.arange(0, adata.n_obs, 2)
    by_mask = observed_ate(adata, control=adata.obs["is_control"].to_numpy(), indices=some)
    np.testing.assert_array_equal(by_mask.X, observed_ate(adata, indices=some).X)
    np.testing.assert_array_equal(
        tl.observed_interactions(adata, control="is_control").X, tl.observed_interactions(adata).X
    )
    cells = normalised(adata, 1e4)
    mean = TrainingMean(control="is_control").fit(cells).predict(["P001"])
    np.testing.assert_array_equal(mean.X, TrainingMean().fit(cells).predict(["P001"]).X)
    scores = [
        score_predictions(mean, cells, modes=["sams"], control=control)
        for control in ("control", "is_control")
    ]
    pd.testing.assert_frame_equal(*scores)
    halves = [split_half(cells, control=control)[0].X for control in ("control", "is_control")]
    np.testing.assert_array_equal(*halves)
    result = benchmark(
        adata,
        methods=["training mean"],
        split=lambda seed: random_cells(adata.obs["perturbation"], seed=seed),
        seeds=[0],
        modes=["sams"],
        control="is_control",
        progress_bar=False,
    )
    assert result.settings["columns"]["control"] == ("control",)


# Doses in benchmarks


def test_a_benchmark_of_cells_at_several_doses_raises(dosed):
    adata = dosed.adata.copy()
    common = {"methods": ["training mean"], "seeds": [0], "progress_bar": False}
    labels = adata.obs["perturbation"].astype(str)

    def split(seed):
        return random_cells(labels, seed=seed)

    for compare in (
        lambda: benchmark(adata, split=split, **common),
        lambda: learning_curve(adata, **common),
    ):
        with pytest.raises(InvalidDosageError, match="Cells labelled 'P001' are registered with"):
            compare()
    one_dose = adata[
        adata.obs["uM"].isin([0, 0.2]) & ~((labels == "P001") & (adata.obs["uM"] == 0))
    ]
    learning_curve(one_dose.copy(), cells=(None,), **common)
    adata.obs["with dose"] = np.where(
        adata.obs["uM"] == 0, "control", labels + "@" + adata.obs["uM"].astype(str)
    )
    curve = learning_curve(adata, cells=(None,), perturbation_key="with dose", **common)
    assert set(curve["n_failed"]) == {0}
    with pytest.raises(SAMSError, match=r"`dosage_key`, but a benchmark compares labels"):
        ModelMethod(SAMSVAE, setup_kwargs={"dosage_key": "uM"})
