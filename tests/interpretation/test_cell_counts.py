"""Numbers of cells, counted by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from model.builders import train_small
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.interpretation import cell_counts

LABELS = ["NT"] * 40 + ["A"] * 25 + ["B"] * 12 + ["A+B"] * 10 + ["C+B"] * 3
GUIDES = (
    ["nt1"] * 40 + ["A1"] * 15 + ["A2"] * 8 + [None] * 2 + ["B1"] * 12 + ["A1|B1"] * 10
    + ["B1|C1"] * 3
)  # fmt: skip


def screen():
    counts = 1.0 + np.random.default_rng(0).poisson(3, (len(LABELS), 12))
    obs = pd.DataFrame({"perturbation": LABELS, "guide": GUIDES}).sample(frac=1, random_state=1)
    obs.index = [f"c{number}" for number in range(len(obs))]
    return pd.DataFrame(counts, index=obs.index), obs


@pytest.fixture(scope="module")
def model():
    counts, obs = screen()
    adata = ad.AnnData(counts.astype(np.float32), obs=obs)
    setup = {"control": "NT", "guide_key": "guide"}
    return train_small(adata, setup, train={"train_size": 0.8})


def test_cells_alone_and_with_others(model):
    table = cell_counts(model, min_cells=20)
    assert table.index.tolist() == ["NT", "A", "B", "C"]
    assert table["n_cells"].tolist() == [40, 35, 25, 3]
    assert table["n_alone"].tolist() == [40, 25, 12, 0]
    assert table["few_cells"].tolist() == [False, False, False, True]


def test_guides_of_each_perturbation(model):
    table = cell_counts(model)
    assert table["n_guides"].tolist() == [0, 2, 1, 1]
    assert table["fewest_of_a_guide"].tolist() == [0, 8, 25, 3]


def test_cells_of_each_guide(model):
    table = cell_counts(model, per="guide", min_cells=9)
    assert table["perturbation"].to_dict() == {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
    assert table["n_cells"].tolist() == [25, 8, 25, 3]
    assert table["n_alone"].tolist() == [15, 8, 12, 0]
    assert table["few_cells"].tolist() == [False, True, False, True]


def test_cells_trained_on_are_those_of_the_split(model):
    trained = model.adata.obs.iloc[model.train_indices]
    labels, guides = trained["perturbation"].astype(str), trained["guide"].fillna("")
    for name, n_train in cell_counts(model)["n_train"].items():
        assert n_train == labels.str.split("+").map(lambda one, n=name: n in one).sum()
    for name, n_train in cell_counts(model, per="guide")["n_train"].items():
        assert n_train == guides.str.split("|").map(lambda one, n=name: n in one).sum()
    assert cell_counts(model)["n_train"].sum() < cell_counts(model)["n_cells"].sum()


def test_an_untrained_model_has_no_training_cells(model):
    untrained = SAMSVAE(model.adata, n_latent=3)
    assert "n_train" not in cell_counts(untrained)
    assert cell_counts(untrained)["n_cells"].equals(cell_counts(model)["n_cells"])


def test_without_guides_there_are_no_columns_of_them(model):
    adata = model.adata.copy()
    CPAVAE.setup_anndata(adata, control="NT")
    plain = CPAVAE(adata, n_latent=3)
    assert not any("guide" in column for column in cell_counts(plain))
    with pytest.raises(SAMSError, match="guide_key"):
        cell_counts(plain, per="guide")


def test_invalid_arguments_raise(model, tmp_path):
    with pytest.raises(InvalidArgumentError, match="`per`"):
        cell_counts(model, per="cell")
    with pytest.raises(InvalidArgumentError, match="`min_cells`"):
        cell_counts(model, min_cells=-1)
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=False)
    with pytest.raises(SAMSError, match="without data"):
        cell_counts(loaded)
