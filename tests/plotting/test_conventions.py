"""What every plotting function promises."""

import inspect
import itertools
from collections.abc import Callable

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import plotting
from scvi_sams.evaluation import BenchmarkResult, Calibration, mask_calibration
from scvi_sams.exceptions import InvalidArgumentError, SavingError
from scvi_sams.interpretation import perturbation_similarity
from scvi_sams.model._direct_effects import DirectEffectTables

NAMES = [f"P{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def masks_input() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).random((20, 5)), index=NAMES)


def direct_effects_input() -> DirectEffectTables:
    table = masks_input() - 0.5
    return DirectEffectTables(table, table.abs(), (0.5 - table.abs()))


def table_input() -> ad.AnnData:
    return ad.AnnData(
        np.random.default_rng(0).normal(size=(20, 5)),
        obs=pd.DataFrame(index=NAMES),
        uns={"ate": {"method": "lognorm", "target_sum": 1e4}},
    )


def cells_input() -> ad.AnnData:
    return ad.AnnData(
        obs=pd.DataFrame({"perturbation": NAMES[:2] * 10}, index=NAMES),
        obsm={"X_sams": np.random.default_rng(0).normal(size=(20, 3))},
    )


def scores_input() -> pd.DataFrame:
    methods = ["control mean", "mean of perturbations", "A", "half of the test cells"]
    metrics = {"rmse_average": (False, np.nan), "rank_rmse_average": (False, 0.5)}
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            (method, 0, name, "perturbench", metric, rng.random(), 9, higher, chance, "ok", "")
            for method in methods
            for metric, (higher, chance) in metrics.items()
            for name in NAMES
        ],
        columns=[
            "method", "seed", "perturbation", "mode", "metric", "value", "n_cells",
            "higher_is_better", "chance", "status", "message",
        ],
    )  # fmt: skip


def programs_input() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(20, 2))
    return pd.DataFrame(values, index=NAMES, columns=["latent_0", "latent_1"])


def ate_input() -> ad.AnnData:
    table = table_input()
    table.layers["standard_error"] = np.full(table.shape, 0.3)
    return table


def curves_input() -> ad.AnnData:
    curves = table_input()
    curves.obs["perturbation"] = ["A", "B"] * 10
    curves.obs["dosage"] = np.arange(20.0)
    curves.obs["is_measured_range"] = curves.obs["dosage"] < 10
    curves.layers["interval_low"] = curves.X - 1
    curves.layers["interval_high"] = curves.X + 1
    return curves


def similarity_input() -> pd.DataFrame:
    return perturbation_similarity(masks_input() - 0.5)


def interactions_input() -> pd.DataFrame:
    pairs = [f"{a}+{b}" for a, b in itertools.combinations(NAMES, 2)]
    return pd.DataFrame({"score": np.random.default_rng(0).normal(size=len(pairs))}, index=pairs)


def history_input() -> dict[str, pd.DataFrame]:
    epochs = pd.RangeIndex(20, name="epoch")
    keys = ["elbo_train", "elbo_validation", "kl_masks_train", "dense_phase", "active_masks"]
    return {key: pd.DataFrame({key: np.exp(-np.arange(20))}, index=epochs) for key in keys}


def summary_input() -> pd.DataFrame:
    return BenchmarkResult(scores_input(), pd.DataFrame(), {}).summary()


def learning_curve_input() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (method, asked, cells, seed, rng.random())
        for method in ("control mean", "A", "B")
        for asked, cells in ((10, 10.0), (None, 42.5))
        for seed in (0, 1)
    ]
    columns = ["method", "cells_per_perturbation", "n_cells", "seed", "pearson"]
    return pd.DataFrame(rows, columns=columns).astype({"cells_per_perturbation": "Int64"})


def contexts_input() -> pd.DataFrame:
    values = np.random.default_rng(0).random(40)
    flags = {"is_measured": values > 0.1, "acts": values > 0.4, "differs": values > 0.8}
    columns = {"effect": values, **flags, "pattern": "shared"}
    return pd.DataFrame({"perturbation": np.repeat(NAMES, 2), "context": ["K", "T"] * 20} | columns)


def guides_input() -> pd.DataFrame:
    values = np.random.default_rng(0).random(20)
    table = pd.DataFrame({"perturbation": np.repeat(NAMES[:10], 2), "acts": True}, index=NAMES)
    for value, low, high in (
        ("response_rate", "rate_low", "rate_high"),
        ("effect_size", "effect_low", "effect_high"),
    ):
        table[value], table[low], table[high] = values, values - 0.1, values + 0.1
    return table.assign(does_nothing=values < 0.2, differs_from_siblings=values > 0.8)


def importance_input() -> pd.DataFrame:
    values = np.random.default_rng(0).random(100)
    return pd.DataFrame(
        {
            "feature": np.repeat(NAMES, 5),
            "latent": [f"latent_{i}" for i in range(5)] * 20,
            "part": "effect",
            "weight": values - 0.5,
            "lfsr": values / 100,
        }
    )


SIZE_AND_FILE = """
figsize
    Width and height of the new figure in inches; ``None`` for a size that fits.
save
    File to write the figure to, in the format of its suffix.
"""
FUNCTIONS = {
    "masks": (masks_input, lambda data, **how: plotting.masks(data, **how)),
    "direct_effects": (
        direct_effects_input,
        lambda data, **how: plotting.direct_effects(data, **how),
    ),
    "feature_importance": (
        importance_input,
        lambda data, **how: plotting.feature_importance(data, **how),
    ),
    "ate_scatter": (table_input, lambda data, **how: plotting.ate_scatter(data, data, **how)),
    "benchmark_metric": (
        summary_input,
        lambda data, **how: plotting.benchmark_metric(data, "rmse_average", **how),
    ),
    "benchmark_specificity": (
        summary_input,
        lambda data, **how: plotting.benchmark_specificity(data, **how),
    ),
    "benchmark_perturbations": (
        scores_input,
        lambda data, **how: plotting.benchmark_perturbations(data, "A", **how),
    ),
    "learning_curve": (
        learning_curve_input,
        lambda data, **how: plotting.learning_curve(data, **how),
    ),
    "mask_calibration": (
        lambda: mask_calibration(masks_input(), masks_input() > 0.5),
        lambda data, **how: plotting.mask_calibration(data, **how),
    ),
    "program_genes": (
        programs_input,
        lambda data, **how: plotting.program_genes(data, "latent_1", **how),
    ),
    "effect_volcano": (ate_input, lambda data, **how: plotting.effect_volcano(data, "P3", **how)),
    "dose_response": (curves_input, lambda data, **how: plotting.dose_response(data, "A", **how)),
    "similarity": (similarity_input, lambda data, **how: plotting.similarity(data, **how)),
    "context_effects": (
        contexts_input,
        lambda data, **how: plotting.context_effects(data, **how),
    ),
    "guide_efficacy": (guides_input, lambda data, **how: plotting.guide_efficacy(data, **how)),
    "interaction_matrix": (
        interactions_input,
        lambda data, **how: plotting.interaction_matrix(data, **how),
    ),
    "training_curves": (
        history_input,
        lambda data, ax=None, **how: plotting.training_curves(
            data, terms=["elbo"], axes=ax and [ax], **how
        )[0],
    ),
    "latent": (
        cells_input,
        lambda data, ax=None, **how: plotting.latent(
            data, basis=["X_sams"], axes=ax and [ax], **how
        )[0],
    ),
}
every_function = pytest.mark.parametrize(
    ("make_input", "draw"), FUNCTIONS.values(), ids=FUNCTIONS.keys()
)


def test_every_function_is_covered():
    assert set(FUNCTIONS) == set(plotting.__all__)


@every_function
def test_draws_on_the_axes_it_is_given(make_input: Callable, draw: Callable):
    figure, (left, right) = plt.subplots(1, 2)
    assert draw(make_input(), ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]


@every_function
def test_makes_a_figure_without_axes(make_input: Callable, draw: Callable):
    assert draw(make_input()).figure.number in plt.get_fignums()


@every_function
def test_a_figure_of_the_size_is_saved(make_input: Callable, draw: Callable, tmp_path):
    width, height, pad = 5.0, 4.5, 0.1
    file = tmp_path / "figure.png"
    ax = draw(make_input(), figsize=(width, height), save=file)
    np.testing.assert_array_equal(ax.figure.get_size_inches(), (width, height))
    assert file.read_bytes().startswith(b"\x89PNG")
    # Cropped to what is drawn, and to a square if both axes have the same scale.
    n_rows, n_columns, _ = plt.imread(file).shape
    assert 0.7 * width < n_columns / 150 < width + 2 * pad + 0.3
    assert 0.7 * height < n_rows / 150 < height + 2 * pad + 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@every_function
def test_size_and_file_are_arguments_of_all_and_described_alike(
    make_input: Callable, draw: Callable, request
):
    function = getattr(plotting, request.node.callspec.id)
    assert SIZE_AND_FILE in inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    assert {"figsize", "save"} <= set(parameters)
    (where,) = {"ax", "axes"} & set(parameters)
    for name in (where, "figsize", "save"):
        assert parameters[name].default is None
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_file_has_the_resolution_of_the_settings_and_at_least_150_dots_per_inch(tmp_path):
    sizes = []
    for dpi in ("figure", 72, 300):
        with mpl.rc_context({"savefig.dpi": dpi, "figure.dpi": 100}):
            plotting.masks(masks_input(), save=str(tmp_path / "masks.png"))
        sizes.append(plt.imread(tmp_path / "masks.png").shape[0])
    assert sizes[0] == sizes[1]
    assert sizes[2] == pytest.approx(2 * sizes[0], abs=2)


def test_the_figure_of_given_axes_is_saved(tmp_path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    plotting.masks(masks_input(), ax=left)
    plotting.masks(masks_input(), ax=right, save=tmp_path / "both.pdf")
    assert (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF")
    np.testing.assert_array_equal(figure.get_size_inches(), (8, 3))


def test_sizes_and_files_that_cannot_be_are_refused(tmp_path):
    for figsize in (3, (4,), (4, 0), ("4", 3)):
        with pytest.raises(InvalidArgumentError, match="`figsize` must be"):
            plotting.masks(masks_input(), figsize=figsize)
    with pytest.raises(InvalidArgumentError, match="there are axes"):
        plotting.masks(masks_input(), figsize=(4, 3), ax=plt.figure().subplots())
    for save in (True, tmp_path / "masks", tmp_path / "masks.csv"):
        with pytest.raises(InvalidArgumentError, match="`save` must"):
            plotting.masks(masks_input(), save=save)
    with pytest.raises(SavingError, match="nowhere"):
        plotting.masks(masks_input(), save=tmp_path / "nowhere" / "masks.png")
    assert not list(tmp_path.iterdir())


@every_function
def test_new_figures_scale_with_the_size_of_text(make_input: Callable, draw: Callable):
    sizes = []
    for size in (8, 16):
        with mpl.rc_context({"font.size": size}):
            sizes.append(draw(make_input()).figure.get_size_inches())
    np.testing.assert_allclose(sizes[1], 2 * sizes[0])


@every_function
@pytest.mark.parametrize(
    "settings", [{}, {"font.size": 14}, {"figure.figsize": (3.5, 3.5)}], ids=str
)
def test_labels_of_ticks_do_not_collide(make_input: Callable, draw: Callable, settings):
    with mpl.rc_context(settings):
        figsize = settings.get("figure.figsize")
        ax = draw(make_input(), figsize=figsize)
        ax.figure.draw_without_rendering()
        for side, axis in enumerate((ax.xaxis, ax.yaxis)):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            ends = sorted((box.min[side], box.max[side]) for box in boxes)
            assert all(one[1] <= other[0] + 1 for one, other in itertools.pairwise(ends))


@every_function
def test_neither_shows_nor_changes_settings(make_input: Callable, draw: Callable, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: shown.append(args))
    before = dict(mpl.rcParams)
    draw(make_input())
    assert dict(mpl.rcParams) == before
    assert shown == []


@every_function
def test_leaves_its_input_as_it_was(make_input: Callable, draw: Callable):
    data, before = make_input(), make_input()
    draw(data)
    if isinstance(data, pd.DataFrame):
        pd.testing.assert_frame_equal(data, before)
        return
    if isinstance(data, DirectEffectTables):
        for table, original in zip(data, before, strict=True):
            pd.testing.assert_frame_equal(table, original)
        return
    if isinstance(data, Calibration):
        pd.testing.assert_frame_equal(data.bins, before.bins)
        pd.testing.assert_frame_equal(data.fdr, before.fdr)
        return
    if isinstance(data, dict):
        assert list(data) == list(before)
        for key, table in data.items():
            pd.testing.assert_frame_equal(table, before[key])
        return
    for slot in ("obs", "var"):
        pd.testing.assert_frame_equal(getattr(data, slot), getattr(before, slot))
    for slot in ("uns", "obsm", "obsp", "layers"):
        assert list(getattr(data, slot)) == list(getattr(before, slot))
    if before.X is not None:
        np.testing.assert_array_equal(data.X, before.X)
