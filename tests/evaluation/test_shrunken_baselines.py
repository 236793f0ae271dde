"""Shrunken means against values computed by hand, and against simulated truth."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from scvi_sams._shrinkage import moderated_variance, shrink_entries
from scvi_sams.baselines._shrunken import AshMean, EBMean, ShrunkenAdditive
from scvi_sams.baselines._simple import Additive, TrainingMean
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError

# Control: mean (2, 0, 2), variance (2, 0, 0). Effects, and variances: A (2, 2, 0), (0, 2, 0) of two
# cells; B (0, 0, 3) of one; A+B (6, 0, 0), (1, 0, 0) of three.
CELLS = {
    "control": [[1, 0, 2], [3, 0, 2]],
    "A": [[4, 1, 2], [4, 3, 2]],
    "B": [[2, 0, 5]],
    "A+B": [[7, 0, 2], [8, 0, 2], [9, 0, 2]],
}
CONTROL = np.array([2, 0, 2])


def screen(cells) -> ad.AnnData:
    labels = np.repeat(list(cells), [len(rows) for rows in cells.values()])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(np.concatenate(list(cells.values())).astype(np.float32), obs=obs)


def simulated(*, n_cells=25, n_controls=400, n_genes=400, share=0.1, seed=0, pairs=()):
    """Cells with normal expression, genes of different variance; and the true effects."""
    rng = np.random.default_rng(seed)
    sd = np.exp(rng.normal(0, 0.5, n_genes))
    names = ["A", "B", "C", "D"]
    truth = {
        name: np.where(rng.random(n_genes) < share, 1.5 * sd * rng.normal(size=n_genes), 0)
        for name in names
    }
    truth |= {f"{a}+{b}": truth[a] + truth[b] for a, b in pairs}
    cells = {"control": 5 + sd * rng.normal(size=(n_controls, n_genes))}
    cells |= {
        name: 5 + effect + sd * rng.normal(size=(n_cells, n_genes))
        for name, effect in truth.items()
    }
    return screen(cells), truth


def effects_of(method, names):
    return np.asarray(method.predict(names).X) - method.control_mean


def test_eb_mean_by_hand():
    predicted = EBMean().fit(screen(CELLS)).predict(["A", "B", "B+A"]).X
    # The controls' own squared errors are (1, 0, 0). A: squared errors (1, 1, 0), squared effects
    # (4, 4, 0), so 3/4 is kept. B has the controls' variance: (3, 0, 0) of (0, 0, 9). A+B: 4/3
    # of 36.
    kept = np.array([[0.75], [2 / 3], [26 / 27]])
    effects = np.array([[2, 2, 0], [0, 0, 3], [6, 0, 0]])
    np.testing.assert_allclose(predicted, CONTROL + kept * effects, rtol=1e-6)


def test_effects_are_a_table_with_their_errors():
    method = EBMean().fit(screen(CELLS))
    assert method.effects.obs_names.tolist() == ["A", "A+B", "B"]
    np.testing.assert_allclose(
        np.square(method.effects.layers["standard_error"]),
        [[1, 1, 0], [1 / 3 + 1, 0, 0], [3, 0, 0]],
        rtol=1e-6,
    )
    assert method.effects.obs["n_cells"].tolist() == [2, 3, 1]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_ash_mean_shrinks_means_by_moderated_variances(is_sparse):
    cells, _ = simulated()
    x, labels = cells.X.astype(np.float64), cells.obs["perturbation"].to_numpy()
    if is_sparse:
        cells.X = sparse.csr_matrix(cells.X)
    names = ["A", "B", "C", "D"]
    controls = x[labels == "control"]
    n_cells, control_variance = np.full(4, 25), controls.var(axis=0, ddof=1)
    variance = moderated_variance(
        np.array([x[labels == name].var(axis=0, ddof=1) for name in names]),
        n_cells,
        control_variance,
        400,
        stats.kurtosis(controls),
    )
    effect = np.array([x[labels == name].mean(axis=0) for name in names]) - controls.mean(axis=0)
    expected = shrink_entries(effect, np.sqrt(variance / 25 + control_variance / 400)).mean
    np.testing.assert_allclose(effects_of(AshMean().fit(cells), names), expected, atol=1e-5)


def test_a_combination_is_predicted_by_its_own_cells_or_else_by_its_singles():
    cells = screen(CELLS)
    unseen = cells[cells.obs["perturbation"] != "A+B"]
    for method in (EBMean(), AshMean()):
        a, b, combined = effects_of(method.fit(cells), ["A", "B", "A+B"])
        assert np.abs(combined - a - b).max() > 1
        singles = effects_of(method.fit(unseen), ["A", "B", "B+A"])
        np.testing.assert_allclose(singles, [a, b, a + b], atol=1e-6)
    # The additive one leaves the cells of the combination aside.
    for train in (cells, unseen):
        shrunken = effects_of(ShrunkenAdditive().fit(train), ["A", "B", "A+B"])
        np.testing.assert_allclose(shrunken, [a, b, a + b], atol=1e-6)


@pytest.mark.parametrize("method", [EBMean(), AshMean(), ShrunkenAdditive()])
def test_what_no_training_cell_carries_is_an_error_that_names_it(method):
    with pytest.raises(UnknownPerturbationError, match="'C'"):
        method.fit(screen(CELLS)).predict(["A+C"])


def rmse(estimate, truth):
    return np.sqrt(np.mean((estimate - truth) ** 2))


def test_sparse_effects_are_found_better_by_ash_than_as_a_whole_or_as_they_are():
    cells, truth = simulated()
    names = ["A", "B", "C", "D"]
    true = np.array([truth[name] for name in names])
    ash, eb, raw = (
        rmse(effects_of(method.fit(cells), names), true)
        for method in (AshMean(), EBMean(), TrainingMean())
    )
    assert ash < 0.75 * eb < 0.75 * raw


def test_errors_of_unseen_pairs_do_not_add_up():
    cells, truth = simulated(pairs=[("A", "B"), ("C", "D")])
    names = ["A+B", "C+D"]
    train = cells[~cells.obs["perturbation"].isin(names)]
    true = np.array([truth[name] for name in names])
    shrunken, plain = (
        rmse(effects_of(method.fit(train), names), true)
        for method in (ShrunkenAdditive(), Additive())
    )
    assert shrunken < 0.65 * plain


@pytest.mark.parametrize("method", [EBMean(), AshMean()])
@pytest.mark.parametrize(("n_cells", "n_controls"), [(10, 400), (400, 10)])
def test_perturbations_that_do_nothing_are_predicted_to(method, n_cells, n_controls):
    # With few controls all that is seen is their error.
    cells, _ = simulated(n_cells=n_cells, n_controls=n_controls, share=0)
    names = ["A", "B", "C", "D"]
    shrunken = effects_of(method.fit(cells), names)
    seen = effects_of(TrainingMean().fit(cells), names)
    assert rmse(shrunken, 0) < 0.2 * rmse(seen, 0)


def test_one_control_cell_is_an_error():
    cells = screen(CELLS)[1:]
    for method in (EBMean(), AshMean()):
        with pytest.raises(SAMSError, match="single control cell"):
            method.fit(cells)
