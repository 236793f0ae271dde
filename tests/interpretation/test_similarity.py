"""Similarity of perturbations: by hand, and in an order in which groups are blocks."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation import perturbation_similarity

NAMES = ["A", "B", "C", "none"]
EFFECTS = pd.DataFrame([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0], [0.0, 0.0]], index=NAMES)
MASKS = pd.DataFrame(
    [[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]], index=NAMES, columns=list("xyz")
).astype(bool)


def test_cosine_by_hand():
    found = perturbation_similarity(EFFECTS, order=False)
    expected = [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert list(found.index) == list(found.columns) == NAMES


def test_jaccard_by_hand():
    found = perturbation_similarity(MASKS, metric="jaccard", order=False)
    expected = [[1, 1 / 3, 2 / 3, 0], [1 / 3, 1, 2 / 3, 0], [2 / 3, 2 / 3, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(found, expected)


def test_jaccard_of_probabilities_by_hand():
    masks = pd.DataFrame([[0.9, 0.1], [0.5, 0.3]], index=["A", "B"])
    found = perturbation_similarity(masks, metric="jaccard")
    assert found.loc["A", "B"] == pytest.approx((0.5 + 0.1) / (0.9 + 0.3))


def test_groups_become_blocks_whatever_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(4, 30)), 5, axis=0)
    effects = pd.DataFrame(
        centres + 0.2 * rng.normal(size=centres.shape),
        index=[f"group{i // 5}-{i % 5}" for i in range(20)],
    )
    shuffled = effects.iloc[rng.permutation(20)]
    found = perturbation_similarity(shuffled)
    groups = found.index.str[:6]
    assert (groups[:-1] != groups[1:]).sum() == 3
    assert list(found.index) == list(found.columns)
    unordered = perturbation_similarity(effects, order=False)
    pd.testing.assert_frame_equal(
        found.loc[effects.index, effects.index], unordered, check_names=False
    )


def test_an_ate_table_is_its_frame():
    table = ad.AnnData(EFFECTS.to_numpy(), obs=pd.DataFrame(index=NAMES))
    pd.testing.assert_frame_equal(
        perturbation_similarity(table), perturbation_similarity(EFFECTS), check_names=False
    )


def test_wrong_input_is_refused():
    with pytest.raises(SAMSError, match="'euclidean'"):
        perturbation_similarity(EFFECTS, metric="euclidean")
    with pytest.raises(SAMSError, match="metric='cosine'"):
        perturbation_similarity(EFFECTS, metric="jaccard")
    with pytest.raises(SAMSError, match="such as 'B'"):
        perturbation_similarity(EFFECTS.replace(-6.0, np.nan))
