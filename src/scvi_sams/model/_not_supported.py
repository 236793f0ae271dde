"""Methods of scvi-tools models that these models do not have, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from scvi_sams.exceptions import NotSupportedError

NOT_SUPPORTED = {
    "get_marginal_ll": "the importance-weighted estimate of the likelihood of cells is "
    "get_iwelbo(n_samples=...)",
    "get_importance_weights": "get_iwelbo averages them; they are not returned",
    "get_likelihood_parameters": "the mean of counts is get_normalized_expression times the size "
    "of the cell, and dispersions are parameters of model.module.likelihood",
    "get_feature_correlation_matrix": "correlations of genes are those of "
    "posterior_predictive_sample(n_samples=...), for example by numpy.corrcoef",
    "get_latent_library_size": "the size of a cell is not latent: it is the sum of its counts, or "
    "the registered size factor",
    "get_aggregated_posterior": "pass return_dist=True to get_latent_representation for the "
    "posterior of every cell",
    "differential_abundance": "cells of a perturbation are compared with others by their states: "
    "see get_latent_representation(representation=...)",
    "get_batch_representation": "batches have no embedding: they are one-hot inputs",
    "minify_adata": "all methods read counts, which would be removed",
    "load_query_data": "effects of perturbations that were never trained on are unknown; pass "
    "cells of known perturbations directly to methods",
    "prepare_query_anndata": "pass other cells directly to methods, with the same genes",
    "prepare_query_mudata": "pass other cells directly to methods, with the same genes",
    "setup_mudata": "the model reads one modality, an AnnData: pass that with the counts of genes, "
    "such as setup_anndata(mdata.mod['rna'], ...), with labels in its obs",
    "setup_annbatch": "it would register cells without their perturbations; for cells on disk use "
    "setup_anndata(scvi_sams.data.open_screen(path))",
}

Model = TypeVar("Model", bound=type)


class _NotSupported:
    """An attribute that raises an error on access, so that ``hasattr`` is false."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def __get__(self, model: object, owner: type) -> NoReturn:
        raise NotSupportedError(f"{owner.__name__} has no `{self.name}`: {self.reason}.")


def without(names: dict[str, str]) -> Callable[[Model], Model]:
    """Class decorator: attributes that do not exist, by name, with the reason."""

    def remove(model_class: Model) -> Model:
        for name, reason in names.items():
            setattr(model_class, name, _NotSupported(name, reason))
        return model_class

    return remove
