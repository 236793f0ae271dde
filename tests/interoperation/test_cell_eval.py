"""Predicted cells as they are, in the evaluator of cell-eval."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.evaluation import score_predictions


def test_its_evaluator_takes_predicted_cells(model, observed, predicted, tmp_path):
    cell_eval = pytest.importorskip("cell_eval")
    single = observed[observed.obs["perturbation"].isin(["control", *model.perturbations])].copy()
    evaluator = cell_eval.MetricsEvaluator(
        adata_pred=predicted,
        adata_real=single,
        control_pert="control",
        pert_col="perturbation",
        num_threads=1,
        outdir=str(tmp_path),
    )
    table, _ = evaluator.compute(profile="full", write_csv=False)
    theirs = pd.DataFrame(table.to_dict(as_series=False)).set_index("perturbation")
    assert sorted(theirs.index) == sorted(model.perturbations)
    # Six perturbations: at chance, the mean is 7 / 12, and all in the right order would be 1.
    assert theirs["discrimination_score_l1"].mean() > 0.8
    assert theirs["pearson_delta"].median() > 0.8
    ours = score_predictions(predicted, single, modes=["cell-eval"])
    ours = ours.pivot(index="perturbation", columns="metric", values="value")
    names = {"mae": "mae", "discrimination_l1": "discrimination_score_l1"}
    for our_name, their_name in names.items():
        expected = theirs[their_name].reindex(ours.index).astype(float)
        np.testing.assert_allclose(ours[our_name], expected, atol=1e-5, err_msg=our_name)
