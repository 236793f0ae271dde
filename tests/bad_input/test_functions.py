"""Whatever is given to a public function, it works or an error says what is wrong."""

import inspect
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bad_input.functions import calls
from scvi_sams import evaluation, features, pl, tl
from scvi_sams.exceptions import SAMSError

WRONG = [
    None,
    -1,
    2.5,
    np.nan,
    True,
    "nonsense",
    [],
    ["nonsense"],
    {},
    object(),
    pd.DataFrame(),
    np.zeros((2, 2)),
]
NAMESPACES = {"tl": tl, "pl": pl, "evaluation": evaluation, "features": features}
ANY_VALUE = {"argument", "control", "covariate", "n_components", "indices"}
"""Labels and words may be anything; the others are not read by every call."""
OTHERWISE_TESTED = {
    # Writes files, and needs an extra; see tests/interpretation.
    "tl": {"export", "enrichment"},
    "pl": {"latent"},  # a UMAP takes seconds: rows of the table
    "evaluation": {"benchmark", "learning_curve"}  # rows of their own
    | {"describe_metrics"}  # takes nothing
    # Of profiles that score_predictions makes; see tests/evaluation.
    | {"de_overlap", "deg_recall", "discrimination_scores", "effect_metrics", "logfc"}
    | {"pearson_delta", "perturbed_centroid", "position", "rank_scores", "wilcoxon_fdr"},
    "features": {"from_embedding", "from_gmt", "from_smiles"},  # of files, and of an extra
}
# Arguments of which only the type can be wrong, and Python's own error says so.
LEFT_TO_PYTHON = {
    "tl": {"model", "direction", "latent", "order", "perturbation_key", "layer"}
    | {"size_factor_key"},
    "pl": {"ax", "axes", "order", "history", "interactions", "score", "lower", "delimiter"}
    | {"perturbation", "latent", "method", "metric", "mode", "fit", "specificity", "reference"},
    "evaluation": {"model", "models", "split", "settings", "perturbation_key", "covariate_key"}
    | {"layer", "size_factor_key"},
    "features": {"uns"},
}


@pytest.fixture(scope="module")
def valid():
    return calls()


def function_names():
    return [
        f"{name}.{function}"
        for name, module in NAMESPACES.items()
        for function in module.__all__
        if inspect.isfunction(getattr(module, function)) and function not in OTHERWISE_TESTED[name]
    ]


def call(function, arguments):
    by_position = [
        arguments[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*by_position, **arguments)


def outcome(function, arguments, errors=SAMSError):
    try:
        call(function, arguments)
    except errors as error:
        return str(error)
    finally:
        plt.close("all")
    return None


@pytest.mark.parametrize("name", function_names())
def test_a_wrong_argument_is_an_error_of_ours_or_none(name, valid):
    function, arguments = valid[name]
    assert outcome(function, arguments) is None, "what follows would mean nothing"
    for argument in inspect.signature(function).parameters:
        if argument in ANY_VALUE or argument.endswith("kwargs"):
            continue
        is_ours = argument not in LEFT_TO_PYTHON[name.split(".")[0]]
        errors = (
            SAMSError if is_ours else (SAMSError, AttributeError, KeyError, TypeError, ValueError)
        )
        messages = [outcome(function, arguments | {argument: value}, errors) for value in WRONG]
        refusals = [message for message in messages if message is not None]
        assert len(refusals) >= 4 or argument == "order", argument
        assert all(len(message) > 20 for message in refusals)
