"""The tidy table of all metrics: alignment, failures, chance, groups and invariances."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidCovariateError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
)
from scvi_sams.metrics._distances import energy_distance, median_bandwidth, mmd, principal_axes
from scvi_sams.metrics._perturbench import deg_recall
from scvi_sams.metrics._scoring import describe_metrics, position, score_predictions

PROFILE_MODES = ["sams", "perturbench", "cell-eval", "systema"]
ALL_MODES = [*PROFILE_MODES, "distances"]
GENES = [f"g{i}" for i in range(30)]
PERTURBATIONS = ["g0", "g0+g1", "g1", "g2"]
BASE = np.linspace(0.2, 1.5, 30)
EFFECTS = dict(zip(PERTURBATIONS, 0.5 * np.random.default_rng(5).normal(size=(4, 30)), strict=True))


def table(expression, labels, genes=GENES, **obs):
    obs = pd.DataFrame({"perturbation": labels, **obs})
    obs.index = obs.index.astype(str)
    return ad.AnnData(np.asarray(expression, float), obs=obs, var=pd.DataFrame(index=list(genes)))


def cells(seed, perturbations=("control", *PERTURBATIONS), n_cells=30):
    rng = np.random.default_rng(seed)
    means = [np.exp(BASE + EFFECTS.get(p, 0)) for p in perturbations]
    counts = np.concatenate([rng.poisson(mean, size=(n_cells, 30)) for mean in means])
    return table(np.log1p(counts), np.repeat(perturbations, n_cells))


def profiles(adata, perturbations=PERTURBATIONS):
    labels = adata.obs["perturbation"].to_numpy()
    return table([adata.X[labels == p].mean(axis=0) for p in perturbations], perturbations)


def values(scores, metric, mode=None):
    chosen = scores[scores["metric"] == metric]
    chosen = chosen if mode is None else chosen[chosen["mode"] == mode]
    return chosen.set_index("perturbation")["value"]


def test_values_by_hand():
    # Control (1, 1); A moves gene g0 by 1 and B gene g1 by 2. Predicted: A exactly, B not at all.
    observed = table(
        [[1, 1], [1, 1], [2, 1], [2, 1], [1, 3]], ["control"] * 2 + ["A", "A", "B"], "ab"
    )
    predicted = table([[1, 1], [2, 1]], ["B", "A"], "ab")
    scores = score_predictions(predicted, observed, n_top_genes=2)
    assert values(scores, "rmse_average").to_dict() == {"A": 0, "B": np.sqrt(2)}
    assert values(scores, "mae", "cell-eval").to_dict() == {"A": 0, "B": 1}
    assert values(scores, "cosine_logfc")["A"] == pytest.approx(1)
    assert values(scores, "cosine_logfc")["B"] == 0
    # To B's observation, at (0, 2), the predictions (0, 0) and (1, 0) are 2 and 2.2 away.
    assert values(scores, "rank_rmse_average").to_dict() == {"A": 0, "B": 0}
    # No direction is the worst; A's own direction is B's for B's observation only.
    assert values(scores, "rank_cosine_logfc").to_dict() == {"A": 0, "B": 1}
    # B's prediction, at (0, 0), is nearer to A's observation, (1, 0), than to B's own.
    assert values(scores, "discrimination_l1").to_dict() == {"A": 1, "B": 0.5}
    assert values(scores, "centroid_accuracy").to_dict() == {"A": 1, "B": 0}
    # Perturbed centroid (1.5, 2). Deltas of A (0.5, -1) twice; of B (-0.5, -1) and (-0.5, 1).
    delta = values(scores, "pearson_delta")
    assert delta["A"] == pytest.approx(1)
    assert delta["B"] == pytest.approx(-1)
    # Flattened in log2: x = (1, 0, 0, 0), y = (1, 0, 0, 2), over log(2).
    flat = values(scores, "pearson", "sams")["all"]
    assert flat == pytest.approx(np.corrcoef([1, 0, 0, 0], [1, 0, 0, 2])[0, 1])
    assert values(scores, "r2", "sams")["all"] == pytest.approx(1 - 4 / 2.75)
    assert values(scores, "rmse", "sams").to_dict() == pytest.approx(
        {"A": 0, "B": np.sqrt(2) / np.log(2), "all": 1 / np.log(2)}
    )
    rows = scores[scores["metric"] == "pearson"].set_index("perturbation")
    assert rows["n_cells"].to_dict() == {"A": 2, "B": 1, "all": 3}
    assert set(scores["status"]) == {"ok", "undefined"}
    # With one or two cells and two control cells no gene can be differentially expressed.
    undefined = scores[scores["status"] == "undefined"]
    assert set(undefined["metric"]) == {"de_overlap_profile"}
    assert (undefined["value"] == 0).all()


def test_the_table_is_tidy_and_every_metric_is_described():
    observed = cells(0)
    described = describe_metrics().set_index(["mode", "metric"])
    assert described.index.is_unique
    found = set()
    for predicted, modes in ((cells(1), ALL_MODES), (profiles(cells(1)), PROFILE_MODES)):
        scores = score_predictions(predicted, observed, modes=modes)
        assert scores.columns.tolist() == [
            "perturbation", "mode", "metric", "value", "n_cells", "higher_is_better", "chance",
            "status",
        ]  # fmt: skip
        assert not scores.duplicated(["perturbation", "mode", "metric"]).any()
        assert (scores["status"] == "ok").all()
        assert np.isfinite(scores["value"]).all()
        keys = pd.MultiIndex.from_frame(scores[["mode", "metric"]])
        directions = described["higher_is_better"].loc[keys].to_numpy()
        np.testing.assert_array_equal(scores["higher_is_better"], directions)
        found |= set(keys)
        only_all = scores.loc[scores["perturbation"] == "all", "mode"]
        assert set(only_all) == {"sams"}
    assert found == set(described.index)
    assert described["chance"].dropna().eq(0.5).all()
    assert described[["definition", "source"]].map(len).to_numpy().min() > 10


def test_a_model_that_predicts_the_mean_of_all_perturbations_fits_but_is_at_chance():
    observed = cells(0)
    single = profiles(observed)
    collapsed = table(np.repeat(single.X.mean(axis=0, keepdims=True), 4, axis=0), PERTURBATIONS)
    control = observed[observed.obs["perturbation"] == "control"].X.mean(axis=0)
    unchanged = table(np.repeat(control[None], 4, axis=0), PERTURBATIONS)
    # With target genes left out the discrimination score has no common order of perturbations.
    scores, nothing = (
        score_predictions(p, observed, target_genes={}) for p in (collapsed, unchanged)
    )
    assert (values(scores, "rmse_average") < values(nothing, "rmse_average")).all()
    for metric in ("rank_rmse_average", "rank_cosine_logfc"):
        for table_of_scores in (scores, nothing):
            np.testing.assert_array_equal(values(table_of_scores, metric), np.full(4, 0.5))
    for metric in ("discrimination_l1", "centroid_accuracy"):
        rows = scores[scores["metric"] == metric]
        assert rows["value"].mean() == pytest.approx(rows["chance"].mean())
    assert values(scores, "pearson_delta").abs().max() == 0


def test_perfect_predictions_are_perfect():
    observed = cells(0)
    scores = score_predictions(observed, observed, modes=PROFILE_MODES)
    best = {False: 0, True: 1}
    expected = scores["higher_is_better"].map(best)
    np.testing.assert_allclose(scores["value"], expected, atol=1e-12)


def test_chance_is_exact():
    observed = cells(0)
    scores = score_predictions(profiles(cells(1)), observed, n_top_genes=6, rank_version="2024")
    chance = scores.groupby("metric")["chance"].first()
    assert chance["discrimination_l1"] == 5 / 8
    assert chance["rank_rmse_average"] == 3 / 8
    assert chance["deg_recall"] == 6 / 30
    assert chance["centroid_accuracy"] == 0.5
    assert np.isnan(chance["rmse_average"])


def test_chance_of_an_overlap_is_the_share_of_genes_that_change():
    """Of each perturbation its own: so many of random genes would be among the real ones."""
    observed = cells(0)
    labels = observed.obs["perturbation"].to_numpy()
    scores = score_predictions(profiles(cells(1)), observed, modes=["cell-eval"])
    chance = scores[scores["metric"] == "de_overlap_profile"].set_index("perturbation")["chance"]
    for name in PERTURBATIONS:
        p_values = stats.mannwhitneyu(
            observed.X[labels == name], observed.X[labels == "control"], method="asymptotic"
        ).pvalue
        n_changed = (stats.false_discovery_control(p_values) < 0.05).sum()
        assert chance[name] == n_changed / len(GENES)
    assert chance[PERTURBATIONS].nunique() > 1


@pytest.mark.parametrize("n_top_genes", [4, 9])
def test_the_genes_that_systema_counts_are_as_many_as_asked_for(n_top_genes):
    observed, predicted = cells(0), profiles(cells(1))
    means = {name: profiles(observed, [name]).X[0] for name in ("control", *PERTURBATIONS)}
    centroid = np.mean([means[name] for name in PERTURBATIONS], axis=0)
    scores = score_predictions(predicted, observed, modes=["systema"], n_top_genes=n_top_genes)
    found = values(scores, "pearson_delta_top")
    for name in PERTURBATIONS:
        top = np.argsort(-np.abs(means[name] - means["control"]))[:n_top_genes]
        delta = (predicted[predicted.obs["perturbation"] == name].X[0] - centroid)[top]
        assert found[name] == pytest.approx(
            np.corrcoef(delta, (means[name] - centroid)[top])[0, 1], rel=1e-6
        )


@pytest.mark.parametrize("failure", ["missing", "nan", "inf"])
@pytest.mark.parametrize("of_cells", [True, False])
def test_failed_predictions_stay_in_the_table(failure, of_cells):
    observed, predicted = cells(0), cells(1, PERTURBATIONS)
    if not of_cells:
        predicted = profiles(predicted)
    at = np.flatnonzero(predicted.obs["perturbation"] == "g1")
    if failure == "missing":
        predicted = predicted[np.setdiff1d(np.arange(predicted.n_obs), at)].copy()
    else:
        predicted.X[at[0], 3] = float(failure)
    modes = ALL_MODES if of_cells else PROFILE_MODES
    scores = score_predictions(predicted, observed, modes=modes)
    failed = scores[scores["perturbation"] == "g1"].set_index("metric")
    status = "missing" if failure == "missing" else "nan"
    assert set(failed["status"]) == {status}
    worst = {
        "rank_rmse_average": 1,
        "rank_cosine_logfc": 1,
        "discrimination_l1": 1 / 4,
        "centroid_accuracy": 0,
    }
    assert failed["value"].dropna().to_dict() == worst
    others = scores[~scores["perturbation"].isin(["g1", "all"])]
    assert (others["status"] == "ok").all()
    assert np.isfinite(others["value"]).all()
    flattened = scores[scores["perturbation"] == "all"]
    assert set(flattened["status"]) == {status}
    assert np.isfinite(flattened["value"]).all()


def test_a_failure_counts_as_no_effect_when_flattened():
    observed, predicted = cells(0), profiles(cells(1))
    unchanged = predicted.copy()
    control = observed[observed.obs["perturbation"] == "control"].X.mean(axis=0)
    unchanged.X[2] = control
    scores = score_predictions(predicted[[0, 1, 3]].copy(), observed, modes=["sams"])
    expected = score_predictions(unchanged, observed, modes=["sams"])
    for metric in ("pearson", "r2", "rmse", "pearson_top", "r2_top"):
        assert values(scores, metric)["all"] == pytest.approx(values(expected, metric)["all"])


def test_no_prediction_at_all_is_a_table_of_failures():
    scores = score_predictions(profiles(cells(1), ["g2"])[[]].copy(), cells(0))
    assert (scores["status"] == "missing").all()
    assert values(scores, "rank_cosine_logfc").tolist() == [1, 1, 1, 1]


def test_order_of_rows_and_genes_spelling_and_storage_do_not_matter():
    rng = np.random.default_rng(3)
    observed, predicted = cells(0), cells(1)
    expected = score_predictions(predicted, observed, modes=ALL_MODES)
    shuffled = predicted[rng.permutation(predicted.n_obs), rng.permutation(30)].copy()
    shuffled.obs["perturbation"] = shuffled.obs["perturbation"].replace({"g0+g1": "g1+g0"})
    others = observed[rng.permutation(observed.n_obs)].copy()
    others.X = sparse.csr_matrix(others.X)
    scores = score_predictions(shuffled, others, modes=ALL_MODES)
    pd.testing.assert_frame_equal(scores, expected, rtol=1e-9)
    genes = rng.permutation(30)
    scores = score_predictions(predicted, observed[:, genes].copy(), modes=ALL_MODES)
    pd.testing.assert_frame_equal(scores, expected, rtol=1e-9)


def test_what_the_observation_lacks_is_ignored_and_inputs_are_kept():
    observed, predicted = cells(0), cells(1)
    extra = ad.concat([predicted, table(np.ones((1, 30)), ["X"])], index_unique="-")
    extra = ad.concat([extra, extra[:, :2].copy()], axis="var", index_unique="-", join="outer")
    extra.var_names = [*GENES, "other 0", "other 1"]
    extra.obs["perturbation"] = [*predicted.obs["perturbation"], "X"]
    before = extra.copy(), observed.copy()
    scores = score_predictions(extra, observed, modes=ALL_MODES)
    expected = score_predictions(predicted, observed, modes=ALL_MODES)
    pd.testing.assert_frame_equal(scores, expected)
    for adata, kept in zip((extra, observed), before, strict=True):
        np.testing.assert_array_equal(adata.X, kept.X)
        pd.testing.assert_frame_equal(adata.obs, kept.obs)


def test_profiles_score_as_the_cells_they_average_except_for_tests_of_cells():
    observed, predicted = cells(0), cells(1)
    of_cells = score_predictions(predicted, observed)
    of_profiles = score_predictions(profiles(predicted), observed)
    both = of_cells.merge(of_profiles, on=["perturbation", "mode", "metric"], how="outer")
    unshared = both[both["value_x"].isna() | both["value_y"].isna()]
    assert set(unshared["metric"]) == {"de_overlap", "de_overlap_profile"}
    shared = both.drop(unshared.index)
    np.testing.assert_allclose(shared["value_x"], shared["value_y"])


def test_groups_are_compared_one_by_one():
    first, second = cells(0), cells(10)
    # The second cell type expresses everything at a higher level, and lacks g2.
    second = second[second.obs["perturbation"] != "g2"].copy()
    second.X = second.X + 1
    keys = ["T", "B"]
    observed = ad.concat({"T": first, "B": second}, label="type", index_unique="-")
    halves = cells(1), cells(11)
    halves[1].X += 1
    predicted = ad.concat(dict(zip(keys, halves, strict=True)), label="type", index_unique="-")
    scores = score_predictions(predicted, observed, covariate_key="type", modes=ALL_MODES)
    assert scores.columns[1] == "covariate"
    for covariate, half, side in zip(keys, halves, (first, second), strict=True):
        alone = score_predictions(half, side, modes=ALL_MODES)
        together = scores[scores["covariate"] == covariate].drop(columns="covariate")
        alone = alone[alone["perturbation"] != "all"]
        pd.testing.assert_frame_equal(
            together.reset_index(drop=True), alone.reset_index(drop=True), rtol=1e-9
        )
    flattened = scores[scores["perturbation"] == "all"]
    assert set(flattened["covariate"]) == {"all"}
    assert set(flattened["n_cells"]) == {7 * 30}


def test_target_genes_come_from_labels_or_the_user():
    # Only g0 tells A's prediction from the others.
    observed = table([[1, 1, 1], [3, 1, 1], [1, 2, 1]], ["control", "a", "b"], "abc")
    predicted = table([[3, 1.9, 1], [1, 2, 1]], ["a", "b"], "abc")
    found = values(score_predictions(predicted, observed, modes=["cell-eval"]), "discrimination_l1")
    assert found.to_dict() == {"a": 0.5, "b": 1}
    for targets, expected in (
        ({}, 1),
        ({"a": "a"}, 0.5),
        ({"a": ["b", "a"], "b": "no gene"}, 0.75),
    ):
        scores = score_predictions(predicted, observed, modes=["cell-eval"], target_genes=targets)
        assert values(scores, "discrimination_l1")["a"] == expected


def test_target_genes_are_the_names_in_a_label_whatever_stands_between_them():
    # By the first gene, which it targets, the prediction is nearer to the other observation.
    genes = ["gene one", "gene two", "third"]
    labels = ["control", "gene one+gene two", "x"]
    observed = table([[1, 1, 1], [1, 1, 2], [5, 5, 2.5]], labels, genes)
    predicted = table([[9, 2, 2], [5, 5, 2.5]], labels[1:], genes)
    for targets, expected in ((None, 1), ("gene one", 1), ("third", 0.5)):
        scores = score_predictions(
            predicted,
            observed,
            modes=["cell-eval"],
            target_genes=None if targets is None else {labels[1]: targets},
        )
        assert values(scores, "discrimination_l1")[labels[1]] == expected


@pytest.mark.parametrize("n_top_genes", [5, 50])
def test_top_genes_are_those_that_vary_least_among_controls(n_top_genes):
    observed, predicted = cells(0), profiles(cells(1))
    control = observed.X[(observed.obs["perturbation"] == "control").to_numpy()]
    expected = deg_recall(
        predicted.X, profiles(observed).X, control.mean(axis=0), control.var(axis=0),
        n_genes=n_top_genes,
    )  # fmt: skip
    scores = score_predictions(predicted, observed, modes=["perturbench"], n_top_genes=n_top_genes)
    rows = scores[scores["metric"] == "deg_recall"].set_index("perturbation")
    np.testing.assert_allclose(rows.loc[PERTURBATIONS, "value"], expected)
    assert (rows["chance"] == min(n_top_genes / 30, 1)).all()


def test_control_cells_may_have_several_labels():
    observed, predicted = cells(0), profiles(cells(1))
    expected = score_predictions(predicted, observed)
    labels = observed.obs["perturbation"].to_numpy(dtype=object)
    labels[np.flatnonzero(labels == "control")[::2]] = "scrambled"
    renamed = table(observed.X, ["unperturbed" if x == "control" else x for x in labels])
    scores = score_predictions(predicted, renamed, control=["scrambled", "unperturbed"])
    pd.testing.assert_frame_equal(scores, expected)
    assert scores.index.tolist() == list(range(len(scores)))


def test_the_perturbed_centroid_may_be_that_of_training():
    observed, predicted = cells(0), profiles(cells(1))
    training = pd.Series(np.linspace(0, 1, 30), index=GENES)
    scores = score_predictions(
        predicted, observed, modes=["systema"], perturbed_centroid=training[::-1]
    )
    y = profiles(observed).X[0] - training.to_numpy()
    x = predicted.X[0] - training.to_numpy()
    assert values(scores, "pearson_delta")["g0"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    with pytest.raises(SAMSError, match="each of the 30"):
        score_predictions(predicted, observed, perturbed_centroid=np.zeros(3))
    with pytest.raises(SAMSError, match="each of the 30"):
        score_predictions(predicted, observed, perturbed_centroid=training[:3])


def test_a_rank_among_one_is_undefined():
    observed = cells(0, ["control", "g0"])
    scores = score_predictions(profiles(cells(1), ["g0"]), observed)
    scores = scores.set_index("metric")
    for metric in ("rank_rmse_average", "rank_cosine_logfc", "centroid_accuracy"):
        assert np.isnan(scores.loc[metric, "value"])
        assert scores.loc[metric, "status"] == "undefined"
    assert scores.loc["rmse_average", "status"] == "ok"


def test_distances_between_single_cells_are_undefined():
    observed, predicted = cells(0), cells(1)
    keep = np.ones(predicted.n_obs, dtype=bool)
    keep[np.flatnonzero(predicted.obs["perturbation"] == "g1")[1:]] = False
    scores = score_predictions(predicted[keep].copy(), observed, modes=["distances"])
    single = scores[scores["perturbation"] == "g1"]
    assert set(single["status"]) == {"undefined"}
    assert single["value"].isna().all()
    assert (scores.loc[scores["perturbation"] != "g1", "status"] == "ok").all()


def test_distances_on_all_genes_and_on_components():
    observed, predicted = cells(0), cells(1)
    components = score_predictions(predicted, observed, modes=["distances"], n_components=3)
    everything = score_predictions(predicted, observed, modes=["distances"], n_components=None)
    is_tested = (observed.obs["perturbation"] != "control").to_numpy()
    axes = principal_axes(observed.X[is_tested], 3)
    x, y = (adata.X[adata.obs["perturbation"] == "g1"] for adata in (predicted, observed))
    assert values(everything, "energy_distance_squared")["g1"] == pytest.approx(
        energy_distance(x, y)
    )
    assert values(components, "energy_distance")["g1"] == pytest.approx(
        energy_distance(x @ axes, y @ axes, metric="euclidean")
    )
    bandwidth = median_bandwidth(observed.X[is_tested] @ axes)
    assert values(components, "mmd")["g1"] == pytest.approx(
        mmd(x @ axes, y @ axes, bandwidth=bandwidth)
    )


def test_where_a_value_lies_between_controls():
    assert position(0.8, 0.4, 0.6) == pytest.approx(2)
    assert position(5, 4, 2) == pytest.approx(-0.5)  # an error: lower is better
    np.testing.assert_allclose(
        position(np.array([1.0, 2]), np.array([0.0, 1]), np.array([2.0, 1])), [0.5, np.nan]
    )
    series = position(pd.Series({"A": 3.0, "B": 1.0}), 1, 5)
    assert series.to_dict() == {"A": 0.5, "B": 0}


def test_what_cannot_be_scored_is_refused():
    observed, predicted = cells(0), profiles(cells(1))
    with pytest.raises(SAMSError, match="'cpa'"):
        score_predictions(predicted, observed, modes=["sams", "cpa"])
    with pytest.raises(SAMSError, match="none given"):
        score_predictions(predicted, observed, modes=[])
    with pytest.raises(SAMSError, match="Predict cells"):
        score_predictions(predicted, observed, modes=["distances"])
    with pytest.raises(MissingKeyError, match="'guide'"):
        score_predictions(predicted, observed, perturbation_key="guide")
    with pytest.raises(MissingKeyError, match="'g29'"):
        score_predictions(predicted[:, :29].copy(), observed)
    with pytest.raises(MissingControlError, match="'untreated'"):
        score_predictions(predicted, observed, control="untreated")
    with pytest.raises(SAMSError, match="No observed cell is perturbed"):
        score_predictions(predicted, cells(0, ["control"]))
    counts = observed.copy()
    counts.X = np.expm1(counts.X) * 10
    with pytest.raises(InvalidCountsError, match="observed data contains"):
        score_predictions(predicted, counts)
    counts.X[0, 0] = np.nan
    with pytest.raises(InvalidCountsError, match="not finite"):
        score_predictions(predicted, counts)
    empty = observed.copy()
    empty.X = None
    with pytest.raises(MissingKeyError, match="X of the predicted"):
        score_predictions(empty, observed)
    twice = observed.copy()
    twice.var_names = ["g0", *GENES[:-1]]
    with pytest.raises(SAMSError, match=r"'g0' occurs twice in the observed"):
        score_predictions(predicted, twice)


def test_groups_without_control_cells_or_names_are_refused():
    observed = cells(0)
    observed.obs["type"] = ["T"] * 60 + ["B"] * 90
    with pytest.raises(MissingControlError, match="of 'B'"):
        score_predictions(observed, observed, covariate_key="type")
    observed.obs["type"] = pd.Categorical(["T"] * 149 + [None])
    with pytest.raises(InvalidCovariateError, match="1 cell of the predicted"):
        score_predictions(observed, observed, covariate_key="type")


def test_expression_may_be_on_disk(tmp_path):
    observed, predicted = cells(0), cells(1, PERTURBATIONS)
    paths = [tmp_path / f"{name}.h5ad" for name in ("predicted", "observed")]
    for path, data in zip(paths, (predicted, observed), strict=True):
        data.write_h5ad(path)
    backed = [ad.read_h5ad(path, backed="r") for path in paths]
    modes = ["sams", "perturbench"]
    pd.testing.assert_frame_equal(
        score_predictions(*backed, modes=modes), score_predictions(predicted, observed, modes=modes)
    )
